"""QK norm, rotary embedding and the write of K and V to their slots, in one pass over a row of qkv.

Shapes: qkv [M, (heads + 2 kv_heads) head_dim]; a cache [blocks, kv_heads, 16, head_dim]. Moves qkv in once, q and the
K and V slots out once. Plan: one program per (row, up to 16 heads); a head is two halves of a tile, so that turning
needs no exchange; q goes back where it was read, k and v to the row's slot, divided by their head's scale where the
cache holds 8 bits. The tile follows the model alone, so the norm's sums have one order whatever the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ragate_engine.config import BLOCK_SIZE
from ragate_engine.kernels import HeadShape, LayerKV, StepInputs
from ragate_engine.kernels.triton import device

TILE = 1024
"""Items of half a head that a program holds."""


@triton.jit
def _to_cache(x, scale, limit, cache):
    """`x` as the cache holds it: divided by its head's scale and clamped where that is 8 bits wide."""
    if cache.dtype.element_ty.primitive_bitwidth == 8:
        x = tl.minimum(tl.maximum(tl.div_rn(x.to(tl.float32), scale), -limit), limit)
    return x.to(cache.dtype.element_ty)


@triton.jit
def _rope_write_kv(
    qkv, q_norm, k_norm, cos, sin, positions, slots, rows, k_cache, v_cache, k_scale, v_scale, eps, limit,
    H: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, SLOTS: tl.constexpr, NORM: tl.constexpr,
    SCALED: tl.constexpr, COUNTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    m = tl.program_id(0)
    if COUNTED:
        if m >= tl.load(rows):
            return
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_q = head < H
    is_k = (head >= H) & (head < H + KVH)
    is_v = (head >= H + KVH) & (head < H + 2 * KVH)
    real = head < H + 2 * KVH
    dtype = qkv.dtype.element_ty
    slot = tl.load(slots + m)
    k_head = head - H
    v_head = head - H - KVH
    k_at = (slot // SLOTS).to(tl.int64) * (KVH * SLOTS * D) + (k_head * SLOTS + slot % SLOTS) * D
    v_at = (slot // SLOTS).to(tl.int64) * (KVH * SLOTS * D) + (v_head * SLOTS + slot % SLOTS) * D
    k_there = is_k & (slot >= 0)
    v_there = is_v & (slot >= 0)
    k_by = tl.full((HEADS,), 1.0, tl.float32)
    v_by = tl.full((HEADS,), 1.0, tl.float32)
    if SCALED:
        k_by = tl.load(k_scale + k_head, is_k, 1.0)
        v_by = tl.load(v_scale + v_head, is_v, 1.0)

    row = qkv + m.to(tl.int64) * ((H + 2 * KVH) * D)
    e = tl.arange(0, BLOCK_HALF)
    turned = real[:, None] & (e < HALF)[None, :]
    a_at = head[:, None] * D + e[None, :]
    a_raw = tl.load(row + a_at, turned, 0.0)
    b_raw = tl.load(row + a_at + HALF, turned, 0.0)
    a = a_raw.to(tl.float32)
    b = b_raw.to(tl.float32)
    if NORM:
        squares = tl.sum(a * a + b * b, 1)
        if BLOCK_REST > 0:
            f = 2 * HALF + tl.arange(0, BLOCK_REST)
            r = tl.load(row + head[:, None] * D + f[None, :], real[:, None] & (f < D)[None, :], 0.0)
            squares += tl.sum(r.to(tl.float32) * r.to(tl.float32), 1)
        scale = (1.0 / tl.sqrt(squares / D + eps))[:, None]
        which = is_q[:, None]
        a_weight = tl.where(
            which, tl.load(q_norm + e, e < HALF, 0.0)[None, :], tl.load(k_norm + e, e < HALF, 0.0)[None, :]
        )
        b_weight = tl.where(
            which,
            tl.load(q_norm + HALF + e, e < HALF, 0.0)[None, :],
            tl.load(k_norm + HALF + e, e < HALF, 0.0)[None, :],
        )
        a = (a * scale * a_weight.to(tl.float32)).to(dtype).to(tl.float32)
        b = (b * scale * b_weight.to(tl.float32)).to(dtype).to(tl.float32)
    place = tl.load(positions + m).to(tl.int64) * HALF
    c = tl.load(cos + place + e, e < HALF, 0.0)[None, :]
    s = tl.load(sin + place + e, e < HALF, 0.0)[None, :]
    x = (a * c - b * s).to(dtype)
    y = (b * c + a * s).to(dtype)
    # each thread reads and writes the same places, so turning in place is safe
    inside = (e < HALF)[None, :]
    tl.store(row + a_at, x, is_q[:, None] & inside)
    tl.store(row + a_at + HALF, y, is_q[:, None] & inside)
    to = k_cache + k_at[:, None] + e[None, :]
    tl.store(to, _to_cache(x, k_by[:, None], limit, k_cache), k_there[:, None] & inside)
    tl.store(to + HALF, _to_cache(y, k_by[:, None], limit, k_cache), k_there[:, None] & inside)
    to = v_cache + v_at[:, None] + e[None, :]
    tl.store(to, _to_cache(a_raw, v_by[:, None], limit, v_cache), v_there[:, None] & inside)
    tl.store(to + HALF, _to_cache(b_raw, v_by[:, None], limit, v_cache), v_there[:, None] & inside)
    if BLOCK_REST > 0:
        # the part of a head that partial rotary embedding leaves unturned
        f = 2 * HALF + tl.arange(0, BLOCK_REST)
        inside = (f < D)[None, :]
        r_at = head[:, None] * D + f[None, :]
        r_raw = tl.load(row + r_at, real[:, None] & inside, 0.0)
        r = r_raw
        if NORM:
            weight = tl.where(
                which, tl.load(q_norm + f, f < D, 0.0)[None, :], tl.load(k_norm + f, f < D, 0.0)[None, :]
            )
            r = (r_raw.to(tl.float32) * scale * weight.to(tl.float32)).to(dtype)
        tl.store(row + r_at, r, is_q[:, None] & inside)
        to = k_cache + k_at[:, None] + f[None, :]
        tl.store(to, _to_cache(r, k_by[:, None], limit, k_cache), k_there[:, None] & inside)
        to = v_cache + v_at[:, None] + f[None, :]
        tl.store(to, _to_cache(r_raw, v_by[:, None], limit, v_cache), v_there[:, None] & inside)


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
    """Norm and rotate q in place (rotate-half), write the normed and rotated k, and v, to their slots.

    `qkv` [M, (heads + 2 kv_heads) head_dim]; `cos` and `sin` float32 [positions, rotary_dim / 2]; norms [head_dim] or
    both `None`. The k part of `qkv` is left as it was. Rows with slot -1 write no k and v; those beyond `step.rows`
    nothing at all.
    """
    half = shape.rotary_dim // 2
    heads = shape.heads + 2 * shape.kv_heads
    block_half = triton.next_power_of_2(half)
    rest = shape.head_dim - 2 * half
    per_program = min(triton.next_power_of_2(heads), max(1, TILE // block_half))
    _rope_write_kv[(qkv.shape[0], triton.cdiv(heads, per_program))](
        qkv, q_norm if q_norm is not None else qkv, k_norm if k_norm is not None else qkv, cos, sin, step.positions,
        step.slots, step.rows if step.rows is not None else step.positions, kv.k, kv.v,
        kv.k_scale if kv.k_scale is not None else cos, kv.v_scale if kv.v_scale is not None else cos, eps,
        torch.finfo(kv.k.dtype).max, shape.heads, shape.kv_heads, shape.head_dim, half, per_program,
        block_half, triton.next_power_of_2(rest) if rest else 0, BLOCK_SIZE, q_norm is not None,
        kv.k_scale is not None, step.rows is not None, device.PDL, num_warps=max(1, per_program * block_half // 256),
        **device.launch(),
    )  # fmt: skip
