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
    q, k, v = (
        F.linear(x, weights[leaf], weights.get(f"{leaf}_bias")).unflatten(1, (-1, config.head_dim))
        for leaf in STAGES["qkv"]
    )
    if config.qk_norm:
        q, k = (rms_norm(part, None, weights[f"{leaf}_norm"], eps) for part, leaf in ((q, "q"), (k, "k")))
    x = _attention(_turned(q, tables), _turned(k, tables), v, config, config.window_of(index))
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


def _turned(heads: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """heads [n, heads, head_dim], rotated by position (rotate-half)."""
    cos, sin = (table[: len(heads), None] for table in tables)
    rotary = 2 * cos.shape[-1]
    a, b = heads[..., :rotary].float().chunk(2, dim=-1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(heads.dtype)
    return torch.cat([turned, heads[..., rotary:]], dim=-1)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: ModelConfig, window: int | None
) -> torch.Tensor:
    """Causal attention within one sequence, [n, heads, head_dim] each -> [n, heads * head_dim]; float32 inside."""
    group = config.num_heads // config.num_kv_heads
    scale = config.attn_scale if config.attn_scale is not None else config.head_dim**-0.5
    k, v = (part.repeat_interleave(group, dim=1).transpose(0, 1).float() for part in (k, v))
    scores = (q.transpose(0, 1).float() * scale) @ k.transpose(1, 2)
    if config.attn_soft_cap is not None:
        scores = config.attn_soft_cap * torch.tanh(scores / config.attn_soft_cap)
    place = torch.arange(len(q), device=q.device)
    seen = place <= place[:, None]
    if window is not None:
        seen &= place > place[:, None] - window
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1).to(q.dtype)
