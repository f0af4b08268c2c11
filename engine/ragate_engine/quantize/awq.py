"""AWQ (Lin et al. 2023, arXiv 2306.00978): channels with large activations are scaled up before rounding.

The scales of a linear's input channels are folded into the operation before it, so that the model stays what it was;
then extremes that cost more than they are worth are clipped, and the rest is rounded to nearest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ragate_engine.quantize.layer import STAGES
from ragate_engine.quantize.rtn import Quantized, rtn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ragate_engine.quantize.recipe import Recipe

GRID = 20
"""Exponents tried for the scales, and steps into which the clipping range is cut (of which half are tried)."""
SAMPLE_TOKENS = 512
"""Tokens, evenly spaced over the calibration, on whose outputs candidates are compared."""

FOLDS: dict[str, tuple[str, ...]] = {
    "qkv": ("attn_norm",),
    "o": ("v", "v_bias"),
    "gate_up": ("mlp_norm",),
    "down": ("up",),
}
"""What takes in the inverse scales of each stage's input."""

FOLDED = frozenset(leaf for leaves in FOLDS.values() for leaf in leaves)


class Sample:
    """Of a linear's inputs: the mean magnitude of each channel, and some tokens."""

    def __init__(self, width: int, tokens: int, device: torch.device) -> None:
        """`tokens`: how many will come."""
        self.size = torch.zeros(width, device=device)
        self.count = 0
        self.stride = max(1, -(-tokens // SAMPLE_TOKENS))
        self._kept: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        """Take in inputs [n, in] of any dtype."""
        wide = x.float()
        self.size += wide.abs().sum(0)
        self._kept.append(wide[-self.count % self.stride :: self.stride].clone())
        self.count += len(x)

    def magnitude(self) -> torch.Tensor:
        """The mean of |x|, float32 [in]."""
        return self.size / max(self.count, 1)

    def tokens(self) -> torch.Tensor:
        """Inputs, float32 [about 512 at most, in]."""
        return torch.cat(self._kept)


def awq(
    weights: Mapping[str, torch.Tensor], samples: Mapping[str, Sample], recipe: Recipe, head_dim: int
) -> tuple[dict[str, torch.Tensor], dict[str, Quantized]]:
    """Quantize a layer's `weights` (float32 by leaf) for the inputs of each stage, `samples`.

    Returns the layer's other tensors, scales folded in, and its linears. Where several heads share a KV head, so do
    their channels of the input of `o` share a scale: it is folded into one row of `v`.
    """
    scaled = {leaf: tensor.clone() for leaf, tensor in weights.items()}
    tokens: dict[str, torch.Tensor] = {}
    for stage, leaves in STAGES.items():
        before = [leaf for leaf in FOLDS[stage] if leaf in scaled]
        size = samples[stage].magnitude()
        heads = (
            size.view(-1, size.numel() // len(scaled[before[0]]), head_dim)
            if stage == "o"
            else size.view(-1, 1, 1)
        )
        size = heads.mean(1, keepdim=True).expand_as(heads).flatten()
        x, linears = samples[stage].tokens(), [scaled[leaf] for leaf in leaves]
        scales = find_scales(linears, x, size, recipe.bits, recipe.group_of(x.shape[1]))
        for linear in linears:
            linear *= scales
        folded = scales.view(heads.shape)[:, 0].flatten()
        for leaf in before:
            scaled[leaf] /= folded if scaled[leaf].ndim == 1 else folded.unsqueeze(1)
        tokens[stage] = x / scales
    quantized: dict[str, Quantized] = {}
    for stage, leaves in STAGES.items():
        for leaf in leaves:
            weight = scaled.pop(leaf)
            # the paper's code leaves q and k alone: a clipped extreme would turn up in every score
            group = recipe.group_of(weight.shape[1])
            clipped = weight if leaf in ("q", "k") else clip(weight, tokens[stage], recipe.bits, group)
            quantized[leaf] = rtn(clipped, recipe.bits, group, symmetric=False)
    return scaled, quantized


def find_scales(
    weights: Sequence[torch.Tensor], x: torch.Tensor, magnitude: torch.Tensor, bits: int, group: int
) -> torch.Tensor:
    """Scales of the input channels, float32 [in]: magnitude ** alpha with the alpha that loses least (eq. 5).

    `weights`: float32 [out, in] each, which share the input `x`, float32 [n, in]; compared is the squared error of
    their outputs. alpha 0 is among the candidates: plain rounding.
    """
    best, least = torch.ones_like(magnitude), torch.inf
    for step in range(GRID):
        scales = magnitude.pow(step / GRID).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        lost = 0.0
        for weight in weights:
            rounded = rtn(weight * scales, bits, group, symmetric=False).dequantize().div_(scales)
            lost += float((x @ rounded.sub_(weight).T).square_().sum())
        if lost < least:
            best, least = scales, lost
    return best


def clip(weight: torch.Tensor, x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """`weight`, float32 [out, in], each group clipped to the range whose rounding changes its own product least.

    Ranges are the largest magnitude times 1, 0.95, ... 0.55 (the paper's code, `auto_clip`). The squared error of a
    group's product over the tokens is d G d^T, for d the change of its weights and G the Gram matrix of its inputs.
    """
    groups = weight.unflatten(1, (-1, group))
    inputs = x.unflatten(1, (-1, group)).transpose(0, 1)
    gram = inputs.transpose(1, 2) @ inputs
    extreme = groups.abs().amax(-1, keepdim=True)
    best, least = extreme.clone(), torch.full_like(extreme, torch.inf)
    for step in range(GRID // 2):
        limit = extreme * (1 - step / GRID)
        clipped = torch.clamp(groups, -limit, limit)
        change = rtn(clipped.flatten(1), bits, group, symmetric=False).dequantize().sub_(weight)
        change = change.unflatten(1, (-1, group)).transpose(0, 1)
        lost = ((change @ gram) * change).sum(-1).T.unsqueeze(-1)
        better = lost < least
        best, least = torch.where(better, limit, best), torch.where(better, lost, least)
    return torch.clamp(groups, -best, best).flatten(1)
