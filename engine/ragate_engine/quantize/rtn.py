"""Round to nearest: the grid of each group of weights and the codes on it; GPTQ and AWQ build on both."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_LEAST_SCALE = 2.0**-24
"""The smallest number above zero of float16, in which scales are stored."""


@dataclass(frozen=True)
class Quantized:
    """A weight [out, in] as it will be stored: w[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g], g = g_idx[i]."""

    bits: int
    codes: torch.Tensor
    """uint8 [out, in] in [0, 2**bits), columns in the order of the weight."""
    scales: torch.Tensor
    """float32 [out, groups], each one a float16."""
    zeros: torch.Tensor
    """uint8 [out, groups] in [0, 2**bits)."""
    g_idx: torch.Tensor
    """int32 [in]: the group of each column."""

    def dequantize(self) -> torch.Tensor:
        """float32 [out, in]."""
        groups = self.g_idx.long()
        return (self.codes.float() - self.zeros.float()[:, groups]) * self.scales[:, groups]

    def rows(self, start: int, stop: int) -> Quantized:
        """Rows `start` to `stop`: one of several weights that were stacked."""
        part = slice(start, stop)
        return Quantized(self.bits, self.codes[part], self.scales[part], self.zeros[part], self.g_idx)


def find_grid(
    groups: torch.Tensor, bits: int, symmetric: bool, least_zero: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point, float32 [...], of groups of weights, float32 [..., group].

    The grid spans the extremes and zero; a symmetric one has its zero point in the middle and spans the larger extreme
    on either side (as AutoGPTQ does). Scales are rounded to float16 here, so that codes are chosen for the scale that
    is stored. `least_zero` 1 keeps zero points above 0, for a format that stores them minus one.
    """
    top = 2**bits - 1
    low, high = groups.amin(-1).clamp(max=0.0), groups.amax(-1).clamp(min=0.0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    else:
        low = torch.minimum(low, high * (-least_zero / (top - least_zero)))
    scales = ((high - low) / top).clamp(min=_LEAST_SCALE).half().float()
    if symmetric:
        return scales, torch.full_like(scales, 2 ** (bits - 1))
    return scales, torch.round(-low / scales).clamp(least_zero, top)


def codes_on(weights: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest code of each weight, as float32; the three broadcast together."""
    return (torch.round(weights / scales) + zeros).clamp(0, 2**bits - 1)


def trivial_index(width: int, group: int, device: torch.device) -> torch.Tensor:
    """g_idx of groups of neighbours: int32 [width]."""
    return torch.arange(width, dtype=torch.int32, device=device) // group


def rtn(weight: torch.Tensor, bits: int, group: int, symmetric: bool, least_zero: int = 0) -> Quantized:
    """Round `weight`, float32 [out, in], to the nearest codes; `group` must divide a row."""
    groups = weight.unflatten(1, (-1, group))
    scales, zeros = find_grid(groups, bits, symmetric, least_zero)
    codes = codes_on(groups, scales.unsqueeze(-1), zeros.unsqueeze(-1), bits).flatten(1).to(torch.uint8)
    return Quantized(
        bits, codes, scales, zeros.to(torch.uint8), trivial_index(weight.shape[1], group, weight.device)
    )
