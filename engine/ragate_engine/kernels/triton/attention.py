"""Paged causal attention: one kernel family for one new token or many, whatever the plan groups or splits.

Shapes: qkv [M, (heads + 2 kv_heads) head_dim]; a cache [blocks, kv_heads, 16, head_dim]; out [M, heads head_dim].
Moves at least each item's K and V once, 2 keys head_dim items per KV head, and does 4 head_dim operations a query head
and key. Plan: a fixed grid of programs walks the (item, KV head) pairs that the plan buffer lists; an item's query
heads are the lines of one tile; keys come 64 at a time at absolute positions; every 256 keys (a chunk) the online
softmax (Dao et al. 2022) starts afresh and the chunk's state is folded into that of the chunks before it, in the
kernel, or by `_merge` from partials with the same operations. A line's sums are made by tl.dot alone (the softmax total
too, against ones), whose order does not depend on the tile; keys that a line cannot see leave its state as it was.
So a row's bits are its own, and fusing multiplications with additions is not left to the compiler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ragate_engine.config import BLOCK_SIZE
from ragate_engine.kernels import HeadShape, LayerKV, StepInputs
from ragate_engine.kernels.triton import device
from ragate_engine.kernels.triton import plan as layout

STEP = 64
"""Keys of one step: part of what fixes the bits."""
MERGE_HEADS = 8

_ITEM = tl.constexpr(layout.ITEM)
_ROWS = tl.constexpr(layout.ROWS)
_TABLES_AT = tl.constexpr(layout.TABLES_AT)
_WIDTH = tl.constexpr(layout.WIDTH)
_FIRST_ROW = tl.constexpr(layout.FIRST_ROW)
_ROW_COUNT = tl.constexpr(layout.ROW_COUNT)
_FIRST_CHUNK = tl.constexpr(layout.FIRST_CHUNK)
_TABLE = tl.constexpr(layout.TABLE)
_LEAST = tl.constexpr(layout.LEAST)
_LAST = tl.constexpr(layout.LAST)
_PART = tl.constexpr(layout.PART)
_NOTHING = tl.constexpr(-1e30)


def make_kv(blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> LayerKV:
    """K and V of one layer, each [blocks, kv_heads, 16, head_dim], unwritten; with scales of 1 where they are 8-bit."""
    k, v = (torch.empty(blocks, kv_heads, BLOCK_SIZE, head_dim, dtype=dtype, device=device) for _ in range(2))
    if dtype.itemsize > 1:
        return LayerKV(k, v)
    ones = torch.ones(kv_heads, dtype=torch.float32, device=device)
    return LayerKV(k, v, ones, ones.clone())


@dataclass(frozen=True)
class Work:
    """A step's attention plan on the device, and which kernels it needs."""

    plan: torch.Tensor
    """int32, the plan buffer: its header says where items and tables are (`plan.pack`)."""
    part_of: torch.Tensor
    """[M] int32, `AttentionPlan.part_of`."""
    partials: torch.Tensor
    """float32 [max_parts * heads * (head_dim + 2)], scratch that all layers share: each row's partial sums, then the
    totals of their weights, then what the weights are relative to."""
    has_small: bool
    has_big: bool
    has_parts: bool


class Tile(NamedTuple):
    """How one instance of the kernel runs; none of it may change a bit."""

    lines: int
    warps: int
    stages: int
    per_multiprocessor: int
    registers: int | None = None


def tile_for(lines: int, shape: HeadShape, dtype: torch.dtype, cache: torch.dtype, rows: int) -> Tile:
    """The tile for items of at most `lines` lines (16 or 128) in a step of up to `rows` rows."""
    if dtype == torch.float32:
        return Tile(16, 4, 2, 2)
    wide = shape.head_dim > 128
    if cache.itemsize == 1:
        # 8-bit keys are widened in registers, in an order of their own for each kind of tile: one tile for all
        return Tile(64, 8, 2, 1) if wide else Tile(64, 4, 2, 2)
    if lines == layout.SMALL_LINES:
        if wide:
            return Tile(16, 4, 3, 1)
        return Tile(16, 4, 3, 3, 168) if shape.head_dim > 64 else Tile(16, 4, 3, 8)
    if wide:
        return Tile(64, 8, 2, 1)
    if shape.head_dim <= 64:
        return Tile(64, 4, 3, 2)
    # long runs want large tiles; shared chunks and forced tokens are many small items
    return Tile(128, 8, 3, 2) if rows >= 1024 else Tile(64, 4, 2, 2)


@triton.jit
def _fold(acc, total, top, more, more_total, more_top):
    """The state of some chunks, and that of the next: together."""
    peak = tl.maximum(top, more_top)
    keep = tl.exp2(top - peak)
    add = tl.exp2(more_top - peak)
    acc = tl.fma(acc, tl.broadcast_to(keep[:, None], acc.shape), more * add[:, None])
    return acc, tl.fma(total, keep, more_total * add), peak


@triton.jit
def _result(acc, total, v_by):
    """The weighted mean of the values."""
    return acc * (v_by / total)[:, None]


@triton.jit(do_not_specialize=["room", "window"])
def _attention(
    qkv, k_cache, v_cache, k_scale, v_scale, out, partials, plan, positions, part_of, room,
    scale, window, cap,
    AT: tl.constexpr, H: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    G: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr, LINES: tl.constexpr,
    TILES: tl.constexpr, STAGES: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, SCALED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    TOKENS: tl.constexpr = LINES // G
    items = plan + tl.load(plan + AT)
    units = tl.load(plan + AT + 1) * (KVH * TILES)
    tables = plan + tl.load(plan + _TABLES_AT)
    width = tl.load(plan + _WIDTH)
    lines = tl.arange(0, LINES)
    r = lines // G
    d = tl.arange(0, BLOCK_D)
    offsets = tl.arange(0, STEP)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        item = items + unit // (KVH * TILES) * _ITEM
        kvh = unit % KVH
        skip = unit // KVH % TILES * TOKENS
        first_row = tl.load(item + _FIRST_ROW) + skip
        count = tl.minimum(tl.load(item + _ROW_COUNT) - skip, TOKENS)
        first_chunk = tl.load(item + _FIRST_CHUNK)
        table = tables + tl.load(item + _TABLE) * width
        least = tl.load(item + _LEAST)
        last = tl.load(item + _LAST)
        in_parts = tl.load(item + _PART) >= 0
        begin = first_chunk * (CHUNK // STEP)
        if WINDOW:
            begin = tl.maximum(begin, tl.maximum(least - window + 1, 0) // STEP)
        end = tl.where(count > 0, last // STEP + 1, begin)
        # block ids are read one step ahead, so that the loads of K and V can be issued at once
        keys = begin * STEP + offsets
        block = tl.load(table + keys // SLOTS, keys <= last, 0)
        row = first_row + tl.where(r < count, r, 0)
        head = kvh * G + lines % G
        position = tl.load(positions + row)
        inside = (r < count)[:, None] & (d < D)[None, :]
        by = scale
        v_by = 1.0
        if PDL:
            tl.extra.cuda.gdc_wait()
        if SCALED:
            by = scale * tl.load(k_scale + kvh)
            v_by = tl.load(v_scale + kvh)
        q_at = row[:, None].to(tl.int64) * ((H + 2 * KVH) * D) + head[:, None] * D + d[None, :]
        q = tl.load(qkv + q_at, inside, 0.0)
        ones = tl.full((STEP, 16), 1.0, q.dtype)
        acc = tl.zeros((LINES, BLOCK_D), tl.float32)
        total = tl.zeros((LINES, 16), tl.float32)
        top = tl.full((LINES,), _NOTHING, tl.float32)
        all_acc = tl.zeros((LINES, BLOCK_D), tl.float32)
        all_total = tl.zeros((LINES,), tl.float32)
        all_top = tl.full((LINES,), _NOTHING, tl.float32)
        for step in tl.range(begin, end, num_stages=STAGES):
            # at the head of the loop: at its tail the dots would run one after the other
            if (step % (CHUNK // STEP) == 0) & (step > begin):
                all_acc, all_total, all_top = _fold(all_acc, all_total, all_top, acc, tl.max(total, 1), top)
                acc = tl.zeros((LINES, BLOCK_D), tl.float32)
                total = tl.zeros((LINES, 16), tl.float32)
                top = tl.full((LINES,), _NOTHING, tl.float32)
            keys = step * STEP + offsets
            place = ((block * KVH + kvh) * SLOTS + keys % SLOTS).to(tl.int64) * D
            block = tl.load(table + (keys + STEP) // SLOTS, keys + STEP <= last, 0)
            there = (keys <= last)[:, None]
            if BLOCK_D > D:
                there = there & (d < D)[None, :]
            # unwritten slots may hold anything: zeros in their place
            k = tl.load(k_cache + place[:, None] + d[None, :], there, 0.0).to(q.dtype)
            v = tl.load(v_cache + place[:, None] + d[None, :], there, 0.0).to(q.dtype)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if CAP:
                # cap tanh(x / cap), as a power of two
                scores = cap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * by)))
            if WINDOW:
                seen = (keys[None, :] <= position[:, None]) & (keys[None, :] > position[:, None] - window)
                scores = tl.where(seen, scores, float("-inf"))
            elif step * STEP + (STEP - 1) > least:
                scores = tl.where(keys[None, :] <= position[:, None], scores, float("-inf"))
            if CAP:
                new_top = tl.maximum(top, tl.max(scores, 1))
                weight = tl.exp2(scores - new_top[:, None])
            else:
                new_top = tl.maximum(top, tl.max(scores, 1) * by)
                shift = tl.broadcast_to(-new_top[:, None], scores.shape)
                weight = tl.exp2(tl.fma(scores, tl.broadcast_to(by, scores.shape), shift))
            decay = tl.exp2(top - new_top)
            top = new_top
            weight = weight.to(q.dtype)
            total = total * decay[:, None]
            acc = acc * decay[:, None]
            total = tl.dot(weight, ones, total, input_precision="ieee")
            acc = tl.dot(weight, v, acc, input_precision="ieee")
        all_acc, all_total, all_top = _fold(all_acc, all_total, all_top, acc, tl.max(total, 1), top)
        if in_parts:
            part = tl.load(part_of + row) + first_chunk
            at = part.to(tl.int64) * H + head
            totals = partials + room * (H * D)
            tl.store(partials + at[:, None] * D + d[None, :], all_acc, inside)
            tl.store(totals + at, all_total, r < count)
            tl.store(totals + room * H + at, all_top, r < count)
        else:
            y = _result(all_acc, all_total, v_by)
            y_at = row[:, None].to(tl.int64) * (H * D) + head[:, None] * D + d[None, :]
            tl.store(out + y_at, y.to(out.dtype.element_ty), inside)
    if PDL:
        # a program without items must wait too: what comes next counts on all that came before
        tl.extra.cuda.gdc_wait()


@triton.jit(do_not_specialize=["room", "window"])
def _merge(
    partials, v_scale, out, plan, positions, part_of, room, window,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, G: tl.constexpr, CHUNK: tl.constexpr,
    HEADS: tl.constexpr, WINDOW: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    if row >= tl.load(plan + _ROWS):
        return
    part = tl.load(part_of + row)
    if part < 0:
        return
    position = tl.load(positions + row)
    first = 0
    if WINDOW:
        first = tl.maximum(position - window + 1, 0) // CHUNK
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK_D)
    inside = (head < H)[:, None] & (d < D)[None, :]
    v_by = tl.full((HEADS,), 1.0, tl.float32)
    if SCALED:
        v_by = tl.load(v_scale + head // G, head < H, 1.0)
    totals = partials + room * (H * D)
    acc = tl.zeros((HEADS, BLOCK_D), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    top = tl.full((HEADS,), _NOTHING, tl.float32)
    for chunk in tl.range(first, position // CHUNK + 1, num_stages=3):
        at = (part + chunk).to(tl.int64) * H + head
        more = tl.load(partials + at[:, None] * D + d[None, :], inside, 0.0)
        more_total = tl.load(totals + at, head < H, 0.0)
        more_top = tl.load(totals + room * H + at, head < H, 0.0)
        acc, total, top = _fold(acc, total, top, more, more_total, more_top)
    at = row.to(tl.int64) * (H * D) + head[:, None] * D + d[None, :]
    tl.store(out + at, _result(acc, total, v_by).to(out.dtype.element_ty), inside)


def attention(
    qkv: torch.Tensor,
    kv: LayerKV,
    step: StepInputs,
    shape: HeadShape,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """Causal attention of each row over its own blocks: [M, heads * head_dim]. `step.work` is a `Work`.

    `scale` (positive) multiplies q.k; `window` is the keys a row sees, its own included; `soft_cap` bounds scores by
    cap * tanh(score / cap). Rows beyond the plan's are left unwritten.
    """
    work: Work = step.work
    rows = qkv.shape[0]
    out = torch.empty(rows, shape.heads * shape.head_dim, dtype=qkv.dtype, device=qkv.device)
    group = shape.heads // shape.kv_heads
    block_d = max(16, triton.next_power_of_2(shape.head_dim))
    scaled = kv.k_scale is not None
    k_scale = kv.k_scale if kv.k_scale is not None else work.partials
    v_scale = kv.v_scale if kv.v_scale is not None else work.partials
    room = work.partials.numel() // (shape.heads * (shape.head_dim + 2))
    log2e = math.log2(math.e)
    # weights are powers of two: exp(x) = 2^(x log2 e); for the cap, tanh(x / c) = 1 - 2 / (1 + 2^(x 2 log2 e / c))
    by = scale * log2e if soft_cap is None else scale * 2 * log2e / soft_cap
    for wanted, lines, at in (
        (work.has_big, layout.BIG_LINES, layout.BIG_AT),
        (work.has_small, layout.SMALL_LINES, layout.SMALL_AT),
    ):
        if not wanted:
            continue
        tile = tile_for(lines, shape, qkv.dtype, kv.k.dtype, rows)
        tiles = triton.cdiv(lines // group, tile.lines // group)
        limit = {"maxnreg": tile.registers} if tile.registers else {}
        _attention[(device.programs() * tile.per_multiprocessor,)](
            qkv, kv.k, kv.v, k_scale, v_scale, out, work.partials, work.plan, step.positions, work.part_of, room,
            by, window or 0, (soft_cap or 0.0) * log2e, at, shape.heads, shape.kv_heads, shape.head_dim, block_d,
            group, STEP, layout.CHUNK, BLOCK_SIZE, tile.lines, tiles, tile.stages, window is not None,
            soft_cap is not None, scaled, device.PDL, num_warps=tile.warps, enable_fp_fusion=False, **limit,
            **device.launch(),
        )  # fmt: skip
    if work.has_parts:
        heads = min(MERGE_HEADS, triton.next_power_of_2(shape.heads))
        _merge[(rows, triton.cdiv(shape.heads, heads))](
            work.partials, v_scale, out, work.plan, step.positions, work.part_of, room, window or 0,
            shape.heads, shape.head_dim, block_d, group, layout.CHUNK, heads, window is not None, scaled, device.PDL,
            num_warps=4, enable_fp_fusion=False, **device.launch(),
        )  # fmt: skip
    return out
