"""On the card: paged attention is right, and a row's bits do not follow the plan, the tile or those who share the step.

Run with `pytest -m gpu tests/gpu`. Needs an NVIDIA card.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import NamedTuple

import numpy as np
import pytest
import torch
from on_card import BF16, CARD, E4M3, E5M2, FP16, FP32, NEEDS_CARD, compile_together, error, name_of

pytest.importorskip("triton")
from ragate_engine.kernels import HeadShape, StepInputs
from ragate_engine.kernels.triton import device
from ragate_engine.kernels.triton import plan as planner
from ragate_engine.kernels.triton.attention import Tile, Work, attention, make_kv
from ragate_engine.kernels.triton.plan import AttentionPlan, order, pack, plan_attention
from ragate_engine.kernels.triton.rope import rope_write_kv

pytestmark = NEEDS_CARD
module = import_module(
    "ragate_engine.kernels.triton.attention"
)  # the package has a function of the same name

TOLERANCE = {BF16: 6e-3, FP16: 1e-3, FP32: 1e-5}
SMALL_CARD, LARGE_CARD = 1, 10**6
"""Multiprocessors of a card that any step fills, so nothing is split, and of one for which all that can be is split."""
LENGTHS = (600, 529, 545, 560, 997, 1013)
SHARED = 33
"""Blocks that all sequences have in common: two chunks and a bit."""
Run = tuple[int, int, int]
"""A sequence, the position of its first token in the step, tokens."""


class Case(NamedTuple):
    """Heads, and what a layer does beside plain attention."""

    shape: HeadShape
    dtype: torch.dtype = BF16
    cache: torch.dtype | None = None
    window: int | None = None
    cap: float | None = None


SMOL, LLAMA = HeadShape(9, 3, 64, 64), HeadShape(32, 8, 128, 128)
CASES = [
    Case(SMOL),
    Case(SMOL, window=300),
    Case(LLAMA),
    Case(HeadShape(8, 4, 256, 256), window=300, cap=50.0),
    Case(HeadShape(8, 8, 80, 40)),
    Case(HeadShape(8, 2, 96, 96), window=37),
    Case(HeadShape(14, 2, 128, 128), cap=30.0),
    Case(HeadShape(16, 1, 128, 128)),
    Case(SMOL, FP16),
    Case(SMOL, FP32),
    Case(HeadShape(4, 1, 256, 256), FP32, window=300),
    Case(LLAMA, cache=E5M2),
    Case(LLAMA, cache=E4M3),
    Case(SMOL, cache=E4M3, window=300),
    Case(HeadShape(4, 1, 256, 256), cache=E4M3),
]


class Pool:
    """Random sequences whose K and V lie in blocks scattered over a pool; slots that no token has hold NaN.

    The first `shared` blocks are common to all.
    """

    def __init__(self, case: Case, lengths: Sequence[int], shared: int) -> None:
        self.case, self.lengths = case, lengths
        shape = case.shape
        torch.manual_seed(0)
        counts = [-(-n // 16) for n in lengths]
        ids = np.random.default_rng(0).permutation(np.arange(1, sum(counts) + 4)).tolist()
        common = [ids.pop() for _ in range(shared)]
        self.tables = np.zeros((len(lengths), max(counts)), np.int32)
        for i, count in enumerate(counts):
            self.tables[i, :count] = common + [ids.pop() for _ in range(count - shared)]
        cache = case.cache or case.dtype
        self.kv = make_kv(sum(counts) + 5, shape.kv_heads, shape.head_dim, cache, CARD)
        for tensor in self.kv[:2]:
            tensor.view(torch.uint8).fill_(255)  # a NaN in every format
        if cache.itemsize == 1:
            sizes = torch.rand(2, shape.kv_heads, device=CARD) * 0.02 + 0.01
            self.kv = self.kv._replace(k_scale=sizes[0].clone(), v_scale=sizes[1].clone())
        half = shape.rotary_dim // 2
        angles = torch.arange(max(lengths))[:, None] * (1e4 ** -(torch.arange(half) / half))
        cos, sin = angles.cos().to(CARD), angles.sin().to(CARD)
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.qkv = [torch.randn(n, width, device=CARD).to(case.dtype) for n in lengths]
        head = self.qkv[0][: shared * 16].clone()
        for i, qkv in enumerate(self.qkv):
            qkv[: shared * 16] = head
            run = [(i, 0, lengths[i])]
            rope_write_kv(qkv, None, None, 1e-6, cos, sin, self.step(run, self.plan(run)), self.kv, shape)

    def plan(
        self, runs: list[Run], multiprocessors: int = SMALL_CARD, max_parts: int = 4096
    ) -> AttentionPlan:
        starts = np.array([start for _, start, _ in runs], np.int32)
        counts = np.array([count for _, _, count in runs], np.int32)
        first_row = (np.cumsum(counts) - counts).astype(np.int32)
        tables = self.tables[[i for i, _, _ in runs]]
        return plan_attention(first_row, starts, counts, tables, self.case.shape, multiprocessors, max_parts)

    def step(self, runs: list[Run], plan: AttentionPlan, bucket: int = 0) -> StepInputs:
        """The inputs of a step, padded to `bucket` rows."""
        owner = np.concatenate([np.full(count, j) for j, (_, _, count) in enumerate(runs)])
        position = np.concatenate([np.arange(start, start + count) for _, start, count in runs])
        tables = self.tables[[i for i, _, _ in runs]]
        slots = tables[owner, position // 16] * 16 + position % 16
        buffer = np.zeros(planner.HEADER + planner.packed_size(plan, tables), np.int32)
        pack(buffer, planner.HEADER, plan, tables)
        buffer[planner.ROWS] = len(position)
        on_card = torch.from_numpy(buffer).to(CARD)
        padding = max(0, bucket - len(position))
        fields = [
            torch.from_numpy(np.pad(field.astype(np.int32), (0, padding), constant_values=fill)).to(CARD)
            for field, fill in ((position, 0), (slots, -1), (owner, 0), (plan.part_of, -1))
        ]
        shape = self.case.shape
        size = max(plan.parts, 1) * shape.heads * (shape.head_dim + 2)
        partials = torch.full((size,), float("nan"), device=CARD)
        return StepInputs(
            *fields[:3],
            tables=on_card,
            work=Work(on_card, fields[3], partials, len(plan.small) > 0, len(plan.big) > 0, plan.parts > 0),
            wanted=fields[0],
            rows=on_card[planner.ROWS : planner.ROWS + 1],
        )

    def attend(
        self, runs: list[Run], multiprocessors: int = SMALL_CARD, max_parts: int = 4096, bucket: int = 0
    ) -> torch.Tensor:
        """Attention of `runs` over the K and V in the pool: [rows, heads * head_dim]; padded rows hold NaN."""
        case = self.case
        step = self.step(runs, self.plan(runs, multiprocessors, max_parts), bucket)
        qkv = torch.cat([self.qkv[i][start : start + count] for i, start, count in runs])
        rows = len(qkv)
        padded = qkv.new_full((max(rows, bucket), qkv.shape[1]), float("nan"))
        padded[:rows] = qkv
        scale = case.shape.head_dim**-0.5
        return attention(padded, self.kv, step, case.shape, scale, case.window, case.cap)[:rows]

    def textbook(self, i: int, position: int) -> torch.Tensor:
        """Attention of one row in float64, over what the cache holds."""
        shape, n = self.case.shape, position + 1
        first = max(0, n - self.case.window) if self.case.window else 0
        blocks = torch.from_numpy(self.tables[i, : -(-n // 16)].astype(np.int64)).to(CARD)
        k, v = (
            stored[blocks].double().transpose(0, 1).flatten(1, 2)[:, first:n]
            * (1.0 if size is None else size.double()[:, None, None])
            for stored, size in ((self.kv.k, self.kv.k_scale), (self.kv.v, self.kv.v_scale))
        )
        q = (
            self.qkv[i][position, : shape.heads * shape.head_dim]
            .double()
            .view(shape.kv_heads, -1, shape.head_dim)
        )
        scores = q @ k.transpose(1, 2) * shape.head_dim**-0.5
        if self.case.cap:
            scores = self.case.cap * torch.tanh(scores / self.case.cap)
        return (scores.softmax(-1) @ v).flatten()


def last_rows(pool: Pool) -> list[Run]:
    """The last token of every sequence."""
    return [(i, n - 1, 1) for i, n in enumerate(pool.lengths)]


def launches(case: Case) -> list[Callable[[], object]]:
    """What compiles the kernels of a case: launches without items."""
    shape, cache = case.shape, case.cache or case.dtype
    kv = make_kv(1, shape.kv_heads, shape.head_dim, cache, CARD)
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    none = torch.zeros(1024, dtype=torch.int32, device=CARD)
    few, many = (module.tile_for(planner.BIG_LINES, shape, case.dtype, cache, rows) for rows in (16, 1024))
    kinds = [(16, True, False, False), (16, False, True, False), (16, False, False, True)]
    jobs = []
    for rows, *kind in [*kinds, (1024, False, True, False)] if few != many else kinds:
        qkv = torch.zeros(rows, width, dtype=case.dtype, device=CARD)
        step = StepInputs(none, none, none, none, Work(none, none, torch.zeros(16, device=CARD), *kind), none)
        jobs.append(partial(attention, qkv, kv, step, shape, 0.1, case.window, case.cap))
    return jobs


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_together([job for case in CASES for job in launches(case)])


def same_in_every_plan(pool: Pool) -> list[str]:
    """The ways to run the last rows, of which there are six, that give other bits than each alone."""
    last = last_rows(pool)
    alone = torch.cat([pool.attend([run], max_parts=0) for run in last])
    n = pool.lengths[0]
    whole = pool.attend([(0, 0, n)])
    sound = [0, 63, 64, 255, 256, n // 2, n - 1]
    assert error(alone, torch.stack([pool.textbook(i, at) for i, at, _ in last])) < TOLERANCE[pool.case.dtype]
    assert (
        error(whole[sound], torch.stack([pool.textbook(0, at) for at in sound])) < TOLERANCE[pool.case.dtype]
    )

    grouped = pool.plan(last)
    assert max(items[:, planner.ROW_COUNT].max(initial=0) for items in (grouped.small, grouped.big)) > 1
    assert all(pool.plan([run], LARGE_CARD).parts > 1 for run in last)
    assert 0 < pool.plan(last, LARGE_CARD, max_parts=9).parts <= 9
    chunks = [(0, at, min(97, n - at)) for at in range(0, n, 97)]
    mixed = [*last[1:], (2, 400, 3), (3, 500, 16), (0, n - 200, 200)]
    ways = {
        "alone, split": (torch.cat([pool.attend([run], LARGE_CARD) for run in last]), alone),
        "together, neither split nor grouped": (pool.attend(last, max_parts=0), alone),
        "grouped": (pool.attend(last), alone),
        "grouped and split": (pool.attend(last, LARGE_CARD), alone),
        "as many parts as there is room for": (pool.attend(last, LARGE_CARD, max_parts=9), alone),
        "in a larger bucket": (pool.attend(last, LARGE_CARD, bucket=64), alone),
        "at the end of its prompt": (whole[-1:], alone[:1]),
        "a prompt in a large bucket": (pool.attend([(0, 0, n)], bucket=1024), whole),
        "a prompt in chunks": (torch.cat([pool.attend([run]) for run in chunks]), whole),
        "a prompt in chunks, split": (torch.cat([pool.attend([run], LARGE_CARD) for run in chunks]), whole),
        "a short run": (pool.attend([(1, pool.lengths[1] - 3, 3)], LARGE_CARD)[-1:], alone[1:2]),
        "a longer run": (pool.attend([(1, pool.lengths[1] - 10, 10)])[-1:], alone[1:2]),
        "beside a prompt and short runs": (
            pool.attend(mixed, device.programs())[[-1, *range(len(last) - 1)]],
            alone,
        ),
        "beside them, in a large bucket": (
            pool.attend(mixed, device.programs(), bucket=1024)[[-1, *range(len(last) - 1)]],
            alone,
        ),
    }
    return [way for way, (found, expected) in ways.items() if not torch.equal(found, expected)]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_attention_is_right_and_a_row_has_the_same_bits_in_every_plan(case: Case) -> None:
    assert same_in_every_plan(Pool(case, LENGTHS, SHARED)) == []


@pytest.mark.parametrize("case", [Case(SMOL), Case(LLAMA)], ids=name_of)
@pytest.mark.parametrize(
    ("small", "big"), [(Tile(16, 2, 2, 3), Tile(128, 8, 2, 1)), (Tile(64, 4, 2, 2), Tile(16, 4, 2, 2))]
)
def test_other_tiles_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, case: Case, small: Tile, big: Tile
) -> None:
    pool = Pool(case, LENGTHS, SHARED)
    last = last_rows(pool)
    usual = pool.attend(last), pool.attend([(0, 0, LENGTHS[0])])
    monkeypatch.setattr(module, "tile_for", lambda lines, *_: small if lines == planner.SMALL_LINES else big)
    compile_together(launches(case))
    assert torch.equal(pool.attend(last), usual[0])
    assert torch.equal(pool.attend([(0, 0, LENGTHS[0])]), usual[1])
    assert same_in_every_plan(pool) == []


def test_forty_readers_of_a_chunk_keep_the_bits_that_each_has_alone() -> None:
    pool = Pool(Case(LLAMA), [600, *range(290, 410, 3)], 17)
    last = last_rows(pool)
    starts = np.array([start for _, start, _ in last], np.int32)
    turn = order(starts, np.ones_like(starts), pool.tables)
    last = [last[i] for i in turn]
    plan = pool.plan(last, device.programs())
    assert plan.big[:, planner.ROW_COUNT].max() > 20
    alone = torch.cat([pool.attend([run], max_parts=0) for run in last])
    assert torch.equal(pool.attend(last, device.programs()), alone)
    assert torch.equal(pool.attend(last, device.programs(), bucket=1024), alone)
    assert error(alone, torch.stack([pool.textbook(i, at) for i, at, _ in last])) < TOLERANCE[BF16]
