"""The kernels that walk one row (or one head) per program: norm, rope with KV write, gated activation, pick.

Each moves its row in and out once. Block shapes depend on the model alone, never on the number of rows, so the order
of every sum is fixed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ragate_engine.kernels import HeadShape, StepInputs


@triton.jit
def _rms_norm(h, x, weight, y, D, eps, BD: tl.constexpr, ADD: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BD)
    inside = d < D
    value = tl.load(h + at + d, inside, 0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(x + at + d, inside, 0.0).to(tl.float32)).to(
            h.dtype.element_ty
        )
        tl.store(h + at + d, value, inside)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / D + eps)
    w = tl.load(weight + d, inside, 0.0).to(tl.float32)
    tl.store(y + at + d, (wide * scale * w).to(y.dtype.element_ty), inside)


def rms_norm(h: torch.Tensor, x: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """h [M, D] += x [M, D] unless None; returns h / rms(h) * weight."""
    y = torch.empty_like(h)
    width = h.shape[1]
    _rms_norm[(h.shape[0],)](
        h,
        x if x is not None else h,
        weight,
        y,
        width,
        eps,
        triton.next_power_of_2(width),
        x is not None,
        num_warps=4,
    )
    return y


@triton.jit
def _rope_write_kv(
    qkv, q_norm, k_norm, cos, sin, positions, slots, k_cache, v_cache, eps,
    H: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0)
    head = tl.program_id(1)
    row = qkv + (m.to(tl.int64) * (H + 2 * KVH) + head) * D
    to = tl.load(slots + m).to(tl.int64) * (KVH * D)
    d = tl.arange(0, BD)
    if head >= H + KVH:
        tl.store(
            v_cache + to + (head - H - KVH) * D + d,
            tl.load(row + d, d < D, 0.0).to(v_cache.dtype.element_ty),
            d < D,
        )
    else:
        # each thread reads and writes the same places, so turning in place is safe
        e = tl.arange(0, BH)
        turned = e < HALF
        rest = (d >= 2 * HALF) & (d < D)
        a = tl.load(row + e, turned, 0.0).to(tl.float32)
        b = tl.load(row + HALF + e, turned, 0.0).to(tl.float32)
        r = tl.load(row + d, rest, 0.0).to(tl.float32)
        if NORM:
            norm = q_norm if head < H else k_norm
            scale = 1.0 / tl.sqrt((tl.sum(a * a + b * b, 0) + tl.sum(r * r, 0)) / D + eps)
            a = (
                (a * scale * tl.load(norm + e, turned, 0.0).to(tl.float32))
                .to(qkv.dtype.element_ty)
                .to(tl.float32)
            )
            b = (
                (b * scale * tl.load(norm + HALF + e, turned, 0.0).to(tl.float32))
                .to(qkv.dtype.element_ty)
                .to(tl.float32)
            )
            r = r * scale * tl.load(norm + d, rest, 0.0).to(tl.float32)
        place = tl.load(positions + m).to(tl.int64) * HALF
        c = tl.load(cos + place + e, turned, 0.0)
        s = tl.load(sin + place + e, turned, 0.0)
        x = (a * c - b * s).to(qkv.dtype.element_ty)
        y = (b * c + a * s).to(qkv.dtype.element_ty)
        z = r.to(qkv.dtype.element_ty)
        if head < H:
            tl.store(row + e, x, turned)
            tl.store(row + HALF + e, y, turned)
            tl.store(row + d, z, rest)
        else:
            k = k_cache + to + (head - H) * D
            tl.store(k + e, x.to(k_cache.dtype.element_ty), turned)
            tl.store(k + HALF + e, y.to(k_cache.dtype.element_ty), turned)
            tl.store(k + d, z.to(k_cache.dtype.element_ty), rest)


def rope_write_kv(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    step: StepInputs,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    shape: HeadShape,
) -> None:
    """Norm and rotate q in place, write the normed and rotated k, and v, to their slots."""
    half = shape.rotary_dim // 2
    _rope_write_kv[(qkv.shape[0], shape.heads + 2 * shape.kv_heads)](
        qkv, q_norm if q_norm is not None else qkv, k_norm if k_norm is not None else qkv, cos, sin, step.positions,
        step.slots, k_cache, v_cache, eps, shape.heads, shape.kv_heads, shape.head_dim, half,
        triton.next_power_of_2(half), triton.next_power_of_2(shape.head_dim), q_norm is not None, num_warps=1,
    )  # fmt: skip


@triton.jit
def _act_mul(x, y, F, BF: tl.constexpr, GELU: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    g = tl.load(x + m * 2 * F + f, f < F, 0.0).to(tl.float32)
    u = tl.load(x + m * 2 * F + F + f, f < F, 0.0).to(tl.float32)
    z = g
    if GELU:
        z = (g + 0.044715 * g * g * g) * 1.5957691216057308
    tl.store(y + m * F + f, (g / (1.0 + tl.exp(-z)) * u).to(y.dtype.element_ty), f < F)


def act_mul(x: torch.Tensor, activation: str) -> torch.Tensor:
    """x [M, 2F] is gate | up; returns act(gate) * up [M, F]."""
    width = x.shape[1] // 2
    y = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    _act_mul[(x.shape[0], triton.cdiv(width, 1024))](x, y, width, 1024, activation != "silu", num_warps=4)
    return y


@triton.jit
def _pick(logits, mask, ids, lse, V, words, BV: tl.constexpr):
    m = tl.program_id(0)
    row = logits + m.to(tl.int64) * V
    lanes = tl.arange(0, BV)
    best = tl.full((BV,), float("-inf"), tl.float32)
    at = tl.full((BV,), 2147483647, tl.int32)
    top = tl.full((BV,), float("-inf"), tl.float32)
    total = tl.zeros((BV,), tl.float32)
    for start in range(0, V, BV):
        i = start + lanes
        x = tl.load(row + i, i < V, float("-inf")).to(tl.float32)
        bits = tl.load(mask + m.to(tl.int64) * words + i // 32, i < V, 0)
        better = (((bits >> (i % 32)) & 1) == 1) & (x > best)
        best = tl.where(better, x, best)
        at = tl.where(better, i, at)
        new_top = tl.maximum(top, x)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.exp(x - shift)
        top = new_top
    highest = tl.max(best, 0)
    first = tl.min(tl.where(best == highest, at, 2147483647), 0)
    tl.store(ids + m, tl.where(first == 2147483647, -1, first))
    peak = tl.max(top, 0)
    tl.store(lse + m, peak + tl.log(tl.sum(total * tl.exp(top - peak), 0)))


def pick(logits: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [M, V] float32, mask [M, ceil(V / 32)] int32 bits: (ids [M], log-sum-exp over all tokens [M])."""
    rows, vocabulary = logits.shape
    ids = torch.empty(rows, dtype=torch.int32, device=logits.device)
    lse = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _pick[(rows,)](logits, mask, ids, lse, vocabulary, mask.shape[1], 1024, num_warps=8)
    return ids, lse
