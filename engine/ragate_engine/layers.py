"""The parts of a decoder that hold weights: linear, adapters, embedding, rope tables; each a skin over the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ragate_engine.config import ModelConfig, RopeConfig
from ragate_engine.errors import ConfigError
from ragate_engine.kernels import StepInputs
from ragate_engine.lora import Adapter, stacked
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


class LowRank:
    """What adapters add to a product: x A^T, of which a row keeps the columns of its own adapter, times B^T.

    All adapters are stacked, so that there are two products however many they are. What is not a row's own is exactly
    zero and fills whole steps of the tensor cores: it adds nothing to the sums, whose bits are then those that the
    row's adapter gives alone.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor, kernels: ModuleType) -> None:
        self.a, self.b = kernels.pack_linear(a), kernels.pack_linear(b)
        self.kernels = kernels

    @classmethod
    def of(
        cls,
        adapters: Sequence[Adapter],
        model: ModelConfig,
        weights: Sequence[str],
        kernels: ModuleType,
        dtype: torch.dtype,
        device: torch.device,
    ) -> LowRank | None:
        """For the product of `weights` (canonical names); `None` where no adapter changes any of them.

        Raises ConfigError for numbers that `dtype` cannot hold.
        """
        found = stacked(adapters, model, weights)
        if found is None:
            return None
        a, b = (half.to(device=device, dtype=dtype) for half in found)
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            kind = str(dtype).removeprefix("torch.")
            raise ConfigError(f"an adapter's numbers for {weights[0]} are too large for {kind}: use float32")
        return cls(a, b, kernels)

    def __call__(self, x: torch.Tensor, rows: torch.Tensor | None, own: torch.Tensor) -> torch.Tensor:
        """x [M, in] -> float32 [M, out]; own [M, columns] is 1 where a column is of the row's adapter, else 0."""
        u = self.kernels.linear(x, self.a, None, True, rows).view(len(x), -1, own.shape[1])
        kept = torch.mul(u, own[:, None], out=torch.empty_like(u, dtype=x.dtype))
        y: torch.Tensor = self.kernels.linear(kept.flatten(1), self.b, None, True, rows)
        return y


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
        low_rank: LowRank | None = None,
    ) -> None:
        self.low_rank = low_rank
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
        own: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[M, in] -> [M, sum of out] (in `out` if given), in float32 when `wide`; `rows` as in `StepInputs`.

        Adapters add to it where `own` says whose rows are theirs, as in `LowRank`.
        """
        y: torch.Tensor
        if self.kept is not None:
            multiply = getattr(self.kernels, self.kept.operation)
            y = multiply(x, self.kept.weights, self.bias, None, rows, wide, out)
        elif out is not None:
            y = self.kernels.linear(x, self.packed, self.bias, wide, rows, out)
        else:
            y = self.kernels.linear(x, self.packed, self.bias, wide, rows)
        if own is not None and self.low_rank is not None:
            y += self.low_rank(x, rows, own)
        return y

    def weight(self) -> torch.Tensor:
        """The stacked weights [sum of out, in] of a backend that keeps them in rows."""
        if self.kept is not None:
            unpack = getattr(self.kernels, f"unpack_{self.kept.operation}")
            return unpack(self.kept.weights)  # type: ignore[no-any-return]
        return self.packed.weight  # type: ignore[no-any-return]


class Gated:
    """The gate and up weights [out, in] of an MLP as one product that ends in act(gate) * up.

    With adapters the product ends before the activation, in float32 where there is such a product.
    """

    def __init__(
        self,
        gate: Weight,
        up: Weight,
        activation: str,
        kernels: ModuleType,
        dtype: torch.dtype,
        device: torch.device,
        keep: Keep = "dense",
        low_rank: LowRank | None = None,
    ) -> None:
        self.activation = activation
        self.kernels = kernels
        self.apart: Linear | None = None
        if low_rank is not None:
            self.apart = Linear([gate, up], [], kernels, dtype, device, keep, low_rank)
            self.kept = self.apart.kept
            return
        self.kept = kept([gate, up], kernels, device, keep, activation)
        if self.kept is None:
            self.packed = kernels.pack_gated(dense(gate, dtype, device), dense(up, dtype, device))

    def __call__(
        self, x: torch.Tensor, rows: torch.Tensor | None, own: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[M, in] -> [M, out]; `own` as in `Linear`."""
        if self.apart is not None:
            wide = self.kept is None or self.kept.operation != "int8"
            both = self.apart(x, rows, wide, own=own)
            return self.kernels.act_mul(both, self.activation, x.dtype, rows)  # type: ignore[no-any-return]
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
