"""The parts of a decoder that hold weights: linear, embedding, rope tables; each a thin skin over the kernels."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ragate_engine.config import RopeConfig
from ragate_engine.kernels import StepInputs
from ragate_engine.quant.tensor import QuantTensor
from ragate_engine.rope import frequencies

Weight = torch.Tensor | QuantTensor


def dense(weight: Weight, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`weight` as a plain tensor of `dtype` on `device`."""
    if isinstance(weight, QuantTensor):
        return weight.to(device).dequantize(dtype)
    return weight.to(device=device, dtype=dtype)


Keep = Literal["dense", "packed", "int8"]
"""What becomes of weights at the start: unpacked, kept as they are quantized, or rounded for products in int8."""


class Kept(NamedTuple):
    """Weights [out, in] that were not unpacked."""

    operation: str
    """The kernels' product for them."""
    weights: Any
    width: int
    """in."""
    activation: str | None
    """Of a gated pair."""


def kept(
    weights: list[Weight],
    kernels: ModuleType,
    device: torch.device,
    keep: Keep,
    activation: str | None = None,
) -> Kept | None:
    """`weights` as `keep` wants them, for one product (of a gate and an up where there is an `activation`).

    `None` where that is the plain product, or where the kernels do not take them.
    """
    if keep == "dense" or not hasattr(kernels, "pack_quantized" if keep == "packed" else "pack_int8"):
        return None
    placed = [weight.to(device) for weight in weights]
    found, operation = None, "int8"
    if keep == "int8":
        found = kernels.pack_int8(placed, activation is not None)
    elif all(isinstance(weight, QuantTensor) for weight in placed):
        found, operation = kernels.pack_quantized(placed, activation is not None), "quantized"
    return None if found is None else Kept(operation, found, weights[0].shape[1], activation)


class Linear:
    """One or more weights [out_i, in] stacked into one product: q, k and v are read once."""

    def __init__(
        self,
        weights: list[Weight],
        biases: list[torch.Tensor],
        kernels: ModuleType,
        dtype: torch.dtype,
        device: torch.device,
        keep: Keep = "dense",
    ) -> None:
        self.kept = kept(weights, kernels, device, keep)
        if self.kept is None:
            stacked = (
                torch.cat([dense(w, dtype, device) for w in weights])
                if len(weights) > 1
                else dense(weights[0], dtype, device)
            )
            self.packed = kernels.pack_linear(stacked)
        self.bias = torch.cat([b.to(device=device, dtype=dtype) for b in biases]) if biases else None
        self.kernels = kernels

    def __call__(
        self,
        x: torch.Tensor,
        rows: torch.Tensor | None,
        wide: bool = False,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[M, in] -> [M, sum of out] (in `out` if given), in float32 when `wide`; `rows` as in `StepInputs`."""
        if self.kept is not None:
            multiply = getattr(self.kernels, self.kept.operation)
            y: torch.Tensor = multiply(x, self.kept.weights, self.bias, None, rows, wide, out)
            return y
        if out is not None:
            return self.kernels.linear(x, self.packed, self.bias, wide, rows, out)  # type: ignore[no-any-return]
        y = self.kernels.linear(x, self.packed, self.bias, wide, rows)
        return y

    def weight(self) -> torch.Tensor:
        """The stacked weights [sum of out, in] of a backend that keeps them in rows."""
        if self.kept is not None:
            unpack = getattr(self.kernels, f"unpack_{self.kept.operation}")
            return unpack(self.kept.weights)  # type: ignore[no-any-return]
        return self.packed.weight  # type: ignore[no-any-return]


class Gated:
    """The gate and up weights [out, in] of an MLP as one product that ends in act(gate) * up."""

    def __init__(
        self,
        gate: Weight,
        up: Weight,
        activation: str,
        kernels: ModuleType,
        dtype: torch.dtype,
        device: torch.device,
        keep: Keep = "dense",
    ) -> None:
        self.kept = kept([gate, up], kernels, device, keep, activation)
        if self.kept is None:
            self.packed = kernels.pack_gated(dense(gate, dtype, device), dense(up, dtype, device))
        self.activation = activation
        self.kernels = kernels

    def __call__(self, x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """[M, in] -> [M, out]."""
        if self.kept is not None:
            multiply = getattr(self.kernels, self.kept.operation)
            y: torch.Tensor = multiply(x, self.kept.weights, None, self.activation, rows)
        else:
            y = self.kernels.gated(x, self.packed, self.activation, rows)
        return y


class Embedding:
    """Token embeddings, kept as they were stored: only the rows of a step are dequantized."""

    def __init__(
        self, weight: Weight, scale: float, kernels: ModuleType, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.scale = scale
        self.dtype = dtype
        self.kernels = kernels
        # on a card a dense table is small change; in a CPU's memory it would be the largest tensor
        self.weight = (
            weight
            if device.type == "cpu" and isinstance(weight, QuantTensor)
            else dense(weight, dtype, device)
        )

    def __call__(self, ids: torch.Tensor, step: StepInputs) -> torch.Tensor:
        """ids [M] -> [M, hidden], fresh storage; id -1 - i stands for `step.sampled[i]`."""
        if isinstance(self.weight, QuantTensor):
            if step.sampled is not None:
                ids = torch.where(ids < 0, step.sampled[(-1 - ids).clamp(min=0)].to(ids.dtype), ids)
            return self.weight.rows(ids).dequantize(self.dtype) * self.scale
        h: torch.Tensor = self.kernels.embed(ids, self.weight, self.scale, step)
        return h


def rope_tables(
    rope: RopeConfig, head_dim: int, max_len: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [max_len, rotary_dim / 2], from angles worked out in float64 (Su et al. 2021, eq. 34)."""
    angles = np.arange(max_len, dtype=np.float64)[:, None] * frequencies(rope, head_dim)
    return (
        torch.from_numpy(np.cos(angles).astype(np.float32)).to(device),
        torch.from_numpy(np.sin(angles).astype(np.float32)).to(device),
    )
