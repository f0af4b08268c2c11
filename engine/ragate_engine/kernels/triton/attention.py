"""Paged causal attention: queries of one KV head packed as rows, keys read 64 at a time at absolute positions.

Moves each row's K and V once: 2 context head_dim items per KV head. Plan: one program per (piece of rows, KV head); a
piece is one single token, or up to 16 tokens of a chunk; online softmax (Dao et al. 2022) over steps of 64 positions
from the first that any row sees. A row's sums are made by tl.dot alone (the softmax total too, against ones), whose
order does not depend on the tile, and a step that a row cannot see leaves its state as it was: so its bits are its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ragate_engine.config import BLOCK_SIZE
from ragate_engine.kernels import HeadShape, StepInputs

STEP = 64
PIECE = 16


@triton.jit
def _attention(
    qkv, k_cache, v_cache, out, positions, row_table, tables, pieces, table_width, scale, window, cap,
    H: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr,
    BM: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    kvh = tl.program_id(1)
    if PIECES:
        first_row = tl.load(pieces + piece * 3)
        count = tl.load(pieces + piece * 3 + 1)
    else:
        first_row = piece
        count = 1
    lines = tl.arange(0, BM)
    r = lines // G
    head = kvh * G + lines % G
    real = r < count
    row = first_row + tl.where(real, r, 0)
    position = tl.load(positions + row)
    last = tl.load(positions + first_row + count - 1)
    begin = 0
    if WINDOW:
        begin = tl.maximum(tl.load(positions + first_row) - window + 1, 0) // STEP * STEP
    table = tables + tl.load(row_table + first_row).to(tl.int64) * table_width
    d = tl.arange(0, BD)
    q_at = qkv + row[:, None].to(tl.int64) * ((H + 2 * KVH) * D) + head[:, None] * D + d[None, :]
    q = tl.load(q_at, real[:, None] & (d[None, :] < D), 0.0)
    acc = tl.zeros((BM, BD), tl.float32)
    total = tl.zeros((BM, 16), tl.float32)
    top = tl.full((BM,), -1e30, tl.float32)
    ones = tl.full((STEP, 16), 1.0, q.dtype)
    for start in range(begin, last + 1, STEP):
        keys = start + tl.arange(0, STEP)
        written = keys <= last
        block = tl.load(table + keys // BLOCK, written, 0).to(tl.int64)
        slot = (block * BLOCK + keys % BLOCK) * (KVH * D) + kvh * D
        inside = written[:, None] & (d[None, :] < D)
        k = tl.load(k_cache + slot[:, None] + d[None, :], inside, 0.0)
        v = tl.load(v_cache + slot[:, None] + d[None, :], inside, 0.0)
        scores = tl.dot(q, tl.trans(k).to(q.dtype), input_precision="ieee") * scale
        if CAP:
            scores = cap * (1 - 2 / (1 + tl.exp(2 * scores / cap)))
        seen = keys[None, :] <= position[:, None]
        if WINDOW:
            seen &= keys[None, :] > position[:, None] - window
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weight = tl.exp(scores - new_top[:, None]).to(q.dtype)
        decay = tl.exp(top - new_top)
        total = tl.dot(weight, ones, total * decay[:, None], input_precision="ieee")
        acc = tl.dot(weight, v.to(q.dtype), acc * decay[:, None], input_precision="ieee")
        top = new_top
    y = acc / tl.max(total, 1)[:, None]
    at = out + row[:, None].to(tl.int64) * (H * D) + head[:, None] * D + d[None, :]
    tl.store(at, y.to(out.dtype.element_ty), real[:, None] & (d[None, :] < D))


def attention(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    step: StepInputs,
    shape: HeadShape,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """Causal attention of each row over its own blocks: [M, heads * head_dim]."""
    out = torch.empty(qkv.shape[0], shape.heads * shape.head_dim, dtype=qkv.dtype, device=qkv.device)
    group = shape.heads // shape.kv_heads
    pieces = step.groups[step.single_groups :]
    for count, rows, listed in ((step.singles, 1, False), (pieces.shape[0], PIECE, True)):
        if count == 0:
            continue
        lines = max(16, triton.next_power_of_2(rows * group))
        _attention[(count, shape.kv_heads)](
            qkv, k_cache, v_cache, out, step.positions, step.row_table, step.tables, pieces if listed else step.groups,
            step.tables.shape[1], scale, window or 0, soft_cap or 0.0,
            shape.heads, shape.kv_heads, shape.head_dim, max(16, triton.next_power_of_2(shape.head_dim)), group, rows,
            lines, STEP, BLOCK_SIZE, window is not None, soft_cap is not None, listed,
            num_warps=4 if lines <= 64 else 8, num_stages=2,
        )  # fmt: skip
    return out
