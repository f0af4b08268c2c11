"""Plain torch kernels for any device: the oracle of the others, and what runs where they cannot.

Every matrix product has one fixed shape (64 rows, 256 keys), padded where rows are fewer, so that the library picks
the same algorithm whatever the batch and a row's bits depend on that row alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ragate_engine.config import BLOCK_SIZE
from ragate_engine.kernels import HeadShape, LayerKV, StepInputs

NAME = "reference-1"
ROWS = 64
QUERY_TOKENS = 16
CHUNK = 256


@dataclass(frozen=True)
class Packed:
    """A linear weight: [out, in], or oneDNN's prepacked form of it on a CPU in float32."""

    weight: torch.Tensor
    out_features: int
    prepacked: bool


def pack_linear(weight: torch.Tensor) -> Packed:
    """Prepare `weight` [out, in] in its compute dtype."""
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        return Packed(packed, weight.shape[0], True)
    return Packed(weight.contiguous(), weight.shape[0], False)


def linear(
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None,
    wide: bool = False,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [M, out] = x [M, in] W^T + bias, in tiles of exactly 64 rows; in float32 when `wide`, else in x's dtype."""
    height = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -height % ROWS))
    tiles = []
    for tile in padded.split(ROWS):
        if packed.prepacked:
            y = torch.ops.mkldnn._linear_pointwise(tile.contiguous(), packed.weight, None, "none", [], "")
        else:
            y = F.linear(tile.float(), packed.weight.float()) if wide else F.linear(tile, packed.weight)
        tiles.append(y)
    y = torch.cat(tiles)[:height] if len(tiles) > 1 else tiles[0][:height]
    return y if bias is None else y + bias


def pack_gated(gate: torch.Tensor, up: torch.Tensor) -> Packed:
    """Prepare the gate and up weights [out, in] of an MLP."""
    return pack_linear(torch.cat([gate, up]))


def gated(x: torch.Tensor, packed: Packed, activation: str, rows: torch.Tensor | None = None) -> torch.Tensor:
    """act(x gate^T) * (x up^T): [M, in] -> [M, out]."""
    return act_mul(linear(x, packed, None), activation)


def embed(ids: torch.Tensor, table: torch.Tensor, scale: float, step: StepInputs) -> torch.Tensor:
    """ids [M] -> rows of `table` [vocab, hidden] times `scale`, fresh storage; id -1 - i is `step.sampled[i]`."""
    if step.sampled is not None:
        ids = torch.where(ids < 0, step.sampled[(-1 - ids).clamp(min=0)].to(ids.dtype), ids)
    return table[ids.clamp(min=0)] * scale


def rms_norm(
    h: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """h [M, D] += x [M, D] unless None; returns h / rms(h) * weight (Zhang & Sennrich 2019), float32 inside."""
    if x is not None:
        h += x
    wide = h.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(h.dtype)


def last_norm(
    h: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, step: StepInputs
) -> torch.Tensor:
    """`rms_norm` of h + x for the rows whose logits are wanted: [W, hidden]."""
    wanted = step.wanted.long()
    return rms_norm(h[wanted], x[wanted], weight, eps)


def make_kv(blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> LayerKV:
    """K and V of one layer, each [blocks, kv_heads, 16, head_dim]; with scales of 1 where they are 8-bit floats."""
    shape = (blocks, kv_heads, BLOCK_SIZE, head_dim)
    k, v = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
    if dtype.itemsize > 1:
        return LayerKV(k, v)
    ones = torch.ones(kv_heads, dtype=torch.float32, device=device)
    return LayerKV(k, v, ones, ones.clone())


def rope_write_kv(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    step: StepInputs,
    kv: LayerKV,
    shape: HeadShape,
) -> None:
    """qkv [M, (heads + 2 kv_heads) head_dim]: norm and rotate q and k in place (rotate-half), write k, v to slots.

    cos and sin are float32 [positions, rotary_dim / 2].
    """
    heads = qkv.view(qkv.shape[0], shape.heads + 2 * shape.kv_heads, shape.head_dim)
    q, k, v = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    c, s = cos[step.positions.long(), None], sin[step.positions.long(), None]
    for part, norm in ((q, q_norm), (k, k_norm)):
        x = part if norm is None else rms_norm(part, None, norm, eps)
        a, b = x[..., : shape.rotary_dim].float().chunk(2, dim=-1)
        turned = torch.cat([a * c - b * s, b * c + a * s], dim=-1).to(qkv.dtype)
        part.copy_(torch.cat([turned, x[..., shape.rotary_dim :]], dim=-1))
    real = step.slots >= 0
    slots = step.slots[real].long()
    for cache, scale, fresh in ((kv.k, kv.k_scale, k), (kv.v, kv.v_scale, v)):
        if scale is not None:
            limit = torch.finfo(cache.dtype).max
            fresh = (fresh.float() / scale[:, None]).clamp(-limit, limit)
        cache[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE] = fresh[real].to(cache.dtype)


def plan_attention(
    starts: npt.NDArray[np.int32], counts: npt.NDArray[np.int32], tables: npt.NDArray[np.int32]
) -> None:
    """Nothing to plan: rows are taken in their order."""


def attention(
    qkv: torch.Tensor,
    kv: LayerKV,
    step: StepInputs,
    shape: HeadShape,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """Causal attention of each row over its own blocks: [M, heads * head_dim].

    KV is read in chunks of 256 positions at absolute places; partial results (acc, max, sum) are merged in chunk
    order (Dao et al. 2022, online softmax), 16 query tokens of one request at a time.
    """
    group = shape.heads // shape.kv_heads
    q_all = qkv.view(qkv.shape[0], -1, shape.head_dim)[:, : shape.heads]
    out = torch.empty(qkv.shape[0], shape.heads, shape.head_dim, dtype=qkv.dtype, device=qkv.device)
    row_table = step.row_table.tolist()
    start = 0
    while start < len(row_table):
        stop = start
        while stop < len(row_table) and row_table[stop] == row_table[start] and stop - start < QUERY_TOKENS:
            stop += 1
        n = stop - start
        positions = F.pad(step.positions[start:stop].long(), (0, QUERY_TOKENS - n))
        q = F.pad(q_all[start:stop], (0, 0, 0, 0, 0, QUERY_TOKENS - n)).float() * scale
        q = q.view(QUERY_TOKENS, shape.kv_heads, group, shape.head_dim).permute(1, 2, 0, 3).flatten(1, 2)
        table = step.tables[row_table[start]].long()
        acc = torch.zeros(*q.shape, dtype=q.dtype, device=q.device)
        top = torch.full((*q.shape[:2], 1), -1e30, dtype=q.dtype, device=q.device)
        total = torch.zeros(*q.shape[:2], 1, dtype=q.dtype, device=q.device)
        for first in range(0, int(positions.max()) + 1, CHUNK):
            blocks = table[first // BLOCK_SIZE : (first + CHUNK) // BLOCK_SIZE]
            blocks = F.pad(blocks, (0, CHUNK // BLOCK_SIZE - len(blocks)))
            keys = torch.arange(first, first + CHUNK, device=q.device)
            k = kv.k[blocks].float().permute(1, 3, 0, 2).flatten(2)
            v = kv.v[blocks].float().transpose(0, 1).flatten(1, 2)
            if kv.k_scale is not None and kv.v_scale is not None:
                k, v = k * kv.k_scale[:, None, None], v * kv.v_scale[:, None, None]
            v = v.masked_fill((keys > positions.max())[:, None], 0.0)  # unwritten slots may hold anything
            scores = torch.matmul(q, k)
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            seen = keys <= positions[:, None]
            if window is not None:
                seen &= keys > positions[:, None] - window
            seen = seen.repeat(group, 1)
            scores = scores.masked_fill(~seen, float("-inf"))
            new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
            weight = torch.exp(scores - new_top)
            decay = torch.exp(top - new_top)
            total = total * decay + weight.sum(-1, keepdim=True)
            acc = acc * decay + torch.matmul(weight, v)
            top = new_top
        y = (acc / total).view(shape.kv_heads, group, QUERY_TOKENS, shape.head_dim).permute(2, 0, 1, 3)
        out[start:stop] = y.flatten(1, 2)[:n].to(out.dtype)
        start = stop
    return out.flatten(1)


def act_mul(
    x: torch.Tensor,
    activation: str,
    dtype: torch.dtype | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [M, 2F] is gate | up; returns act(gate) * up [M, F] in `dtype` (x's where it is `None`), float32 inside."""
    gate, up = x.float().chunk(2, dim=-1)
    acted = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return (acted * up).to(dtype or x.dtype)


def _masked(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits with -inf where the bit mask forbids the token."""
    bits = (mask.unsqueeze(-1) >> torch.arange(32, device=mask.device, dtype=torch.int32)) & 1
    return logits.masked_fill(~bits.flatten(1)[:, : logits.shape[1]].bool(), float("-inf"))


def pick(logits: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [M, V] float32, mask [M, ceil(V / 32)] int32 bits: (ids [M], log-sum-exp over all tokens [M])."""
    masked = _masked(logits, mask)
    best = masked.amax(-1, keepdim=True)
    ids = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
    first = ids.masked_fill(masked != best, logits.shape[1]).amin(-1)
    first = torch.where(best.squeeze(-1) == float("-inf"), torch.full_like(first, -1), first)
    return first, torch.logsumexp(logits, -1)


def likeliest(logits: torch.Tensor, mask: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` likeliest allowed tokens, best first: ids (-1 where fewer) and logits, [M, count] each."""
    # a stable sort, not topk, which chooses freely among equals at the cut
    values, ids = _masked(logits, mask).sort(dim=-1, descending=True, stable=True)
    values, ids = values[:, :count], ids[:, :count]
    return ids.masked_fill(values == float("-inf"), -1), values
