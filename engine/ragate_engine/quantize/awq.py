"""AWQ (Lin et al. 2023, arXiv 2306.00978): channels whose errors cost much are scaled up before rounding.

The scales of a linear's input channels are folded into the operation before it, so that the model stays what it was;
then the range of each group is clipped where that costs less than it gains, and the weights are rounded to nearest.
As in the paper both are chosen by what a block puts out, not by the weights' own errors. Unlike its code, scales are
not powers of the activations' magnitude, but the best there are for each channel (`find_scales`), and the groups of a
row are clipped with regard to each other (`rounded`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ragate_engine.kernels.reference import act_mul
from ragate_engine.quantize.layer import LINEARS, STAGES, attention_costs
from ragate_engine.quantize.rtn import Quantized, codes_on, find_grid, trivial_index

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ragate_engine.config import ModelConfig
    from ragate_engine.quantize.recipe import Recipe

SHARES = tuple(1 - step / 30 for step in range(13))
"""Of a group's range: what is tried of it, down to 0.6."""
DOUBT = 1.0
"""How often the diagonal of what correlates counts once more: other text correlates otherwise."""
SWEEPS = 2
"""How often every group of a row is chosen, given the errors of the others."""
REFIT = 0.25
"""Share of a group's scale that it may move by, once its codes are chosen, to where they fit best."""
STEPS, RATE = 60, 0.1
"""Of the descent to the best scales, in their logarithms."""
ROWS = 4096
"""Rows, evenly spaced, that scales are found for, at most."""
SAMPLE_TOKENS = 512
"""Tokens, evenly spaced over the calibration, that tell how much each row of an MLP counts."""

FOLDS: dict[str, tuple[str, ...]] = {
    "qkv": ("attn_norm",),
    "o": ("v", "v_bias"),
    "gate_up": ("mlp_norm",),
    "down": ("up",),
}
"""What takes in the inverse scales of each stage's input."""

FOLDED = frozenset(leaf for leaves in FOLDS.values() for leaf in leaves)

_STAGE = {leaf: stage for stage, leaves in STAGES.items() for leaf in leaves}


class Sample:
    """Some of the tokens that go into a linear."""

    def __init__(self, tokens: int) -> None:
        """`tokens`: how many will come."""
        self.count = 0
        self.stride = max(1, -(-tokens // SAMPLE_TOKENS))
        self._kept: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        """Take in inputs [n, in] of any dtype."""
        self._kept.append(x[-self.count % self.stride :: self.stride].float())
        self.count += len(x)

    def tokens(self) -> torch.Tensor:
        """Inputs, float32 [about 512 at most, in]."""
        return torch.cat(self._kept)


class Seen:
    """A layer's activations, as far as AWQ must know them."""

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        config: ModelConfig,
        index: int,
        tables: tuple[torch.Tensor, torch.Tensor],
        tokens: int,
    ) -> None:
        """Of layer `index` with `weights`, float32 by leaf; `tables` as for `run_layer`; `tokens` will come."""
        self._weights, self._config, self._index, self._tables = weights, config, index, tables
        self._count = dict.fromkeys(STAGES, 0)
        self._total: dict[str, torch.Tensor] = {}
        self._sample = Sample(tokens)

    def add(self, stage: str, x: torch.Tensor) -> None:
        """Take in the inputs of a stage, [n, in] of any dtype, of one whole sequence."""
        wide = x.float()
        if stage == "qkv":
            costs = attention_costs(self._weights, self._config, self._index, self._tables, wide)
            for leaf, cost in costs.items():
                self._gather(leaf, wide * cost.unsqueeze(1), wide)
        else:
            self._gather(stage, wide, wide)
        if stage == "gate_up":
            self._sample.add(wide)
        self._count[stage] += len(x)

    def _gather(self, key: str, left: torch.Tensor, right: torch.Tensor) -> None:
        width = left.shape[1]
        total = self._total.setdefault(key, left.new_zeros(width, width))
        total.addmm_(left.T, right)

    def gram(self, leaf: str) -> torch.Tensor:
        """Mean of x x^T of a linear's inputs, each weighted by what an error costs there: float32 [in, in]."""
        stage = _STAGE[leaf]
        return self._total[leaf if stage == "qkv" else stage] / max(self._count[stage], 1)

    def row_costs(self, leaf: str) -> torch.Tensor:
        """What an error of each output of a linear costs the block's output, float32 [out], all of a stage alike."""
        weight = self._weights[leaf]
        if leaf == "v":
            config = self._config
            heads = self._weights["o"].square().sum(0).view(config.num_kv_heads, -1, config.head_dim)
            return heads.sum(1).flatten()
        if leaf in STAGES["gate_up"]:
            return self._mlp_costs()[STAGES["gate_up"].index(leaf)]
        return weight.new_ones(len(weight))

    def _mlp_costs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of gate and up: the mean square of the activation's slope, times the column of `down` that it meets."""
        x = self._sample.tokens()
        pair = torch.cat([x @ self._weights[leaf].T for leaf in STAGES["gate_up"]], dim=1)
        with torch.inference_mode(False), torch.enable_grad():
            inner = pair.clone().requires_grad_()
            act_mul(inner, self._config.activation).sum().backward()
            assert inner.grad is not None
            slopes = inner.grad.square().mean(0)
        met = self._weights["down"].square().sum(0)
        gate, up = slopes.chunk(2)
        return gate * met, up * met


class Rows(NamedTuple):
    """A linear, and what its errors cost."""

    weight: torch.Tensor
    """float32 [out, in]."""
    power: torch.Tensor
    """Of its inputs: the mean of their weighted squares, float32 [in]."""
    costs: torch.Tensor
    """Of its outputs, float32 [out]."""


def awq(
    weights: Mapping[str, torch.Tensor], seen: Seen, recipe: Recipe, config: ModelConfig
) -> tuple[dict[str, torch.Tensor], dict[str, Quantized]]:
    """Quantize a layer's `weights` (float32 by leaf) for the activations that were `seen`.

    Returns the layer's other tensors, scales folded in, and its linears. Where several heads share a KV head, so do
    their channels of the input of `o` share a scale: it is folded into one row of `v`.
    """
    scaled = {leaf: tensor.clone() for leaf, tensor in weights.items()}
    scales: dict[str, torch.Tensor] = {}
    for stage, leaves in STAGES.items():
        linears = [Rows(scaled[leaf], seen.gram(leaf).diagonal(), seen.row_costs(leaf)) for leaf in leaves]
        width = weights[leaves[0]].shape[1]
        shape = (config.num_kv_heads, -1, config.head_dim) if stage == "o" else (1, 1, width)
        found = find_scales(linears, recipe.group_of(width), shape)
        for leaf in leaves:
            scaled[leaf] *= found
        folded = found.view(shape)[:, 0].flatten()
        for leaf in FOLDS[stage]:
            if leaf in scaled:
                scaled[leaf] /= folded if scaled[leaf].ndim == 1 else folded.unsqueeze(1)
        scales[stage] = found
    quantized: dict[str, Quantized] = {}
    for leaf in LINEARS:
        weight, scale = scaled.pop(leaf), scales[_STAGE[leaf]]
        gram = seen.gram(leaf).div_(scale).div_(scale.unsqueeze(1))
        quantized[leaf] = rounded(weight, gram, recipe.bits, recipe.group_of(weight.shape[1]))
    return scaled, quantized


def find_scales(linears: Sequence[Rows], group: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """Scales of the input channels of `linears`, float32 [in], for which rounding is expected to cost least.

    Rounding changes a weight by about a twelfth of the squared step, and the step is the group's range, so a group
    costs sum_i power_i / s_i^2 times sum_o cost_o range_o(s)^2. In log s that is convex (a geometric program), and is
    descended to its least (Adam); all scales 1 are where that begins. The paper has s = magnitude^alpha and tries 20
    alphas, of which this model family often wants 0. Viewed in `shape` (a, b, c), scales are the same along b.
    """
    stride = -(-sum(len(each.weight) for each in linears) // ROWS)
    with torch.inference_mode(False), torch.enable_grad():
        rows = [
            Rows(
                weight[::stride].clone(),
                power.clamp(min=1e-6 * power.mean()).clone(),
                costs[::stride].clone(),
            )
            for weight, power, costs in linears
        ]
        size = linears[0].power.view(shape)
        log = torch.zeros(
            size.shape[0], 1, size.shape[2], dtype=torch.float32, device=size.device, requires_grad=True
        )
        descent = torch.optim.Adam([log], lr=RATE)
        best, least = torch.zeros_like(size), torch.inf
        for step in range(STEPS):
            descent.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            scales = log.expand_as(size).flatten().exp()
            lost = torch.stack([_expected(each, scales, group) for each in rows]).sum().log()
            if float(lost.detach()) < least:
                best, least = log.detach().expand_as(size).clone(), float(lost.detach())
            descent.zero_grad()
            lost.backward()
            descent.step()
    return best.flatten().exp()


def _expected(rows: Rows, scales: torch.Tensor, group: int) -> torch.Tensor:
    """What rounding `rows`, scaled, is expected to cost, up to a factor."""
    groups = (rows.weight * scales).unflatten(1, (-1, group))
    span = groups.amax(-1).clamp(min=0.0) - groups.amin(-1).clamp(max=0.0)
    power = (rows.power / scales.square()).view(-1, group).sum(1)
    cost: torch.Tensor = (span.square().T @ rows.costs) @ power
    return cost


def rounded(weight: torch.Tensor, gram: torch.Tensor, bits: int, group: int) -> Quantized:
    """`weight`, float32 [out, in], rounded to nearest, each group on the clipped range that changes its row least.

    The scale is then moved to where it fits the codes best (least squares), if that is near (`REFIT`).

    The error of a row is d G d^T, for d its changes and G the `gram` of its inputs, float32 [in, in], with more on
    its diagonal (`DOUBT`): what is true of the calibration's correlations need not be of other text. A group is
    chosen given what the others have lost. Clipping makes weights smaller, and a little in every layer is a lot in the
    end: so each row's scales are stretched until its output is, on the whole, as large as it was.
    """
    gram = gram + DOUBT * torch.diag(gram.diagonal())
    rows, width = weight.shape
    change = torch.zeros_like(weight)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales, zeros = weight.new_empty(2, rows, width // group)
    for _ in range(SWEEPS):
        for g in range(width // group):
            columns = slice(g * group, (g + 1) * group)
            part, own = weight[:, columns].contiguous(), gram[columns, columns]
            pull = 2 * (change @ gram[:, columns] - change[:, columns] @ own)
            shown = part @ own
            wanted = shown - pull / 2
            least = weight.new_full((rows,), torch.inf)
            for share in SHARES:
                scale, zero = find_grid(part * share, bits, symmetric=False)
                code = codes_on(part, scale.unsqueeze(1), zero.unsqueeze(1), bits)
                level = code - zero.unsqueeze(1)
                felt = level @ own
                fit = (level * wanted).sum(1) / (level * felt).sum(1)
                scale = fit.nan_to_num(0.0).maximum(scale * (1 - REFIT)).minimum(scale * (1 + REFIT))
                off = level * scale.unsqueeze(1) - part
                lost = ((felt * scale.unsqueeze(1) - shown + pull) * off).sum(1)
                better = lost < least
                least = torch.where(better, lost, least)
                scales[:, g], zeros[:, g] = (
                    torch.where(better, new, old[:, g]) for new, old in ((scale, scales), (zero, zeros))
                )
                wide = better.unsqueeze(1)
                codes[:, columns] = torch.where(wide, code.to(torch.uint8), codes[:, columns])
                change[:, columns] = torch.where(wide, off, change[:, columns])
    seen = weight @ gram
    size = (seen * weight).sum(1, keepdim=True)
    stretch = (size / (size + (seen * change).sum(1, keepdim=True))).nan_to_num(1.0).clamp(0.5, 2.0)
    stretched = (scales * stretch).half().float()
    return Quantized(
        bits, codes, stretched, zeros.to(torch.uint8), trivial_index(width, group, weight.device)
    )
