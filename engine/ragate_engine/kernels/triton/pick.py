"""The next token of each row: greedy or sampled, under a mask, with log-sum-exp and the likeliest alternatives.

Shapes: logits [W, V] float32, mask [n, V / 32] bits, rows [W, 8] int32 (`pack_row`), out [W, 4 + 2 count] int32.
Moves each logit once (4 W V bytes); a sampled row is read once more, or a few times under top-k or top-p.
Plan: 1. one program per (row, segment of the vocabulary): the `count` best allowed tokens, peak, sum of exp;
2. one per row merges its segments; for rows of temperature > 0, a second pair of kernels:
3. one program per (row, segment): the highest logit / temperature + keyed Gumbel noise;
4. one per row takes the highest of all. Under top-k or top-p it counts what is likelier than that token, and where
   too much is, goes on with the best of those: the same token as cutting first, without a sort.
A token with its value is one 64-bit key, so every maximum is unique; sums are in fixed point, so their order cannot
matter. Hence no bit depends on a tile, on W or on `count`.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from ragate_engine.kernels.triton import device
from ragate_engine.request import MAX_LOGPROBS, SamplingParams

SEGMENT = 4096
"""Tokens of one program; part of the definition of a row's log-sum-exp, so of its bits."""
SEGMENT_WARPS = 8
SETTLE_WARPS = 8
COUNTS = (0, 8, 16, MAX_LOGPROBS)
"""Numbers of alternatives there are kernels for."""
HEADER = 4
"""Words of a line of `out` before its alternatives."""
ROW = struct.Struct("=iiffiIIi")
"""What a row asks for: line of its mask or -1, slot in the token pool or -1, temperature, top_p, top_k, the two
halves of its seed, position of the token to choose."""
ROW_WORDS = ROW.size // 4

_EMPTY = tl.constexpr(-(1 << 63))  # below every key
_NONE = tl.constexpr(-(1 << 31))  # below the order of every float
_LOWEST = tl.constexpr(-0x7F800001)  # the order of -inf, which is never chosen
_LAST = tl.constexpr((1 << 31) - 1)
_UNIT = tl.constexpr(float(1 << 36))  # fixed point: 2^18 terms of at most 1 fit in 63 bits
_ROW = tl.constexpr(ROW_WORDS)
_HEADER = tl.constexpr(HEADER)


class PickWorkspace:
    """Where partial results wait between the kernels: made once, so that graphs may hold its addresses."""

    def __init__(
        self, max_rows: int, vocab: int, device: torch.device, max_count: int = MAX_LOGPROBS
    ) -> None:
        self.max_rows, self.vocab, self.max_count = max_rows, vocab, max_count
        partials = max_rows * triton.cdiv(vocab, SEGMENT)
        self.keys = torch.empty(partials * max(max_count, 1), dtype=torch.int64, device=device)
        self.peaks = torch.empty(partials, dtype=torch.float32, device=device)
        self.totals = torch.empty(partials, dtype=torch.int64, device=device)
        self.draws = torch.empty(partials, dtype=torch.int64, device=device)
        self.masses = torch.empty(partials, dtype=torch.int64, device=device)

    def nbytes(self) -> int:
        """Device memory it holds."""
        held = (self.keys, self.peaks, self.totals, self.draws, self.masses)
        return sum(tensor.nbytes for tensor in held)


class Choices(NamedTuple):
    """A step's choices on the host, row by row."""

    ids: npt.NDArray[np.int32]
    """[W] the chosen token, -1 where the mask allows none."""
    logits: npt.NDArray[np.float32]
    """[W] its logit."""
    lse: npt.NDArray[np.float32]
    """[W] log-sum-exp over all tokens; NaN where a logit is NaN or +inf, and then the token means nothing."""
    top_ids: npt.NDArray[np.int32]
    """[W, count] the likeliest allowed tokens, best first, -1 where there are fewer."""
    top_logits: npt.NDArray[np.float32]
    """[W, count] their logits."""


def padded_count(count: int) -> int:
    """The smallest of `COUNTS` that is enough. Raises ValueError above the last."""
    for size in COUNTS:
        if count <= size:
            return size
    raise ValueError(f"at most {COUNTS[-1]} alternatives, got {count}")


def out_width(count: int) -> int:
    """Words of a line of `out` with `count` alternatives, one of `COUNTS`."""
    return HEADER + 2 * count


def pack_row(
    into: npt.NDArray[np.int32],
    line: int,
    params: SamplingParams,
    position: int,
    mask: int = -1,
    slot: int = -1,
) -> None:
    """Write to line `line` of `into` [W, 8] what a row asks for.

    `position` is that of the token to choose, `mask` the line of its mask in the step's masks, `slot` where its
    token goes in the token pool; -1 is none.
    """
    seed, top_k = params.seed % 2**64, min(params.top_k, 2**31 - 1)
    fields = (mask, slot, params.temperature, params.top_p, top_k, seed % 2**32, seed >> 32, position)
    ROW.pack_into(into.data, line * ROW.size, *fields)


def decode(out: npt.NDArray[np.int32]) -> Choices:
    """What the card wrote to `out` [W, 4 + 2 count], copied to the host: views, no copies."""
    count = (out.shape[1] - HEADER) // 2
    floats = out.view(np.float32)
    return Choices(
        out[:, 0], floats[:, 1], floats[:, 2], out[:, HEADER : HEADER + count], floats[:, HEADER + count :]
    )


@triton.jit
def _order(x):
    """float32 -> int32 in the same order, -0.0 as 0.0; applied to such an integer's bits it is its own inverse."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float32 of a key."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _key(order, token):
    """One int64 that is greater for a greater value and, among equals, for a lower token."""
    return (order.to(tl.int64) << 32) | (token ^ _LAST).to(tl.int64)


@triton.jit
def _token_of(key):
    """The token of a key, -1 of the empty one."""
    return tl.where(key == _EMPTY, -1, (key & 0xFFFFFFFF).to(tl.int32) ^ _LAST)


@triton.jit
def _read(logits, mask, line, first, V, words, COUNT: tl.constexpr, MASKED: tl.constexpr):
    """COUNT tokens from `first` on, as [COUNT / 32, 32]: ids, logits, and the order of those that are allowed."""
    word = first // 32 + tl.arange(0, COUNT // 32)
    lane = tl.arange(0, 32)
    token = word[:, None] * 32 + lane[None, :]
    x = tl.load(logits + token, token < V, float("-inf"))
    order = _order(x)
    if MASKED:
        bits = tl.load(mask + line.to(tl.int64) * words + word, (line >= 0) & (word < words), -1)
        order = tl.where((bits[:, None] & (1 << lane[None, :])) != 0, order, _NONE)
    return token, x, order


@triton.jit
def _segments(
    logits, mask, rows, count, keys, peaks, totals, V, stride, words,
    SEGMENT: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, COUNTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    w = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if COUNTED:
        real = tl.load(count)
        if w >= real:
            return
    line = tl.load(rows + w * _ROW)
    token, x, order = _read(
        logits + w.to(tl.int64) * stride, mask, line, s * SEGMENT, V, words, SEGMENT, MASKED
    )
    at = w.to(tl.int64) * tl.num_programs(0) + s
    peak = tl.max(x)
    share = tl.exp(x - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum((share * _UNIT).to(tl.int64))
    damaged = tl.sum(share) != tl.sum(share)  # a NaN or +inf in x is a NaN here
    tl.store(peaks + at, peak)
    tl.store(totals + at, tl.where(damaged, -1, total))

    best = tl.max(order)
    if N == 1:
        first = tl.min(tl.where(order == best, token, _LAST))
        tl.store(keys + at, tl.where(best <= _LOWEST, _EMPTY, _key(best, first)))
    else:
        places = tl.arange(0, N)
        found = tl.full((N,), _EMPTY, tl.int64)
        n = 0
        while (n < N) & (best > _LOWEST):
            first = tl.min(tl.where(order == best, token, _LAST))
            found = tl.where(places == n, _key(best, first), found)
            order = tl.where(token == first, _NONE, order)
            best = tl.max(order)
            n += 1
        tl.store(keys + at * N + places, found)


@triton.jit
def _merge(
    rows, count, keys, peaks, totals, out, sampled, S,
    SP: tl.constexpr, N: tl.constexpr, TOP: tl.constexpr, COUNTED: tl.constexpr, POOLED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    w = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if COUNTED:
        real = tl.load(count)
        if w >= real:
            return
    s = tl.arange(0, SP)
    at = w.to(tl.int64) * S
    peak = tl.load(peaks + at + s, s < S, float("-inf"))
    total = tl.load(totals + at + s, s < S, 0)
    highest = tl.max(peak)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    # the totals are already in fixed point, and at most 2^48: their shares stay so
    share = (total.to(tl.float32) * tl.exp(peak - shift)).to(tl.int64)
    lse = shift + tl.log(tl.sum(share).to(tl.float32) / _UNIT)
    lse = tl.where(tl.min(total) < 0, float("nan"), lse)

    place = tl.arange(0, SP * N)
    candidates = tl.load(keys + at * N + place, place < S * N, _EMPTY)
    best = tl.max(candidates)
    line = out + w.to(tl.int64) * (_HEADER + 2 * TOP)
    chosen = _token_of(best)
    tl.store(line, chosen)
    tl.store(line + 1, tl.where(best == _EMPTY, float("-inf"), _value(best)).to(tl.int32, bitcast=True))
    tl.store(line + 2, lse.to(tl.int32, bitcast=True))
    tl.store(line + 3, 0)
    if POOLED:
        slot = tl.load(rows + w * _ROW + 1)
        # what the next step reads must be a token, even where there is none
        tl.store(sampled + slot, tl.maximum(chosen, 0), slot >= 0)
    if TOP > 0:
        places = tl.arange(0, TOP)
        found = tl.full((TOP,), _EMPTY, tl.int64)
        n = 0
        while (n < TOP) & (best > _EMPTY):
            found = tl.where(places == n, best, found)
            best = tl.max(tl.where(candidates < best, candidates, _EMPTY))
            n += 1
        values = tl.where(found == _EMPTY, float("-inf"), _value(found))
        tl.store(line + _HEADER + places, _token_of(found))
        tl.store(line + _HEADER + TOP + places, values.to(tl.int32, bitcast=True))


@triton.jit
def _uniform(low, high, position, first, COUNT: tl.constexpr):
    """Uniform numbers in (0, 1) of COUNT tokens from `first` on, as `sampling.uniform` defines them."""
    block = first // 4 + tl.arange(0, COUNT // 4)
    zero = block * 0
    seed = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    a, b, c, d = tl.philox(seed, block, zero + position, zero, zero)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (COUNT // 32, 32))
    u = words.to(tl.float32) * 2.3283064365386963e-10
    return tl.minimum(tl.maximum(u, 1.1641532182693481e-10), 0.9999999403953552)


@triton.jit
def _scores(rows, x, peak, temperature, first, COUNT: tl.constexpr):
    """Order of logit / temperature + Gumbel noise. Logits count from the highest, so that no digits are lost."""
    u = _uniform(tl.load(rows + 5), tl.load(rows + 6), tl.load(rows + 7), first, COUNT)
    # -log(1 - u), by its series where 1 - u would lose the digits of a small u
    series = u * (1.0 + u * (0.5 + u * (0.33333334 + u * 0.25)))
    waiting = tl.where(u < 0.015625, series, -tl.log(1.0 - u))
    return _order((x - peak) / temperature - tl.log(waiting))


@triton.jit
def _weight(x, peak, temperature):
    """exp((x - peak) / temperature) in fixed point."""
    return (tl.exp((x - peak) / temperature) * _UNIT).to(tl.int64)


@triton.jit
def _draw(
    logits, mask, rows, count, out, draws, masses, V, stride, words, width,
    SEGMENT: tl.constexpr, MASKED: tl.constexpr, COUNTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    w = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if COUNTED:
        real = tl.load(count)
        if w >= real:
            return
    rows += w * _ROW
    temperature = tl.load(rows + 2).to(tl.float32, bitcast=True)
    if temperature <= 0.0:
        return
    peak = tl.load(out + w.to(tl.int64) * width + 1).to(tl.float32, bitcast=True)
    token, x, order = _read(
        logits + w.to(tl.int64) * stride, mask, tl.load(rows), s * SEGMENT, V, words, SEGMENT, MASKED
    )
    at = w.to(tl.int64) * tl.num_programs(0) + s
    score = _scores(rows, x, peak, temperature, s * SEGMENT, SEGMENT)
    tl.store(draws + at, tl.max(tl.where(order > _LOWEST, _key(score, token), _EMPTY)))
    kept = tl.where(order > _LOWEST, x, float("-inf"))
    tl.store(masses + at, tl.sum(_weight(kept, peak, temperature)))


@triton.jit
def _at_least(
    logits, mask, line, tops, n, a, b, c, V, S, words, SEGMENT: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """How many allowed tokens have an order of at least a, b and c (ascending)."""
    na = tl.zeros((SEGMENT // 32, 32), tl.int32)
    nb = tl.zeros((SEGMENT // 32, 32), tl.int32)
    nc = tl.zeros((SEGMENT // 32, 32), tl.int32)
    for s in range(0, S):
        if (tl.load(tops + s * n) >> 32) >= a:
            _token, _x, order = _read(logits, mask, line, s * SEGMENT, V, words, SEGMENT, MASKED)
            na += (order >= a).to(tl.int32)
            nb += (order >= b).to(tl.int32)
            nc += (order >= c).to(tl.int32)
    return tl.sum(na), tl.sum(nb), tl.sum(nc)


@triton.jit
def _kth(
    logits, mask, line, tops, n, peak, k, V, S, words, SP: tl.constexpr, SEGMENT: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """An order that only the k highest allowed tokens, and equals of the last of them, reach; and how many do."""
    s = tl.arange(0, SP)
    top = (tl.load(tops + s * n, s < S, _EMPTY) >> 32).to(tl.int32)
    # where k segments reach an order, so do k tokens
    reach = tl.sum((top[None, :] >= top[:, None]).to(tl.int32), 1)
    low = tl.maximum(tl.max(tl.where(reach >= k, top, _NONE)), _LOWEST + 1)
    high = _order(peak).to(tl.int64) + 1
    reached, _, _ = _at_least(logits, mask, line, tops, n, low, low, low, V, S, words, SEGMENT, MASKED)
    while (reached > k) & (high - low > 1):
        step = tl.maximum((high - low) // 4, 1)
        a = tl.minimum(low + step, high - 1).to(tl.int32)
        b = tl.minimum(low + 2 * step, high - 1).to(tl.int32)
        c = tl.minimum(low + 3 * step, high - 1).to(tl.int32)
        na, nb, nc = _at_least(logits, mask, line, tops, n, a, b, c, V, S, words, SEGMENT, MASKED)
        if nc >= k:
            low, reached = c, nc
        elif nb >= k:
            low, reached, high = b, nb, c.to(tl.int64)
        elif na >= k:
            low, reached, high = a, na, b.to(tl.int64)
        else:
            high = a.to(tl.int64)
    return low, reached


@triton.jit
def _settle(
    logits, mask, rows, count, keys, n, draws, masses, out, sampled, V, stride, words, width, S,
    SP: tl.constexpr, SEGMENT: tl.constexpr, MASKED: tl.constexpr, COUNTED: tl.constexpr, POOLED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    w = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if COUNTED:
        real = tl.load(count)
        if w >= real:
            return
    rows += w * _ROW
    temperature = tl.load(rows + 2).to(tl.float32, bitcast=True)
    out += w.to(tl.int64) * width
    lse = tl.load(out + 2).to(tl.float32, bitcast=True)
    if (temperature <= 0.0) | (tl.load(out) < 0) | (lse != lse):
        return
    top_p = tl.load(rows + 3).to(tl.float32, bitcast=True)
    top_k = tl.load(rows + 4)
    peak = tl.load(out + 1).to(tl.float32, bitcast=True)
    line = tl.load(rows)
    logits += w.to(tl.int64) * stride
    tops = keys + w.to(tl.int64) * S * n  # the best of each segment: those below a bound are not read
    segments = tl.arange(0, SP)
    at = w.to(tl.int64) * S + segments
    chosen = _token_of(tl.max(tl.load(draws + at, segments < S, _EMPTY)))

    if (top_k > 0) | (top_p < 1.0):
        # top-p keeps a share of the weight of what top-k keeps
        limit = float("inf")
        if top_p < 1.0:
            total = tl.sum(tl.load(masses + at, segments < S, 0))
            if top_k > 0:
                lowest, reached = _kth(
                    logits, mask, line, tops, n, peak, top_k, V, S, words, SP, SEGMENT, MASKED
                )
                mass = tl.zeros((SEGMENT // 32, 32), tl.int64)
                for s in range(0, S):
                    if (tl.load(tops + s * n) >> 32) >= lowest:
                        _token, x, order = _read(logits, mask, line, s * SEGMENT, V, words, SEGMENT, MASKED)
                        mass += _weight(tl.where(order >= lowest, x, float("-inf")), peak, temperature)
                total = tl.sum(mass)
                if reached > top_k:  # by equals of the last one kept
                    bound = _value(lowest.to(tl.int64) << 32)
                    total -= (reached - top_k) * _weight(bound, peak, temperature)
            limit = top_p * total.to(tl.float32)

        searching = True
        while searching:
            value = _order(tl.load(logits + chosen))
            likelier = tl.zeros((SEGMENT // 32, 32), tl.int32)
            mass = tl.zeros((SEGMENT // 32, 32), tl.int64)
            for s in range(0, S):
                if (tl.load(tops + s * n) >> 32) >= value:
                    token, x, order = _read(logits, mask, line, s * SEGMENT, V, words, SEGMENT, MASKED)
                    above = (order > value) | ((order == value) & (token < chosen))
                    likelier += above.to(tl.int32)
                    mass += _weight(tl.where(above, x, float("-inf")), peak, temperature)
            before = tl.sum(likelier)
            cut = ((top_k > 0) & (before >= top_k)) | (tl.sum(mass).to(tl.float32) >= limit)
            searching = cut & (before > 0)
            if searching:
                # what is less likely than a token cut away is cut away too: go on with the best of the likelier
                best = tl.full((SEGMENT // 32, 32), _EMPTY, tl.int64)
                for s in range(0, S):
                    if (tl.load(tops + s * n) >> 32) >= value:
                        token, x, order = _read(logits, mask, line, s * SEGMENT, V, words, SEGMENT, MASKED)
                        above = (order > value) | ((order == value) & (token < chosen))
                        score = _scores(rows, x, peak, temperature, s * SEGMENT, SEGMENT)
                        best = tl.maximum(best, tl.where(above, _key(score, token), _EMPTY))
                chosen = _token_of(tl.max(best))

    tl.store(out, chosen)
    tl.store(out + 1, tl.load(logits + chosen).to(tl.int32, bitcast=True))
    if POOLED:
        slot = tl.load(rows + 1)
        tl.store(sampled + slot, chosen, slot >= 0)


def choose(
    workspace: PickWorkspace,
    logits: torch.Tensor,
    rows: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    sampled: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> None:
    """The likeliest allowed token of each row, its log-sum-exp and its alternatives, to `out` and `sampled`.

    logits [W, V] float32; rows [W, 8] int32 by `pack_row`; mask [n, words] int32 bits (None: all is allowed);
    out [W, 4 + 2 n] int32 with n one of `COUNTS`, read by `decode`; sampled [slots] int32, the token pool (0 is
    written where nothing is allowed); count [1] int32, how many rows are real (None: all). Allocates nothing.
    """
    W, V = logits.shape
    top = (out.shape[1] - HEADER) // 2
    n = max(top, 1)
    S = triton.cdiv(V, SEGMENT)
    fits = workspace.max_rows >= W and workspace.vocab >= V and max(workspace.max_count, 1) >= n
    assert fits, "the workspace is too small"
    masked, counted, pooled = mask is not None, count is not None, sampled is not None
    words = mask.shape[1] if mask is not None else 0
    _segments[(S, W)](
        logits, mask if masked else rows, rows, count if counted else rows, workspace.keys, workspace.peaks,
        workspace.totals, V, logits.stride(0), words, SEGMENT, n, masked, counted, device.PDL,
        num_warps=SEGMENT_WARPS, **device.launch(),
    )  # fmt: skip
    padded = triton.next_power_of_2(S)
    _merge[(W,)](
        rows, count if counted else rows, workspace.keys, workspace.peaks, workspace.totals, out,
        sampled if pooled else rows, S, padded, n, top, counted, pooled, device.PDL,
        num_warps=merge_warps(padded * n), **device.launch(),
    )  # fmt: skip


def merge_warps(candidates: int) -> int:
    """Warps for a row with so many candidates: one is quickest while they fit, having nobody to wait for."""
    return 1 if candidates <= 512 else 4 if candidates <= 2048 else 8


def sample(
    workspace: PickWorkspace,
    logits: torch.Tensor,
    rows: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    sampled: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> None:
    """After `choose` with the same arguments: rows of temperature > 0 get a sampled token in place of the likeliest.

    The token is that of `ragate_engine.sampling.sample`. Log-sum-exp and alternatives stay. Allocates nothing.
    Source: Gumbel 1954; Salmon et al. 2011 (Philox); Holtzman et al. 2020 (top-p); rejection instead of a sort as in
    FlashInfer (Ye et al. 2025).
    """
    W, V = logits.shape
    S = triton.cdiv(V, SEGMENT)
    masked, counted, pooled = mask is not None, count is not None, sampled is not None
    words = mask.shape[1] if mask is not None else 0
    n = max((out.shape[1] - HEADER) // 2, 1)
    _draw[(S, W)](
        logits, mask if masked else rows, rows, count if counted else rows, out, workspace.draws, workspace.masses, V,
        logits.stride(0), words, out.shape[1], SEGMENT, masked, counted, device.PDL,
        num_warps=SEGMENT_WARPS, **device.launch(),
    )  # fmt: skip
    _settle[(W,)](
        logits, mask if masked else rows, rows, count if counted else rows, workspace.keys, n, workspace.draws,
        workspace.masses, out, sampled if pooled else rows, V, logits.stride(0), words, out.shape[1], S,
        triton.next_power_of_2(S), SEGMENT, masked, counted, pooled, device.PDL,
        num_warps=SETTLE_WARPS, **device.launch(),
    )  # fmt: skip


def _alone(logits: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    """`out` of `choose` for greedy rows, row m under line m of the mask, with fresh buffers."""
    W, V = logits.shape
    rows = torch.zeros(W, ROW_WORDS, dtype=torch.int32, device=logits.device)
    rows[:, 0] = torch.arange(W, dtype=torch.int32, device=logits.device)
    out = torch.empty(W, out_width(padded_count(count)), dtype=torch.int32, device=logits.device)
    choose(PickWorkspace(W, V, logits.device, padded_count(count)), logits, rows, mask, out)
    return out


def pick(logits: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [M, V] float32, mask [M, ceil(V / 32)] int32 bits: (ids [M], log-sum-exp over all tokens [M])."""
    out = _alone(logits, mask, 0)
    return out[:, 0].contiguous(), out[:, 2].contiguous().view(torch.float32)


def likeliest(logits: torch.Tensor, mask: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` likeliest allowed tokens, best first: ids (-1 where fewer) and logits, [M, count] each.

    Raises ValueError where `count` is above 64.
    """
    out = _alone(logits, mask, count)
    ids, values = out[:, HEADER:].chunk(2, dim=1)
    return ids[:, :count].contiguous(), values[:, :count].contiguous().view(torch.float32)
