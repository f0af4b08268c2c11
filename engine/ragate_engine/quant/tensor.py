"""`QuantTensor`: the one form every quantized weight takes, whatever format it was stored in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CHUNK_WEIGHTS = 1 << 26
"""Dequantized at a time on a card."""


@dataclass(frozen=True)
class Form:
    """How a tensor is stored, as far as a header tells."""

    size: float
    """Bytes a weight in the file, scales included."""
    bits: int = 0
    """Of a code; 0 where weights are plain floats."""
    group: int = 1
    """Weights that share a scale."""
    beside: bool = False
    """Whether a zero or an offset stands beside each scale (it is left out where all zeros are the middle)."""
    ordered: bool = False
    """Whether its columns may have an order of their own."""


@dataclass(frozen=True)
class QuantTensor:
    """A weight matrix [out_features, in_features], affine in groups of consecutive weights of a row.

    `w[o, i] = scales[o, i // group] * codes[o, i] + offsets[o, i // group]`, the product rounded to float32
    before the sum; without `offsets` the codes are signed and the product is all.
    """

    bits: int
    """Width of a code: [0, 2**bits) with offsets, [-2**(bits-1), 2**(bits-1)) without."""
    group: int
    codes: torch.Tensor
    """uint8 or int8 [out, in], a byte each."""
    scales: torch.Tensor
    """float32 [out, in / group]."""
    offsets: torch.Tensor | None
    """float32 [out, in / group], or `None` where it is zero everywhere."""
    shape: tuple[int, int]
    order: torch.Tensor | None = None
    """int64 [in], a permutation: column j of the codes is the weight of input `order[j]` (act-order of GPTQ)."""

    def __post_init__(self) -> None:
        out, width = self.shape
        if width % self.group:
            raise ValueError(f"rows of {width} weights do not divide into groups of {self.group}")
        if tuple(self.codes.shape) != self.shape:
            raise ValueError(f"codes have shape {tuple(self.codes.shape)}, expected {self.shape}")
        for scale in (self.scales, self.offsets):
            expected = (out, width // self.group)
            if scale is not None and tuple(scale.shape) != expected:
                raise ValueError(f"scales have shape {tuple(scale.shape)}, expected {expected}")
        if self.order is not None and tuple(self.order.shape) != (width,):
            raise ValueError(f"order has shape {tuple(self.order.shape)}, expected {(width,)}")

    @property
    def device(self) -> torch.device:
        """Where the codes lie."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales, offsets and order."""
        parts = (self.codes, self.scales, self.offsets, self.order)
        return sum(part.nbytes for part in parts if part is not None)

    def to(self, device: torch.device | str) -> QuantTensor:
        """The same tensor on `device`."""
        offsets = None if self.offsets is None else self.offsets.to(device)
        order = None if self.order is None else self.order.to(device)
        codes, scales = self.codes.to(device), self.scales.to(device)
        return QuantTensor(self.bits, self.group, codes, scales, offsets, self.shape, order)

    def rows(self, index: torch.Tensor | slice) -> QuantTensor:
        """The rows that `index` picks (a slice, or int64 [n]), in its order: as embedding lookup does."""
        codes, scales = self.codes[index], self.scales[index]
        offsets = None if self.offsets is None else self.offsets[index]
        shape = (codes.shape[0], self.shape[1])
        return QuantTensor(self.bits, self.group, codes, scales, offsets, shape, self.order)

    @property
    def _rows_at_once(self) -> int:
        """On a card the float32 form must stay small beside the weights; on a CPU threads want whole tensors."""
        return max(1, self.shape[0] if self.device.type == "cpu" else CHUNK_WEIGHTS // self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights [out, in], columns in the order of the inputs: computed in float32, bit by bit as ggml does,
        then cast to `dtype`.
        """
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        step = self._rows_at_once
        in_place = dtype == torch.float32 and self.order is None
        wide = out if in_place else out.new_empty((step, self.shape[1]), dtype=torch.float32)
        for first in range(0, self.shape[0], step):
            rows = slice(first, first + step)
            codes = self.codes[rows]
            part = wide[rows] if in_place else wide[: len(codes)]
            groups = part.view(len(codes), -1, self.group)
            # Two roundings, never a fused multiply-add: that is what the reference decoders do.
            groups.copy_(codes.view(groups.shape)).mul_(self.scales[rows].unsqueeze(-1))
            if self.offsets is not None:
                groups += self.offsets[rows].unsqueeze(-1)
            if self.order is not None:
                out[rows].index_copy_(1, self.order, part.to(dtype))
            elif not in_place:
                out[rows] = part
        return out
