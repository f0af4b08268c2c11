"""The card's paged attention through Triton's interpreter: against the textbook, and bits against plan and company."""

from __future__ import annotations

import os
from importlib import import_module

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on a card, tests/gpu runs the compiled kernels", allow_module_level=True)

from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from ragate_engine.kernels import HeadShape, LayerKV, StepInputs, reference
from ragate_engine.kernels.triton import plan as planner
from ragate_engine.kernels.triton.attention import Tile, Work, attention, make_kv
from ragate_engine.kernels.triton.plan import CHUNK, AttentionPlan, order, pack, plan_attention
from ragate_engine.kernels.triton.rope import rope_write_kv

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CPU = torch.device("cpu")
SMALL_CARD, LARGE_CARD = 1, 10**6
"""Multiprocessors of a card that any step fills, so nothing is split, and of one for which all that can be is split."""
Run = tuple[int, int, int]
"""A sequence, the position of its first token in the step, tokens."""


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few large tiles, each of which costs the interpreter the same; products whose order of sums cannot be seen.

    numpy's float32 product adds in an order that depends on the tile; on a card tl.dot's does not (tests/gpu).
    """
    use_tiles(monkeypatch, 16, 128)

    def create_dot(
        self: object, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: object
    ) -> TensorHandle:
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + d.data
        return TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def use_tiles(monkeypatch: pytest.MonkeyPatch, small: int, big: int) -> None:
    monkeypatch.setattr(
        import_module("ragate_engine.kernels.triton.attention"),
        "tile_for",
        lambda lines, shape, dtype, cache, rows: Tile(
            small if lines == planner.SMALL_LINES else big, 4, 1, 1
        ),
    )


class Pool:
    """Random sequences, their K and V written by the reference kernels to blocks scattered over a pool.

    The first `shared` blocks are common to all; slots that no token has hold NaN.
    """

    def __init__(
        self, lengths: list[int], shape: HeadShape, shared: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        self.shape, self.lengths = shape, lengths
        torch.manual_seed(0)
        counts = [-(-n // 16) for n in lengths]
        ids = np.random.default_rng(0).permutation(np.arange(1, sum(counts) + 4)).tolist()
        common = [ids.pop() for _ in range(shared)]
        self.tables = np.zeros((len(lengths), max(counts)), np.int32)
        for i, count in enumerate(counts):
            self.tables[i, :count] = common[:count] + [ids.pop() for _ in range(count - shared)]
        self.kv = make_kv(sum(counts) + 5, shape.kv_heads, shape.head_dim, dtype, CPU)
        for tensor in self.kv[:2]:
            tensor.view(torch.uint8).fill_(255)  # a NaN in every format
        if dtype.itemsize == 1:
            self.kv = self.kv._replace(
                k_scale=torch.rand(shape.kv_heads) * 0.02 + 0.01,
                v_scale=torch.rand(shape.kv_heads) * 0.02 + 0.01,
            )
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.qkv = [torch.randn(n, width).to(dtype if dtype.itemsize > 1 else torch.float32) for n in lengths]
        for qkv in self.qkv[1:]:
            qkv[: shared * 16] = self.qkv[0][: shared * 16]
        angles = torch.arange(max(lengths))[:, None] * (0.3 ** torch.arange(shape.rotary_dim // 2))
        self.cos, self.sin = angles.cos(), angles.sin()
        self.turned = [qkv.clone() for qkv in self.qkv]
        for i, turned in enumerate(self.turned):
            step = self.step([(i, 0, lengths[i])], nothing(lengths[i]))
            reference.rope_write_kv(turned, None, None, 1e-6, self.cos, self.sin, step, self.kv, shape)

    def plan(self, runs: list[Run], multiprocessors: int, max_parts: int = 4096) -> AttentionPlan:
        starts = np.array([start for _, start, _ in runs], np.int32)
        counts = np.array([count for _, _, count in runs], np.int32)
        first_row = (np.cumsum(counts) - counts).astype(np.int32)
        tables = self.tables[[i for i, _, _ in runs]]
        return plan_attention(first_row, starts, counts, tables, self.shape, multiprocessors, max_parts)

    def step(self, runs: list[Run], plan: AttentionPlan, padding: int = 0) -> StepInputs:
        """The inputs of a step, with `padding` rows that are not real."""
        owner = np.concatenate([np.full(count, j) for j, (_, _, count) in enumerate(runs)])
        position = np.concatenate([np.arange(start, start + count) for _, start, count in runs])
        tables = self.tables[[i for i, _, _ in runs]]
        slots = tables[owner, position // 16] * 16 + position % 16
        buffer = np.zeros(planner.HEADER + planner.packed_size(plan, tables), np.int32)
        pack(buffer, planner.HEADER, plan, tables)
        buffer[planner.ROWS] = len(position)
        on_card = torch.from_numpy(buffer)
        fields = [
            torch.from_numpy(np.pad(field.astype(np.int32), (0, padding), constant_values=fill))
            for field, fill in ((position, 0), (slots, -1), (owner, 0), (plan.part_of, 0))
        ]
        size = max(plan.parts, 1) * self.shape.heads * (self.shape.head_dim + 2)
        partials = torch.full((size,), float("nan"))
        return StepInputs(
            *fields[:3],
            tables=torch.from_numpy(tables),
            work=Work(on_card, fields[3], partials, len(plan.small) > 0, len(plan.big) > 0, plan.parts > 0),
            wanted=torch.zeros(0, dtype=torch.int32),
            rows=on_card[planner.ROWS : planner.ROWS + 1],
        )

    def attend(
        self,
        runs: list[Run],
        multiprocessors: int = SMALL_CARD,
        window: int | None = None,
        cap: float | None = None,
        max_parts: int = 4096,
    ) -> torch.Tensor:
        """Attention of `runs` over the K and V in the pool: [rows, heads * head_dim]."""
        step = self.step(runs, self.plan(runs, multiprocessors, max_parts))
        qkv = torch.cat([self.turned[i][start : start + count] for i, start, count in runs])
        return attention(qkv, self.kv, step, self.shape, 0.2, window, cap)

    def textbook(self, i: int, window: int | None = None, cap: float | None = None) -> torch.Tensor:
        """Attention over the whole of sequence `i` in float64."""
        s, n = self.shape, self.lengths[i]
        heads = self.qkv[i].double().view(n, -1, s.head_dim)
        q, k, v = heads.split([s.heads, s.kv_heads, s.kv_heads], 1)

        def turn(x: torch.Tensor) -> torch.Tensor:
            a, b = x[..., : s.rotary_dim].chunk(2, -1)
            c, z = self.cos[:n, None].double(), self.sin[:n, None].double()
            return torch.cat([a * c - b * z, b * c + a * z, x[..., s.rotary_dim :]], -1)

        k, v = (x.repeat_interleave(s.heads // s.kv_heads, 1) for x in (turn(k), v))
        scores = torch.einsum("qhd,khd->hqk", turn(q), k) * 0.2
        if cap:
            scores = cap * torch.tanh(scores / cap)
        at = torch.arange(n)
        seen = at[None] <= at[:, None]
        if window:
            seen &= at[None] > at[:, None] - window
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def nothing(rows: int) -> AttentionPlan:
    """A plan without items."""
    none = np.zeros((0, planner.ITEM), np.int32)
    return AttentionPlan(none, none, np.full(rows, -1, np.int32), 0)


SHAPES = [
    HeadShape(9, 3, 64, 64),
    HeadShape(4, 4, 80, 40),
    HeadShape(8, 1, 96, 96),
    HeadShape(14, 2, 128, 128),
    HeadShape(4, 1, 256, 256),
    HeadShape(16, 1, 16, 16),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_equals_the_textbook_for_every_head_size_and_ratio(shape: HeadShape) -> None:
    pool = Pool([1, 81, 17], shape)
    out = pool.attend([(0, 0, 1), (1, 0, 81), (2, 0, 17)])
    expected = torch.cat([pool.textbook(i) for i in range(3)])
    assert torch.allclose(out.double(), expected, atol=1e-5)


@pytest.mark.parametrize(("window", "cap"), [(None, None), (300, None), (None, 3.0), (37, 15.0)])
@pytest.mark.parametrize("multiprocessors", [SMALL_CARD, LARGE_CARD])
def test_windows_and_soft_caps_hold_across_chunks_whether_split_or_not(
    window: int | None, cap: float | None, multiprocessors: int
) -> None:
    pool = Pool([530, 530], HeadShape(4, 1, 16, 16))
    out = pool.attend([(1, 529, 1), (0, 440, 90)], multiprocessors, window, cap)
    expected = torch.cat([pool.textbook(1, window, cap)[529:], pool.textbook(0, window, cap)[440:]])
    assert torch.allclose(out.double(), expected, atol=1e-5)


def test_float16_is_as_near_as_its_inputs_allow() -> None:
    pool = Pool([300], HeadShape(4, 2, 32, 32), dtype=torch.float16)
    out = pool.attend([(0, 0, 300)])
    expected = pool.textbook(0)
    assert out.dtype == torch.float16
    assert (out.double() - expected).norm() / expected.norm() < 2e-3


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float8_e5m2, 0.15), (torch.float8_e4m3fn, 0.08)], ids=str
)
def test_an_8_bit_cache_with_scales_is_read_as_its_values_times_their_scale(
    dtype: torch.dtype, tolerance: float
) -> None:
    pool = Pool([530], HeadShape(4, 2, 16, 16), dtype=dtype)
    out = pool.attend([(0, 0, 530)])
    expected = pool.textbook(0)
    assert (out.double() - expected).norm() / expected.norm() < tolerance
    wide = [
        torch.nan_to_num(x.float()) * by[:, None, None]
        for x, by in ((pool.kv.k, pool.kv.k_scale), (pool.kv.v, pool.kv.v_scale))
    ]
    last = out[-1:], pool.attend([(0, 529, 1)], LARGE_CARD)
    pool.kv = LayerKV(*wide)
    assert torch.allclose(out, pool.attend([(0, 0, 530)]), atol=1e-5)
    assert torch.equal(*last)


@pytest.mark.parametrize(
    ("tiles", "window"), [((16, 128), None), ((16, 128), 300), ((16, 32), None), ((128, 64), 300)]
)
def test_a_row_has_the_same_bits_alone_grouped_split_direct_and_in_chunks(
    monkeypatch: pytest.MonkeyPatch, window: int | None, tiles: tuple[int, int]
) -> None:
    pool = Pool([600, 529, 545, 560, 597], HeadShape(4, 2, 16, 16), shared=33)
    last = [(i, n - 1, 1) for i, n in enumerate(pool.lengths)]
    expected = torch.cat([pool.attend([run], window=window) for run in last])
    use_tiles(monkeypatch, *tiles)
    plans = {
        "direct": pool.plan(last[:3], SMALL_CARD),
        "grouped": pool.plan(last, SMALL_CARD),
        "split": pool.plan(last[:3], LARGE_CARD),
    }
    assert plans["direct"].parts == 0 and plans["split"].parts == 9 and len(plans["split"].small) == 9
    assert plans["grouped"].small[:, planner.ROW_COUNT].max() == 5
    assert torch.equal(pool.attend(last[:3], SMALL_CARD, window), expected[:3])
    assert torch.equal(pool.attend(last, SMALL_CARD, window), expected)
    assert torch.equal(pool.attend(last[:3], LARGE_CARD, window), expected[:3])
    assert torch.equal(pool.attend([(0, 540, 60)], SMALL_CARD, window)[-1:], expected[:1])
    assert torch.equal(pool.attend([(1, 524, 5)], LARGE_CARD, window)[-1:], expected[1:2])
    assert torch.equal(pool.attend([(3, 540, 20)], LARGE_CARD, window)[-1:], expected[3:4])
    assert torch.equal(pool.attend(last, LARGE_CARD, window, max_parts=7), expected)


def test_many_readers_of_a_chunk_read_it_as_one_big_item_and_keep_their_bits() -> None:
    pool = Pool([273 + i for i in range(40)], HeadShape(4, 1, 16, 16), shared=17)
    last = [(i, n - 1, 1) for i, n in enumerate(pool.lengths)]
    plan = pool.plan(last, SMALL_CARD)
    assert plan.big[:, planner.ROW_COUNT].tolist() == [20, 20]
    together = pool.attend(last)
    assert torch.equal(
        together[[0, 19, 20, 39]], torch.cat([pool.attend([last[i]]) for i in (0, 19, 20, 39)])
    )


@pytest.mark.parametrize("multiprocessors", [SMALL_CARD, LARGE_CARD])
def test_padded_rows_are_inert(multiprocessors: int) -> None:
    pool = Pool([530, 40], HeadShape(4, 2, 16, 16))
    runs = [(0, 529, 1), (1, 37, 3)]
    plan = pool.plan(runs, multiprocessors)
    qkv = torch.cat([pool.turned[0][529:], pool.turned[1][37:]])
    expected = attention(qkv, pool.kv, pool.step(runs, plan), pool.shape, 0.2, None, None)
    padded = torch.cat([qkv, torch.full((4, qkv.shape[1]), float("nan"))])
    step = pool.step(runs, plan, padding=4)
    before = [pool.kv.k.clone(), pool.kv.v.clone()]
    as_it_was = padded.clone()
    out = attention(padded, pool.kv, step, pool.shape, 0.2, None, None)
    assert torch.equal(out[:4], expected)
    rope_write_kv(padded, None, None, 1e-6, pool.cos, pool.sin, step, pool.kv, pool.shape)
    assert torch.equal(padded[4:].isnan(), as_it_was[4:].isnan())
    written = sum(
        not torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, pool.kv[:2], strict=True)
    )
    assert written == 1, "k of the real rows, turned twice; v as it was"


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, HeadShape(2, 2, 96, 24), HeadShape(32, 8, 128, 128)], ids=str)
def test_rope_writes_what_the_reference_writes(shape: HeadShape, norm: bool) -> None:
    pool = Pool([19, 3], shape)
    norms = (torch.rand(shape.head_dim) + 0.5, torch.rand(shape.head_dim) + 0.5) if norm else (None, None)
    step = pool.step([(1, 2, 1), (0, 14, 5)], nothing(6))
    step.slots[2] = -1
    torch.manual_seed(1)
    given = torch.randn(6, (shape.heads + 2 * shape.kv_heads) * shape.head_dim)
    outputs = []
    for write in (rope_write_kv, reference.rope_write_kv):
        qkv = given.clone()
        kv = LayerKV(torch.zeros_like(pool.kv.k), torch.zeros_like(pool.kv.v))
        write(qkv, *norms, 1e-6, pool.cos, pool.sin, step, kv, shape)
        outputs.append((qkv[:, : shape.heads * shape.head_dim], *kv[:2]))
    assert (outputs[1][1] != 0).sum() == 5 * shape.kv_heads * shape.head_dim
    for ours, expected in zip(*outputs, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn], ids=str)
def test_an_8_bit_cache_gets_values_over_their_heads_scale_within_its_range(dtype: torch.dtype) -> None:
    # values that 8 bits hold exactly, at position 0 where nothing turns: the interpreter rounds in its own way
    shape = HeadShape(2, 2, 32, 32)
    pool = Pool([2], shape, dtype=dtype)
    kv = pool.kv._replace(k_scale=torch.tensor([0.5, 4.0]), v_scale=torch.tensor([2.0, 0.25]))
    largest = torch.finfo(dtype).max
    stored = torch.tensor([0.0, -1.5, 24.0, largest]).repeat(2, 2, 8)
    wide = stored * torch.stack([kv.k_scale, kv.v_scale])[:, :, None]
    qkv = torch.cat([torch.randn(64), wide.flatten() * torch.where(stored.flatten() == largest, 7, 1)])[None]
    step = pool.step([(0, 0, 1)], nothing(1))
    rope_write_kv(qkv, None, None, 1e-6, pool.cos, pool.sin, step, kv, shape)
    block = pool.tables[0, 0]
    assert torch.equal(kv.k[block, :, 0].float(), stored[0])
    assert torch.equal(kv.v[block, :, 0].float(), stored[1])


@st.composite
def requests(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, HeadShape]:
    """Requests of a step: families that share leading blocks, single tokens and runs."""
    kv_heads = draw(st.integers(1, 4))
    shape = HeadShape(kv_heads * draw(st.sampled_from([1, 3, 4, 7, 16])), kv_heads, 64, 64)
    kinds = st.tuples(
        st.integers(0, 2), st.integers(0, 1400), st.one_of(st.just(1), st.just(1), st.integers(1, 300))
    )
    drawn = draw(st.lists(kinds, min_size=1, max_size=40))
    starts = np.array([start for _, start, _ in drawn], np.int32)
    counts = np.array([count for _, _, count in drawn], np.int32)
    shared = [draw(st.integers(0, 70)) for _ in range(3)]
    width = int((starts + counts - 1).max()) // 16 + 1
    tables = np.arange(1, len(drawn) * width + 1, dtype=np.int32).reshape(len(drawn), width) + 10_000
    for table, (family, _, _) in zip(tables, drawn, strict=True):
        n = min(shared[family], width)
        table[:n] = 1000 * family + np.arange(n)
    return starts, counts, tables, shape


@settings(deadline=None, max_examples=40)
@given(requests(), st.sampled_from([1, 20, 132, 10**6]), st.sampled_from([0, 5, 60, 4096]))
def test_every_row_reads_each_of_its_chunks_once(drawn, multiprocessors: int, max_parts: int) -> None:
    starts, counts, tables, shape = drawn
    turn = order(starts, counts, tables)
    assert sorted(turn.tolist()) == list(range(len(starts)))
    starts, counts, tables = starts[turn], counts[turn], tables[turn]
    assert (np.diff((counts > 1).astype(int)) >= 0).all(), "single tokens come first"
    first_row = (np.cumsum(counts) - counts).astype(np.int32)
    plan = plan_attention(first_row, starts, counts, tables, shape, multiprocessors, max_parts)

    assert len(plan.small) + len(plan.big) <= counts.sum() + plan.parts, "the plan buffer has room for these"
    owner = np.repeat(np.arange(len(counts)), counts)
    position = np.arange(len(owner)) - first_row[owner] + starts[owner]
    read: dict[int, list[int]] = {row: [] for row in range(len(owner))}
    parts: list[int] = []
    group = shape.heads // shape.kv_heads
    for items, lines in ((plan.small, 16), (plan.big, 128)):
        cost = items[:, planner.LAST] - items[:, planner.FIRST_CHUNK] * CHUNK
        assert (np.diff(cost) <= 0).all(), "the costly ones come first"
        for first, rows, begin, end, table, least, last, part in items.tolist():
            assert 1 <= rows * group <= lines
            mine = range(first, first + rows)
            assert part == plan.part_of[first]
            assert least == position[first : first + rows].min()
            assert last == min(end * CHUNK - 1, position[first : first + rows].max())
            for row in mine:
                assert (plan.part_of[row] >= 0) == (part >= 0)
                seen = range(begin, min(end, position[row] // CHUNK + 1))
                read[row].extend(seen)
                blocks = slice(begin * 16, min(end * CHUNK - 1, int(position[row])) // 16 + 1)
                assert (tables[table, blocks] == tables[owner[row], blocks]).all(), "another's blocks"
                if part >= 0:
                    assert end == begin + 1, "a partial is of one chunk"
                    parts.extend(plan.part_of[row] + chunk for chunk in seen)
    for row, chunks in read.items():
        assert sorted(chunks) == list(range(position[row] // CHUNK + 1))
    assert len(set(parts)) == len(parts)
    assert max(parts, default=-1) < plan.parts <= max_parts or plan.parts == 0


def test_a_shared_prefix_is_planned_for_all_its_readers_and_own_chunks_for_each() -> None:
    pool = Pool([600] * 6, HeadShape(4, 1, 16, 16), shared=33)
    plan = pool.plan([(i, 599, 1) for i in range(6)], SMALL_CARD)
    assert plan.big[:, :4].tolist() == [[0, 6, 0, 1], [0, 6, 1, 2]]
    assert sorted(plan.small[:, :4].tolist()) == [[i, 1, 2, 3] for i in range(6)]
    assert plan.parts == 18 and plan.part_of.tolist() == [0, 3, 6, 9, 12, 15]


def test_order_puts_sharers_of_chunks_side_by_side_and_runs_last() -> None:
    starts = np.array([300, 20, 599, 300, 700, 0], np.int32)
    counts = np.array([1, 1, 1, 1, 1, 50], np.int32)
    tables = np.arange(6 * 44, dtype=np.int32).reshape(6, 44) + 1000
    tables[[0, 2, 3], :16] = np.arange(16)
    turn = order(starts, counts, tables).tolist()
    assert turn[-1] == 5
    places = sorted(turn.index(i) for i in (0, 2, 3))
    assert places[2] - places[0] == 2


def test_a_buffer_too_short_for_the_plan_is_refused() -> None:
    pool = Pool([40], HeadShape(4, 2, 16, 16))
    plan = pool.plan([(0, 0, 40)], SMALL_CARD)
    with pytest.raises(ValueError, match="the plan needs"):
        pack(np.zeros(20, np.int32), planner.HEADER, plan, pool.tables)


def test_more_than_16_query_heads_a_kv_head_are_refused() -> None:
    one = np.ones(1, np.int32)
    with pytest.raises(ValueError, match="at most 16"):
        plan_attention(one * 0, one, one, one[:, None], HeadShape(32, 1, 64, 64), 132)
