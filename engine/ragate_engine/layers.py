"""The parts of a decoder that hold weights: linear, embedding, rope tables; each a thin skin over the kernels."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ragate_engine.config import RopeConfig
from ragate_engine.kernels import StepInputs
from ragate_engine.quant.tensor import QuantTensor

Weight = torch.Tensor | QuantTensor


def dense(weight: Weight, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`weight` as a plain tensor of `dtype` on `device`."""
    if isinstance(weight, QuantTensor):
        return weight.to(device).dequantize(dtype)
    return weight.to(device=device, dtype=dtype)


def packed(
    weights: list[Weight], kernels: ModuleType, device: torch.device, gated: bool = False
) -> tuple[Any, ...] | None:
    """`weights` as the kernels' quantized product reads them; `None` where one is dense or no kernel takes it."""
    quantized = [weight for weight in weights if isinstance(weight, QuantTensor)]
    if len(quantized) < len(weights) or not hasattr(kernels, "pack_quantized"):
        return None
    parts: tuple[Any, ...] | None = kernels.pack_quantized([weight.to(device) for weight in quantized], gated)
    return parts


class Linear:
    """One or more weights [out_i, in] stacked into one product: q, k and v are read once."""

    def __init__(
        self,
        weights: list[Weight],
        biases: list[torch.Tensor],
        kernels: ModuleType,
        dtype: torch.dtype,
        device: torch.device,
        keep: bool = False,
    ) -> None:
        """`keep`: quantized weights stay packed where the kernels take them."""
        self.parts = packed(weights, kernels, device) if keep else None
        if self.parts is None:
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
        if self.parts is not None:
            y: torch.Tensor = self.kernels.quantized(x, self.parts, self.bias, wide, None, rows, out)
            return y
        if out is not None:
            return self.kernels.linear(x, self.packed, self.bias, wide, rows, out)  # type: ignore[no-any-return]
        y = self.kernels.linear(x, self.packed, self.bias, wide, rows)
        return y

    def weight(self) -> torch.Tensor:
        """The stacked weights [sum of out, in] of a backend that keeps them in rows."""
        if self.parts is not None:
            return self.kernels.unpack_quantized(self.parts)  # type: ignore[no-any-return]
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
        keep: bool = False,
    ) -> None:
        """`keep` as in `Linear`."""
        self.parts = packed([gate, up], kernels, device, gated=True) if keep else None
        if self.parts is None:
            self.packed = kernels.pack_gated(dense(gate, dtype, device), dense(up, dtype, device))
        self.activation = activation
        self.kernels = kernels

    def __call__(self, x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """[M, in] -> [M, out]."""
        y: torch.Tensor
        if self.parts is not None:
            y = self.kernels.quantized(x, self.parts, None, False, self.activation, rows)
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
    """cos and sin, float32 [max_len, rotary_dim / 2], from angles worked out in float64.

    Sources: Su et al. 2021, eq. 34; `linear` Chen et al. 2023; `llama3` as in the Llama 3.1 release.
    """
    rotary = int(head_dim * rope.partial)
    inverse = rope.theta ** -(np.arange(0, rotary, 2, dtype=np.float64) / rotary)
    if rope.scaling == "linear":
        inverse = inverse / rope.factor
    elif rope.scaling == "llama3":
        wavelength = 2 * math.pi / inverse
        low = rope.original_max_len / rope.low_freq_factor
        high = rope.original_max_len / rope.high_freq_factor
        smooth = (rope.original_max_len / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blended = (1 - smooth) * inverse / rope.factor + smooth * inverse
        inverse = np.where(
            wavelength > low, inverse / rope.factor, np.where(wavelength < high, inverse, blended)
        )
    angles = np.arange(max_len, dtype=np.float64)[:, None] * inverse
    return (
        torch.from_numpy(np.cos(angles).astype(np.float32)).to(device),
        torch.from_numpy(np.sin(angles).astype(np.float32)).to(device),
    )
