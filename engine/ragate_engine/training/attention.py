"""Causal attention of packs: a prefix on itself, each member's own tokens on the prefix and on themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from ragate_engine.training.layout import pad, unpad

if TYPE_CHECKING:
    from ragate_engine.config import ModelConfig
    from ragate_engine.training.layout import Layout


def attention(heads: torch.Tensor, config: ModelConfig, window: int | None, layout: Layout) -> torch.Tensor:
    """heads [M, query + key + value heads, dim], normed and turned -> [M, query heads * dim]."""
    *prefixes, own = heads.split([*layout.prefixes, layout.own])
    shape = heads.shape[1:]
    padded = pad(own.flatten(1), layout).unflatten(1, shape)
    sizes = [bucket.members * bucket.length for bucket in layout.buckets]
    found = [_attend(prefix[None], config, window)[0] for prefix in prefixes if len(prefix)]
    mixed = []
    for bucket, part in zip(layout.buckets, padded.split(sizes), strict=True):
        members = part.unflatten(0, (bucket.members, bucket.length))
        prefix = prefixes[bucket.pack].expand(bucket.members, -1, -1, -1)
        mixed.append(_attend(members, config, window, prefix).flatten(0, 1))
    return torch.cat([*found, unpad(torch.cat(mixed), layout)])


def _attend(
    x: torch.Tensor, config: ModelConfig, window: int | None, before: torch.Tensor | None = None
) -> torch.Tensor:
    """Each of x [B, T, heads, dim] on `before` [B, P, heads, dim] and on itself: [B, T, query heads * dim]."""
    count = config.num_heads
    queries, own = x[:, :, :count], x[:, :, count:]
    seen = own if before is None else torch.cat([before[:, :, count:], own], dim=1)
    # a key and a value for each query head: the kernels that know better differ from version to version
    keys, values = seen.repeat_interleave(count // config.num_kv_heads, dim=2).transpose(1, 2).chunk(2, dim=1)
    y = _product(queries.transpose(1, 2), keys, values, config, window)
    return y.transpose(1, 2).flatten(2)


def _product(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: ModelConfig, window: int | None
) -> torch.Tensor:
    """Attention of the last T of S places on all before them: q [B, heads, T, dim], k and v [B, heads, S, dim]."""
    scale = config.attn_scale if config.attn_scale is not None else config.head_dim**-0.5
    rows, columns = q.shape[2], k.shape[2]
    if config.attn_soft_cap is None and (window is None or window >= columns):
        if rows == columns:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        bias = causal_lower_right(rows, columns)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    place = torch.arange(columns, device=q.device)
    reader = place[columns - rows :, None]
    allowed = place <= reader
    if window is not None:
        allowed &= place > reader - window
    if config.attn_soft_cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)
    scores = (q * scale).float() @ k.float().transpose(2, 3)
    scores = config.attn_soft_cap * torch.tanh(scores / config.attn_soft_cap)
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1).to(v.dtype) @ v
