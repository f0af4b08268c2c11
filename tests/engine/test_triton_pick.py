"""Choosing tokens on the card (interpreted here): greedy, alternatives and sampling against their plain definitions."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from ragate_engine import sampling
from ragate_engine.request import SamplingParams

pytest.importorskip("triton")

import triton
import triton.language as tl

from ragate_engine.kernels.triton import pick_reference as reference
from ragate_engine.kernels.triton.pick import (
    ROW_WORDS,
    PickWorkspace,
    _uniform,
    decode,
    likeliest,
    out_width,
    pack_row,
    padded_count,
    pick,
)

# the package has a function of the same name
module = sys.modules["ragate_engine.kernels.triton.pick"]
GREEDY = SamplingParams()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small vocabularies in several segments: the interpreter takes its time by the program."""
    monkeypatch.setattr(module, "SEGMENT", 1024)


def bits_of(allowed: np.ndarray) -> torch.Tensor:
    """bool [n, V] -> int32 bits [n, ceil(V / 32)], the bits past V set, as a careless grammar may leave them."""
    padded = np.pad(allowed, ((0, 0), (0, -allowed.shape[1] % 32)), constant_values=True)
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32).copy())


class Step:
    """Logits and rows; `run` gives what is read back from the card and the token pool."""

    def __init__(
        self,
        logits: torch.Tensor,
        params: list[SamplingParams] | None = None,
        allowed: np.ndarray | None = None,
    ) -> None:
        self.logits = logits
        self.params = params or [GREEDY] * len(logits)
        self.allowed = np.ones(logits.shape, bool) if allowed is None else allowed
        self.mask = None if allowed is None else bits_of(allowed)
        self.rows = np.zeros((len(logits), ROW_WORDS), np.int32)
        for w, p in enumerate(self.params):
            pack_row(self.rows, w, p, position=10 + w, mask=-1 if allowed is None else w, slot=w)

    def run(self, count=0, ops=module, sampled=False, only=None, real=None):
        """`only`: these rows alone, in this order; `real`: how many of the rows are real."""
        only = list(range(len(self.logits))) if only is None else only
        logits, rows = self.logits[only].contiguous(), torch.from_numpy(self.rows[only])
        out = torch.full((len(only), out_width(count)), -7, dtype=torch.int32)
        pool = torch.full((len(self.logits),), -7, dtype=torch.int32)
        real = None if real is None else torch.tensor([real], dtype=torch.int32)
        workspace = PickWorkspace(len(only), logits.shape[1], CPU)
        ops.choose(workspace, logits, rows, self.mask, out, pool, real)
        if sampled:
            ops.sample(workspace, logits, rows, self.mask, out, pool, real)
        return out, pool

    def check(self, count: int):
        """Compare with the reference: ids and logits exactly, log-sum-exp within 1e-5."""
        (out, pool), (expected, expected_pool) = self.run(count), self.run(count, reference)
        ours, theirs = decode(out.numpy()), decode(expected.numpy())
        np.testing.assert_allclose(ours.lse, theirs.lse, atol=1e-5)
        for name in ("ids", "logits", "top_ids", "top_logits"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)
        assert torch.equal(pool, expected_pool)
        return ours


@pytest.mark.parametrize(
    ("vocab", "count"), [(100, 0), (1024, 8), (2500, 0), (2500, 16), (1057, 64), (33, 64), (1, 8)]
)
def test_the_likeliest_allowed_tokens_are_found_in_every_segment(vocab: int, count: int) -> None:
    torch.manual_seed(vocab)
    logits = torch.randn(4, vocab) * 5
    allowed = np.random.default_rng(vocab).random(logits.shape) < np.array([[1.0], [0.5], [0.02], [0.5]])
    Step(logits, allowed=allowed).check(count)
    ours = Step(logits[:1]).check(count)
    assert ours.ids.tolist() == logits[:1].argmax(1).tolist()


def test_the_lowest_id_comes_first_among_equals() -> None:
    logits = torch.randn(3, 2500).clamp(max=3)
    logits[0, [2400, 20, 1500, 1024, 60]] = 7.0
    logits[1] = 0.0
    logits[1, 0] = -0.0
    logits[2, [700, 701]] = torch.tensor([0.0, -0.0])
    logits[2] -= logits[2].max()
    ours = Step(logits).check(8)
    assert ours.top_ids[0, :5].tolist() == [20, 60, 1024, 1500, 2400]
    assert ours.ids[1] == 0 and ours.top_ids[1].tolist() == list(range(8))


def test_each_row_has_its_own_line_of_the_masks_or_none() -> None:
    logits = torch.randn(3, 1500)
    masks = np.zeros((2, 1500), bool)
    masks[0, 1400] = masks[1, 3] = True
    step = Step(logits)
    step.mask = bits_of(masks)
    step.rows[:, 0] = [1, -1, 0]
    ids = decode(step.run()[0].numpy()).ids
    assert ids.tolist() == [3, int(logits[1].argmax()), 1400]


def test_a_mask_that_allows_nothing_is_told_and_the_pool_still_holds_a_token() -> None:
    allowed = np.ones((3, 1500), bool)
    allowed[1] = False
    allowed[2] = False
    allowed[2, [4, 1200]] = True
    ours = Step(torch.randn(3, 1500), allowed=allowed).check(8)
    assert ours.ids[1] == -1 and ours.logits[1] == -np.inf and np.isfinite(ours.lse[1])
    assert sorted(ours.top_ids[2, :2]) == [4, 1200] and set(ours.top_ids[2, 2:]) == {-1}
    _, pool = Step(torch.randn(3, 1500), allowed=allowed).run()
    assert pool[1] == 0


def test_minus_infinity_is_never_chosen() -> None:
    logits = torch.full((2, 1500), float("-inf"))
    logits[1, 1300] = -4.0
    with np.errstate(divide="ignore"):
        ours = Step(logits).check(8)
    assert ours.ids.tolist() == [-1, 1300]
    assert ours.lse.tolist() == [-np.inf, -4.0]
    assert ours.top_ids[1].tolist() == [1300] + [-1] * 7


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_a_damaged_logit_anywhere_shows_in_the_log_sum_exp(damage: float) -> None:
    logits = torch.randn(4, 2500)
    logits[0, 0] = logits[1, 1500] = logits[2, 2499] = damage
    hot = [SamplingParams(temperature=1.0, top_p=0.9, top_k=5)] * 4
    for sampled in (False, True):
        out, pool = Step(logits, hot).run(8, sampled=sampled)
        assert np.isnan(decode(out.numpy()).lse).tolist() == [True, True, True, False]
        assert ((pool >= 0) & (pool < 2500)).all()


def test_log_sum_exp_is_over_all_tokens_and_exact_for_any_range() -> None:
    torch.manual_seed(1)
    logits = torch.randn(4, 3000) * torch.tensor([[1e-3], [1.0], [30.0], [1.0]])
    logits[3] -= 1e4
    allowed = np.zeros((4, 3000), bool)
    allowed[:, 7] = True
    ours = decode(Step(logits, allowed=allowed).run()[0].numpy())
    expected = logits.double().logsumexp(-1).numpy()
    np.testing.assert_allclose(ours.lse, expected, rtol=1e-6)


def test_a_rows_bits_depend_on_no_neighbour_and_no_count() -> None:
    torch.manual_seed(2)
    params = [SamplingParams(temperature=t, top_k=k, top_p=p, seed=5) for t, k, p in MIXED]
    step = Step(
        torch.randn(len(MIXED), 1500) * 3, params, np.random.default_rng(0).random((len(MIXED), 1500)) < 0.7
    )
    full, pool = step.run(8, sampled=True)
    for only in ([3], [5, 1, 4]):
        part, _ = step.run(8, sampled=True, only=only)
        assert torch.equal(part, full[only])
    assert torch.equal(step.run(0, sampled=True)[0], full[:, :4])
    assert torch.equal(step.run(16)[0][:, 4:12], full[:, 4:12])
    assert torch.equal(pool, full[:, 0])


def test_padded_rows_write_nothing() -> None:
    step = Step(torch.randn(4, 1100), [SamplingParams(temperature=1.0)] * 4)
    full, _ = step.run(8, sampled=True)
    out, pool = step.run(8, sampled=True, real=2)
    assert torch.equal(out[:2], full[:2])
    assert (out[2:] == -7).all() and (pool[2:] == -7).all()


def test_a_row_without_a_slot_leaves_the_pool_alone() -> None:
    step = Step(torch.randn(2, 100), [SamplingParams(temperature=1.0)] * 2)
    step.rows[:, 1] = [-1, 0]
    out, pool = step.run(sampled=True)
    assert pool.tolist() == [int(out[1, 0]), -7]


def test_pick_and_likeliest_answer_alone() -> None:
    torch.manual_seed(3)
    logits = torch.randn(3, 1500)
    allowed = np.random.default_rng(3).random((3, 1500)) < 0.5
    ids, lse = pick(logits, bits_of(allowed))
    ours = Step(logits, allowed=allowed).check(16)
    assert ids.tolist() == ours.ids.tolist() and lse.tolist() == ours.lse.tolist()
    top, values = likeliest(logits, bits_of(allowed), 5)
    assert top.tolist() == ours.top_ids[:, :5].tolist() and values.tolist() == ours.top_logits[:, :5].tolist()
    with pytest.raises(ValueError, match="at most 64"):
        likeliest(logits, bits_of(allowed), 65)
    assert [padded_count(n) for n in (0, 1, 8, 9, 17, 64)] == [0, 8, 8, 16, 64, 64]


# ---- noise ----


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, (2**32 - 1, 2**32 - 1), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: list[int], key: tuple[int, int], expected: list[int]
) -> None:
    # kat_vectors of Random123
    words = sampling.philox(np.array([counter, counter], np.uint32), key)
    assert words.tolist() == [expected, expected]


@triton.jit
def _write_uniform(low, high, position, first, to, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    row = tl.load(low), tl.load(high), tl.load(position)
    tl.store(to + at, _uniform(row[0], row[1], row[2], first, COUNT))


@pytest.mark.parametrize(
    ("seed", "position", "first"),
    [(0, 0, 0), (1, 7, 1024), (2**63 + 12345, 131071, 261120), (-1, 3, 2048), (2**80 + 9, 1, 0)],
)
def test_the_card_and_the_cpu_draw_the_same_numbers(seed: int, position: int, first: int) -> None:
    rows = np.zeros((1, ROW_WORDS), np.int32)
    pack_row(rows, 0, SamplingParams(temperature=1.0, seed=seed), position)
    low, high, place = (torch.from_numpy(rows[0, i : i + 1]) for i in (5, 6, 7))
    drawn = torch.empty(1024)
    _write_uniform[(1,)](low, high, place, first, drawn, 1024)
    expected = sampling.uniform(seed, position, np.arange(first, first + 1024))
    assert drawn.numpy().tobytes() == expected.tobytes()
    assert expected.min() > 0 and expected.max() < 1
    few = np.array([3, 500, 501, 1023])
    assert (sampling.uniform(seed, position, first + few) == expected[few]).all()


def test_noise_differs_by_seed_position_and_token() -> None:
    tokens = np.arange(4000)
    streams = [sampling.uniform(seed, position, tokens) for seed in (0, 1, 2**32) for position in (0, 1)]
    values = np.concatenate(streams)
    assert len(np.unique(values)) > len(values) - 60  # floats have 24 bits: a few meet
    assert abs(values.mean() - 0.5) < 0.01 and abs((values**2).mean() - 1 / 3) < 0.01
    assert np.abs(np.corrcoef(streams) - np.eye(6)).max() < 0.06


# ---- sampling ----

MIXED = [
    (0.7, 20, 0.8), (1.0, 0, 1.0), (0.0, 0, 1.0), (1.0, 0, 0.9), (2.0, 300, 1.0), (0.1, 0, 0.5), (100.0, 3, 0.4),
    (1.0, 5000, 0.99), (1e-3, 0, 1.0), (1e3, 1, 1.0), (1.0, 0, 1e-9),
]  # fmt: skip


def near_tie(step: Step, w: int, ours: int, theirs: int) -> bool:
    """Whether rounding may choose between two tokens: scores, or the weight at a cut, within 1e-4."""
    params, x = step.params[w], step.logits[w].numpy().astype(np.float64)
    x = np.where(step.allowed[w], x, -np.inf)
    scaled = (x - x.max()) / params.temperature
    tokens = np.arange(len(x))
    score = scaled + sampling.gumbel(params.seed, 10 + w, tokens)
    order = np.lexsort((tokens, -scaled))[: params.top_k or None]
    weight = np.exp(scaled[order])
    share = (np.cumsum(weight) - weight) / weight.sum()
    at_cut = np.abs(share - params.top_p).min() < 1e-5
    return at_cut or abs(score[ours] - score[theirs]) < 1e-4


def assert_samples_by_the_definition(step: Step) -> None:
    out, pool = step.run(0, sampled=True)
    expected, _ = step.run(0, reference, sampled=True)
    differing = [w for w in range(len(out)) if out[w, 0] != expected[w, 0]]
    assert len(differing) <= 2
    for w in differing:
        assert near_tie(step, w, int(out[w, 0]), int(expected[w, 0])), (w, step.params[w])
    chosen = decode(out.numpy())
    assert (chosen.logits == step.logits.numpy()[np.arange(len(out)), chosen.ids]).all()
    assert (pool.numpy() == chosen.ids).all()


@pytest.mark.parametrize("cases", [50, pytest.param(600, marks=pytest.mark.slow)])
def test_sampled_tokens_are_those_of_the_plain_definition(cases: int) -> None:
    rng = np.random.default_rng(11)
    params = [
        SamplingParams(
            temperature=float(rng.choice([0.2, 0.7, 1.0, 1.5, 5.0])),
            top_k=int(rng.choice([0, 0, 1, 4, 40, 700])),
            top_p=float(rng.choice([1.0, 1.0, 0.95, 0.6, 0.1])),
            seed=int(rng.integers(2**63)),
        )
        for _ in range(cases)
    ]
    logits = torch.from_numpy(rng.normal(size=(cases, 900)).astype(np.float32)) * 3
    assert_samples_by_the_definition(Step(logits, params, rng.random(logits.shape) < 0.8))


def test_sampling_crosses_segments_and_keeps_to_the_mask() -> None:
    rng = np.random.default_rng(12)
    params = [SamplingParams(temperature=t, top_k=k, top_p=p, seed=s) for s in (1, 2) for t, k, p in MIXED]
    logits = torch.from_numpy(rng.normal(size=(len(params), 1500)).astype(np.float32)) * 2
    step = Step(logits, params, rng.random(logits.shape) < rng.random((len(params), 1)))
    assert_samples_by_the_definition(step)


def test_ties_at_a_cut_keep_the_lowest_ids() -> None:
    logits = torch.zeros(12, 1000)
    logits[:, 900] = 1.0
    cuts = [(3, 1.0), (0, 0.01), (40, 0.5)]
    params = [SamplingParams(temperature=1.0, top_k=k, top_p=p, seed=s) for s in range(4) for k, p in cuts]
    step = Step(logits, params)
    assert_samples_by_the_definition(step)
    ids = decode(step.run(0, sampled=True)[0].numpy()).ids
    assert set(ids[0::3]) <= {900, 0, 1} and len(set(ids[0::3])) > 1
    assert max(i for i in ids[1::3] if i != 900) < 12
    assert max(i for i in ids[2::3] if i != 900) < 21


def test_rows_of_temperature_0_stay_greedy_and_a_single_allowed_token_is_taken() -> None:
    logits = torch.randn(2, 1500)
    allowed = np.ones((2, 1500), bool)
    allowed[1] = False
    allowed[1, 1234] = True
    step = Step(logits, [GREEDY, SamplingParams(temperature=1.0, top_p=0.5)], allowed)
    ids = decode(step.run(sampled=True)[0].numpy()).ids
    assert ids.tolist() == [int(logits[0].argmax()), 1234]


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(("top_k", "top_p", "kept"), [(0, 1.0, 8), (5, 1.0, 5), (0, 0.8, 5)])
def test_tokens_come_as_often_as_their_probability_says(top_k: int, top_p: float, kept: int) -> None:
    logits = np.log(np.array([0.05, 0.3, 0.02, 0.2, 0.15, 0.08, 0.12, 0.08])).astype(np.float32)
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, seed=3)
    allowed = np.ones(8, bool)
    drawn = np.bincount([sampling.sample(logits, allowed, params, i) for i in range(4000)], minlength=8)
    order = np.argsort(-logits, kind="stable")[:kept]
    probabilities = np.exp(logits[order]) / np.exp(logits[order]).sum()
    assert drawn.sum() == drawn[order].sum()
    # 99.9 % quantiles of chi-square with kept - 1 degrees of freedom
    assert chi_square(drawn[order], probabilities) < {8: 24.3, 5: 18.5}[kept]


def test_a_rare_token_among_many_is_not_lost_to_rounding() -> None:
    # 30,000 tokens of 3.3e-7 each beside one of 0.99: together they must come once in a hundred
    logits = np.full(30_001, np.log(0.01 / 30_000), np.float32)
    logits[500] = np.log(0.99)
    allowed = np.ones(len(logits), bool)
    params = SamplingParams(temperature=1.0, seed=8)
    others = [t for i in range(800) if (t := sampling.sample(logits, allowed, params, i)) != 500]
    assert 1 <= len(others) <= 20 and len(set(others)) == len(others)
