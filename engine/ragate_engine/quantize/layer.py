"""One decoder layer in plain torch over whole sequences, which shows what goes into its linears."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ragate_engine.kernels.reference import act_mul, rms_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ragate_engine.config import ModelConfig

STAGES: dict[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
"""Linears by the input that they share."""

LINEARS = tuple(leaf for leaves in STAGES.values() for leaf in leaves)


def run_layer(
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    index: int,
    tables: tuple[torch.Tensor, torch.Tensor],
    h: torch.Tensor,
    watch: Callable[[str, torch.Tensor], None] = lambda stage, x: None,
) -> torch.Tensor:
    """Layer `index` over one sequence, h [n, hidden] -> [n, hidden], in the dtype of h and of `weights` (by leaf).

    `tables`: cos and sin, float32 [n or more, rotary / 2]. `watch` sees the input of each of `STAGES`, [n, in]. The
    arithmetic is that of `model.Layer` over the reference kernels, without a cache.
    """
    eps = config.norm_eps
    x = rms_norm(h, None, weights["attn_norm"], eps)
    watch("qkv", x)
    q, k, v = _ready(weights, config, tables, *_projected(weights, config, x))
    x = (_shares(q, k, config, config.window_of(index)) @ v).transpose(0, 1).flatten(1).to(x.dtype)
    watch("o", x)
    x = F.linear(x, weights["o"])
    if config.sandwich_norm:
        x = rms_norm(x, None, weights["attn_post_norm"], eps)
    h = h + x
    x = rms_norm(h, None, weights["mlp_norm"], eps)
    watch("gate_up", x)
    x = act_mul(
        torch.cat([F.linear(x, weights["gate"]), F.linear(x, weights["up"])], dim=1), config.activation
    )
    watch("down", x)
    x = F.linear(x, weights["down"])
    if config.sandwich_norm:
        x = rms_norm(x, None, weights["mlp_post_norm"], eps)
    return h + x


def attention_costs(
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    index: int,
    tables: tuple[torch.Tensor, torch.Tensor],
    x: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """What errors in each token's q, k and v cost the output of the attention of layer `index`: float32 [n] by leaf.

    `x`, float32 [n, hidden], is the input of q, k and v in one sequence. A cost is the square of the factor by which an
    error reaches the output, to first order, the mean of all heads. Where token t looks at s with the share A_ts, it
    takes A_ts of an error in v_s, and an error e in their score turns its output o_t by A_ts (v_s - o_t) e. So the
    first token, which all others look at, may count as much as hundreds of them.
    """
    raw = _projected(weights, config, x)
    q, k, v = _ready(weights, config, tables, *raw)
    shares = _shares(q, k, config, config.window_of(index))
    heads, _, dim = q.shape
    # of the columns of o only their lengths are looked at; v then has the size of what it adds to the output
    v = v * weights["o"].square().sum(0).sqrt().view(heads, 1, dim)
    squared = shares.square()
    turned = squared * _distances(shares @ v, v) * (_scale(config) ** 2 / dim)
    costs = (
        (turned * _distances(shares @ k, k)).sum(
            2
        ),  # what a score has in common with all others changes nothing
        (turned * q.square().sum(2, keepdim=True)).sum(1),
        squared.sum(1),
    )
    found = {}
    for leaf, cost, part in zip(STAGES["qkv"], costs, raw, strict=True):
        count = part.shape[1]
        own = cost.unflatten(0, (count, -1))
        own = own.mean(1) if leaf == "v" else own.sum(1)
        if config.qk_norm and leaf != "v":  # errors are stretched as the norm stretches the whole
            ready = (q if leaf == "q" else k).unflatten(0, (count, -1))[:, 0]
            own = own * (
                ready.square().sum(2) / part.transpose(0, 1).float().square().sum(2).clamp(min=1e-12)
            )
        found[leaf] = own.mean(0)
    return found


def _projected(
    weights: Mapping[str, torch.Tensor], config: ModelConfig, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of x [n, hidden], each [n, its heads, head_dim]."""
    q, k, v = (
        F.linear(x, weights[leaf], weights.get(f"{leaf}_bias")).unflatten(1, (-1, config.head_dim))
        for leaf in STAGES["qkv"]
    )
    return q, k, v


def _ready(
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    tables: tuple[torch.Tensor, torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v as attention takes them: normed, turned, a key and a value for each head; float32 [heads, n, dim]."""
    if config.qk_norm:
        q, k = (
            rms_norm(part, None, weights[f"{leaf}_norm"], config.norm_eps)
            for part, leaf in ((q, "q"), (k, "k"))
        )
    q, k, v = (part.transpose(0, 1).float() for part in (turned(q, tables), turned(k, tables), v))
    group = config.num_heads // config.num_kv_heads
    return q, k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)


def turned(heads: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """heads [n, heads, head_dim], rotated by position (rotate-half)."""
    cos, sin = (table[: len(heads), None] for table in tables)
    rotary = 2 * cos.shape[-1]
    a, b = heads[..., :rotary].float().chunk(2, dim=-1)
    rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(heads.dtype)
    return torch.cat([rotated, heads[..., rotary:]], dim=-1)


def _scale(config: ModelConfig) -> float:
    return config.attn_scale if config.attn_scale is not None else config.head_dim**-0.5


def _shares(q: torch.Tensor, k: torch.Tensor, config: ModelConfig, window: int | None) -> torch.Tensor:
    """What share each token takes of each, causal, within one sequence: float32 [heads, n, n], rows add up to 1."""
    scores = (q * _scale(config)) @ k.transpose(1, 2)
    if config.attn_soft_cap is not None:
        scores = config.attn_soft_cap * torch.tanh(scores / config.attn_soft_cap)
    place = torch.arange(q.shape[1], device=q.device)
    seen = place <= place[:, None]
    if window is not None:
        seen &= place > place[:, None] - window
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared distances of a [heads, n, dim] to b [heads, m, dim]: [heads, n, m]."""
    squares = a.square().sum(2).unsqueeze(2) + b.square().sum(2).unsqueeze(1)
    return squares.baddbmm_(a, b.transpose(1, 2), alpha=-2).clamp_(min=0.0)
