"""On the card: embedding, norms, rope and the write of K and V are right, for one row and for 8,192, bit by bit.

Run with `pytest -m gpu tests/gpu`. Needs an NVIDIA card.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from on_card import BF16, CARD, E4M3, E5M2, FP16, NEEDS_CARD, error, name_of, on_device

pytest.importorskip("triton")
from ragate_engine.kernels import HeadShape, LayerKV, StepInputs, reference
from ragate_engine.kernels.triton.attention import make_kv
from ragate_engine.kernels.triton.rope import rope_write_kv
from ragate_engine.kernels.triton.rowwise import embed, last_norm, rms_norm

pytestmark = NEEDS_CARD
ROWS = 8192
SOME = (0, 1, 2047, ROWS - 2, ROWS - 1)
"""Rows that are looked at alone."""
TOLERANCE = {BF16: 4e-3, FP16: 1e-3}


def ints(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.int32).to(CARD)


def step_of(**fields: torch.Tensor | None) -> StepInputs:
    """Inputs of a step of which a kernel reads only some."""
    none = ints(torch.zeros(1))
    step = StepInputs(none, none, none, none, None, none)
    return replace(step, **fields)


def exact_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
@pytest.mark.parametrize("width", [576, 1536, 4096])
@pytest.mark.parametrize("adds", [True, False])
def test_a_norm_is_right_and_a_row_has_the_same_bits_alone(
    width: int, adds: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    h, x = torch.randn(2, ROWS, width, device=CARD).to(dtype)
    weight = torch.rand(width, device=CARD).to(dtype) + 0.5
    after = (h.float() + x.float()).to(dtype) if adds else h
    full = h.clone()
    y = rms_norm(full, x if adds else None, weight, 1e-5)
    assert torch.equal(full, after)
    assert error(y, exact_norm(after, weight, 1e-5)) < TOLERANCE[dtype]
    for i in SOME:
        one = h[i : i + 1].clone()
        assert torch.equal(rms_norm(one, x[i : i + 1].clone() if adds else None, weight, 1e-5), y[i : i + 1])
        assert torch.equal(one, after[i : i + 1])
    few = h.clone()
    assert torch.equal(rms_norm(few, x if adds else None, weight, 1e-5, on_device(1000))[:1000], y[:1000])
    assert torch.equal(few[:1000], after[:1000]) and torch.equal(few[1000:], h[1000:])


@pytest.mark.parametrize("width", [576, 1536, 4096])
def test_the_norm_of_the_wanted_rows_is_the_norm_of_their_sum_and_leaves_both_alone(width: int) -> None:
    torch.manual_seed(0)
    h, x = torch.randn(2, ROWS, width, device=CARD).to(BF16)
    weight = torch.rand(width, device=CARD).to(BF16) + 0.5
    before = h.clone(), x.clone()
    wanted = torch.randperm(ROWS)[:700]
    y = last_norm(h, x, weight, 1e-5, step_of(wanted=ints(wanted)))
    both = (h.float() + x.float()).to(BF16)[wanted.to(CARD)]
    assert error(y, exact_norm(both, weight, 1e-5)) < TOLERANCE[BF16]
    for i in (0, 350, 699):
        assert torch.equal(
            last_norm(h, x, weight, 1e-5, step_of(wanted=ints(wanted[i : i + 1]))), y[i : i + 1]
        )
    counted = step_of(wanted=ints(wanted), wanted_rows=on_device(99))
    assert torch.equal(last_norm(h, x, weight, 1e-5, counted)[:99], y[:99])
    assert torch.equal(h, before[0]) and torch.equal(x, before[1])


@pytest.mark.parametrize("scale", [1.0, 33.94])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_an_embedding_is_a_row_of_the_table_and_a_pending_token_comes_from_the_pool(
    rows: int, scale: float
) -> None:
    torch.manual_seed(0)
    table = torch.randn(5000, 1152, device=CARD).to(BF16)
    tokens = torch.randint(0, 5000, (rows,))
    pool = torch.randint(0, 5000, (256,))
    pending = torch.arange(rows) % 3 == 0
    places = torch.arange(rows) % 256
    ids = torch.where(pending, -1 - places, tokens)
    meant = torch.where(pending, pool[places], tokens).to(CARD)
    h = embed(ints(ids), table, scale, step_of(sampled=ints(pool), rows=on_device(rows)))
    assert torch.equal(h, (table[meant].float() * scale).to(BF16))
    few = embed(ints(tokens), table, scale, step_of())
    assert torch.equal(few, (table[tokens.to(CARD)].float() * scale).to(BF16))


class Turn:
    """Rows of q, k and v, and where they go: every eleventh nowhere."""

    def __init__(self, shape: HeadShape, cache: torch.dtype, norms: bool) -> None:
        torch.manual_seed(0)
        self.shape, self.cache = shape, cache
        self.qkv = torch.randn(ROWS, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, device=CARD).to(
            BF16
        )
        self.norms = (torch.rand(2, shape.head_dim, device=CARD).to(BF16) + 0.5) if norms else [None, None]
        half = shape.rotary_dim // 2
        angles = torch.arange(9000, dtype=torch.float64)[:, None] * 1e4 ** -(torch.arange(half) / half)
        self.cos, self.sin = angles.cos().float().to(CARD), angles.sin().float().to(CARD)
        self.position = torch.randint(0, 9000, (ROWS,))
        self.slots = torch.randperm(ROWS + 160)[:ROWS]
        self.slots[::11] = -1
        self.sizes = torch.rand(2, shape.kv_heads, device=CARD) * 0.01 + 0.01

    def empty(self) -> LayerKV:
        """A cache in which nothing is written: all NaN."""
        kv = make_kv(ROWS // 16 + 10, self.shape.kv_heads, self.shape.head_dim, self.cache, CARD)
        for tensor in kv[:2]:
            tensor.view(torch.uint8).fill_(255)
        if kv.k_scale is None:
            return kv
        return kv._replace(k_scale=self.sizes[0].clone(), v_scale=self.sizes[1].clone())

    def run(self, rows: slice, real: int | None = None) -> tuple[torch.Tensor, LayerKV]:
        """What becomes of `rows` of q, k and v, and of an empty cache."""
        kv, qkv = self.empty(), self.qkv[rows].clone()
        step = step_of(
            positions=ints(self.position[rows]),
            slots=ints(self.slots[rows]),
            rows=None if real is None else on_device(real),
        )
        rope_write_kv(qkv, *self.norms, 1e-6, self.cos, self.sin, step, kv, self.shape)
        return qkv, kv

    def heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v, each [rows, its heads, head size]."""
        s = self.shape
        q, k, v = qkv.view(len(qkv), -1, s.head_dim).split([s.heads, s.kv_heads, s.kv_heads], 1)
        return q, k, v

    def exact(self, part: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        """q or k, normed and turned in float64."""
        x = part.double() if norm is None else exact_norm(part, norm, 1e-6)
        position = self.position.to(CARD)
        c, s = self.cos[position, None].double(), self.sin[position, None].double()
        a, b = x[..., : self.shape.rotary_dim].chunk(2, -1)
        return torch.cat([a * c - b * s, b * c + a * s, x[..., self.shape.rotary_dim :]], -1)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """The same bits, NaN included."""
    return torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def at_slots(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """What lies in the slots: [slots, KV heads, head size]."""
    slots = slots.to(CARD)
    return (
        cache.view(torch.uint8).unflatten(-1, (cache.shape[-1], -1))[slots // 16, :, slots % 16].contiguous()
    )


TURNS = [
    (HeadShape(9, 3, 64, 64), BF16, False),
    (HeadShape(32, 8, 128, 128), BF16, False),
    (HeadShape(4, 1, 256, 256), BF16, True),
    (HeadShape(16, 8, 128, 128), BF16, True),
    (HeadShape(8, 8, 96, 72), BF16, True),
    (HeadShape(8, 8, 80, 40), BF16, False),
    (HeadShape(32, 8, 128, 128), E4M3, False),
    (HeadShape(9, 3, 64, 64), E5M2, False),
]


@pytest.mark.parametrize(("shape", "cache", "norms"), TURNS, ids=name_of)
def test_rope_turns_q_and_writes_k_and_v_to_their_slots_the_same_for_one_row_and_for_many(
    shape: HeadShape, cache: torch.dtype, norms: bool
) -> None:
    turn = Turn(shape, cache, norms)
    qkv, kv = turn.run(slice(None))
    q, k, v = turn.heads(turn.qkv)
    turned_q, left_k, left_v = turn.heads(qkv)
    assert error(turned_q, turn.exact(q, turn.norms[0])) < 5e-3
    assert torch.equal(left_k, k) and torch.equal(left_v, v)

    written = turn.slots >= 0
    there = written.to(CARD)
    places = turn.slots[written]
    for found, size, expected in (
        (kv.k, kv.k_scale, turn.exact(k, turn.norms[1])[there]),
        (kv.v, kv.v_scale, v[there].double()),
    ):
        stored = at_slots(found, places).view(cache).squeeze(-1).float()
        if size is None:
            assert error(stored, expected) < 5e-3
            continue
        # as near as 8 bits allow; what is too large is as large as can be
        limit = torch.finfo(cache).max * size[:, None].double()
        assert error(stored * size[:, None], expected.clamp(-limit, limit)) < {E4M3: 0.04, E5M2: 0.08}[cache]
    elsewhere = torch.ones(len(kv.k) * 16, dtype=torch.bool)
    elsewhere[places] = False
    for found in kv[:2]:
        assert bool((at_slots(found, elsewhere.nonzero()[:, 0]) == 255).all())

    for i in SOME:
        one, alone = turn.run(slice(i, i + 1))
        assert torch.equal(one, qkv[i : i + 1])
        slot = turn.slots[i : i + 1]
        if int(slot) >= 0:
            assert all(
                torch.equal(at_slots(a, slot), at_slots(b, slot))
                for a, b in zip(alone[:2], kv[:2], strict=True)
            )
        else:
            assert all(same(a, b) for a, b in zip(alone[:2], turn.empty()[:2], strict=True))

    few, kv_of_few = turn.run(slice(None), real=500)
    assert torch.equal(few[:500], qkv[:500]) and torch.equal(few[500:], turn.qkv[500:])
    _, expected_kv = turn.run(slice(0, 500))
    assert all(same(a, b) for a, b in zip(kv_of_few[:2], expected_kv[:2], strict=True))


def test_rope_is_the_references_but_for_roundings() -> None:
    turn = Turn(HeadShape(8, 8, 96, 72), BF16, norms=True)
    qkv, kv = turn.run(slice(None))
    theirs = reference.make_kv(len(kv.k), 8, 96, BF16, CARD)
    expected = turn.qkv.clone()
    step = step_of(positions=ints(turn.position), slots=ints(turn.slots))
    reference.rope_write_kv(expected, *turn.norms, 1e-6, turn.cos, turn.sin, step, theirs, turn.shape)
    assert error(turn.heads(qkv)[0], turn.heads(expected)[0]) < 5e-3
    places = turn.slots[turn.slots >= 0].to(CARD)
    for mine, other in zip(kv[:2], theirs[:2], strict=True):
        pair = (cache[places // 16, :, places % 16] for cache in (mine, other))
        assert error(*pair) < 5e-3
