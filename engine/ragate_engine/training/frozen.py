"""Frozen weights in a product that gradients pass through: dense, or as codes unpacked anew in each direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ragate_engine.errors import ConfigError
from ragate_engine.layers import dense
from ragate_engine.quant.tensor import QuantTensor
from ragate_engine.quantize.rtn import rtn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ragate_engine.layers import Weight

BITS, GROUP = 4, 64
"""What a plain weight is rounded to for a packed base."""


@dataclass(frozen=True)
class Halved:
    """A `QuantTensor` of at most 4 bits whose codes lie two in a byte: columns i and i + in / 2."""

    codes: torch.Tensor
    """uint8 [out, in / 2]."""
    rest: QuantTensor
    """Everything but the codes, which are an empty view."""

    @classmethod
    def of(cls, weight: QuantTensor) -> Halved:
        codes = weight.codes.view(torch.uint8) & 15
        low, high = codes.chunk(2, dim=1)
        blank = weight.codes.new_empty(1).expand(weight.shape)
        rest = QuantTensor(
            weight.bits, weight.group, blank, weight.scales, weight.offsets, weight.shape, weight.order
        )
        return cls(low | high << 4, rest)

    def whole(self) -> QuantTensor:
        """A byte a code again."""
        rest = self.rest
        codes = torch.cat([self.codes & 15, self.codes >> 4], dim=1)
        if rest.offsets is None:  # signed: the upper bit of the four is the sign
            codes = (codes.view(torch.int8) << 4) >> 4
        return QuantTensor(rest.bits, rest.group, codes, rest.scales, rest.offsets, rest.shape, rest.order)


class Packed:
    """Weights [out_i, in] for one product, kept as codes."""

    def __init__(self, weights: Sequence[Weight], device: torch.device) -> None:
        self.parts = [_halved(_quantized(weight, device)) for weight in weights]

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """[sum of out, in]."""
        whole = [part.whole() if isinstance(part, Halved) else part for part in self.parts]
        return torch.cat([part.dequantize(dtype) for part in whole])


class _PackedProduct(torch.autograd.Function):
    """x W^T + bias; only x has a gradient, g W, for which the codes are unpacked again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.packed = packed
        return F.linear(x, packed.unpack(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient @ ctx.packed.unpack(gradient.dtype), None, None


class Frozen:
    """One or more weights [out_i, in] stacked into one product that is not trained."""

    def __init__(
        self,
        weights: Sequence[Weight],
        biases: Sequence[torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
        packed: bool,
    ) -> None:
        self.bias = torch.cat([bias.to(device, dtype) for bias in biases]) if biases else None
        self.weight: torch.Tensor | Packed
        if packed:
            self.weight = Packed(weights, device)
        else:
            self.weight = torch.cat([dense(weight, dtype, device) for weight in weights])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, in] -> [M, sum of out]."""
        if isinstance(self.weight, Packed):
            y: torch.Tensor = _PackedProduct.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
            return y
        return F.linear(x, self.weight, self.bias)


def _quantized(weight: Weight, device: torch.device) -> QuantTensor:
    """`weight` as it is quantized, or rounded to nearest where it is plain. Raises ConfigError."""
    if isinstance(weight, QuantTensor):
        return weight.to(device)
    out, width = weight.shape
    if width % GROUP:
        raise ConfigError(
            f"rows of {width} weights do not divide into groups of {GROUP}: take base dense, or a quantized model"
        )
    rounded = rtn(weight.to(device).float(), BITS, GROUP, symmetric=False)
    offsets = -rounded.zeros.float() * rounded.scales
    return QuantTensor(BITS, GROUP, rounded.codes, rounded.scales, offsets, (out, width))


def _halved(weight: QuantTensor) -> QuantTensor | Halved:
    return Halved.of(weight) if weight.bits <= 4 and weight.shape[1] % 2 == 0 else weight
