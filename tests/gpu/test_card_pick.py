"""On the card: tokens are chosen, listed and sampled as their plain definitions say, the same bits in any company.

Run with `pytest -m gpu tests/gpu`. Needs an NVIDIA card.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import numpy as np
import pytest
import torch
from on_card import CARD, NEEDS_CARD, on_device

pytest.importorskip("triton")
from ragate_engine import SamplingParams, sampling
from ragate_engine.kernels.triton import pick_reference as reference
from ragate_engine.kernels.triton.pick import (
    COUNTS,
    ROW_WORDS,
    Choices,
    PickWorkspace,
    decode,
    out_width,
    pack_row,
)

pytestmark = NEEDS_CARD
module = import_module("ragate_engine.kernels.triton.pick")  # the package has a function of the same name
FIRST_POSITION = 10
UNTOUCHED = -7


class Rows:
    """Logits, masks of which each token is allowed with some probability, and what every row asks for."""

    def __init__(
        self, count: int, vocab: int, density: float, params: Sequence[SamplingParams] | None = None
    ) -> None:
        random = torch.Generator(CARD).manual_seed(0)
        self.logits = torch.randn(count, vocab, device=CARD, generator=random) * 3
        words = -(-vocab // 32)
        allowed = torch.rand(count, words * 32, device=CARD, generator=random) < density
        bits = (allowed.view(count, words, 32).long() << torch.arange(32, device=CARD)).sum(-1)
        self.mask = torch.where(bits >= 2**31, bits - 2**32, bits).int()
        asked = np.zeros((count, ROW_WORDS), np.int32)
        for w, row in enumerate(params or [SamplingParams()] * count):
            pack_row(asked, w, row, FIRST_POSITION + w, mask=w if density < 1 else -1, slot=w)
        self.asked = torch.from_numpy(asked).to(CARD)

    def run(
        self,
        alternatives: int = 0,
        sampled: bool = False,
        rows: slice = slice(None),
        real: int | None = None,
        masks: bool = True,
        ops: ModuleType = module,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is read back of `rows`, of which `real` are, and the token pool."""
        logits, asked = self.logits[rows].clone(), self.asked[rows].clone()
        workspace = PickWorkspace(len(logits), logits.shape[1], CARD)
        out = torch.full((len(logits), out_width(alternatives)), UNTOUCHED, dtype=torch.int32, device=CARD)
        pool = torch.full((len(self.logits),), UNTOUCHED, dtype=torch.int32, device=CARD)
        mask = self.mask if masks else None
        count = None if real is None else on_device(real)
        ops.choose(workspace, logits, asked, mask, out, pool, count)
        if sampled:
            ops.sample(workspace, logits, asked, mask, out, pool, count)
        return out, pool


def on_host(out: torch.Tensor) -> Choices:
    return decode(out.cpu().numpy())


@pytest.mark.parametrize(
    ("count", "vocab", "alternatives"),
    [(3, 100, 8), (64, 49152, 0), (64, 49152, 8), (5, 50257, 16), (7, 151936, 64), (3, 262144, 8)],
)
def test_the_likeliest_tokens_are_those_of_the_plain_definition(
    count: int, vocab: int, alternatives: int
) -> None:
    for density in (0.5, 0.001, 1.0):
        rows = Rows(count, vocab, density)
        rows.logits[0, 50:90] = rows.logits.max()  # equals
        (out, pool), (plain, _) = rows.run(alternatives), rows.run(alternatives, ops=reference)
        ours, theirs = on_host(out), on_host(plain)
        lse = torch.logsumexp(rows.logits.double(), -1).cpu().numpy()
        assert np.abs(ours.lse - lse).max() < 1e-5
        for name in ("ids", "logits", "top_ids", "top_logits"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), f"{name} {density}")
        assert (pool.cpu().numpy() == np.maximum(ours.ids, 0)).all()


def test_damaged_logits_show_in_the_log_sum_exp_and_minus_infinity_is_never_chosen() -> None:
    rows = Rows(4, 49152, 1.0)
    rows.logits[0, 3] = float("nan")
    rows.logits[1, -1] = float("inf")
    rows.logits[2] = float("-inf")
    found = on_host(rows.run(8)[0])
    assert np.isnan(found.lse).tolist() == [True, True, False, False]
    assert found.lse[2] == -np.inf and found.ids[2] == -1 and (found.top_ids[2] == -1).all()
    assert np.isfinite(found.lse[3]) and found.ids[3] == int(rows.logits[3].argmax())


def mixed(count: int) -> list[SamplingParams]:
    """Greedy rows beside sampled ones, with and without cuts."""
    return [
        SamplingParams(
            temperature=[0, 0.7, 1.0][w % 3], top_k=[0, 20][w % 2], top_p=[1, 0.9][w // 2 % 2], seed=w
        )
        for w in range(count)
    ]


def test_a_row_has_the_same_bits_whoever_is_chosen_for_beside_it_and_however_many_are_listed() -> None:
    rows = Rows(256, 49152, 0.5, mixed(256))
    full, pool = rows.run(8, sampled=True)
    assert torch.equal(pool, full[:, 0])
    for some in (slice(0, 1), slice(17, 18), slice(100, 103), slice(200, 256)):
        for alternatives in COUNTS:
            few, _ = rows.run(alternatives, sampled=True, rows=some)
            assert torch.equal(few[:, :4], full[some, :4]), (some, alternatives)
            shown = on_host(few).top_ids[:, :8]
            assert (shown == on_host(full[some]).top_ids[:, : shown.shape[1]]).all()


def test_a_mask_that_allows_all_is_as_good_as_none() -> None:
    rows = Rows(64, 49152, 0.5, mixed(64))
    rows.asked[:, 0] = -1
    free, _ = rows.run(8, sampled=True, masks=False)
    assert torch.equal(rows.run(8, sampled=True)[0], free)  # others have masks, these rows have none
    rows.asked[:, 0] = torch.arange(64)
    rows.mask.fill_(-1)
    assert torch.equal(rows.run(8, sampled=True)[0], free)


def test_rows_that_are_not_real_are_left_alone() -> None:
    rows = Rows(256, 49152, 0.5, mixed(256))
    full, _ = rows.run(8, sampled=True)
    out, pool = rows.run(8, sampled=True, real=40)
    assert torch.equal(out[:40], full[:40]) and torch.equal(pool[:40], full[:40, 0])
    assert bool((out[40:] == UNTOUCHED).all() and (pool[40:] == UNTOUCHED).all())


@pytest.mark.parametrize("warps", [4, 16])
def test_the_number_of_warps_changes_no_bit(monkeypatch: pytest.MonkeyPatch, warps: int) -> None:
    rows = Rows(64, 49152, 0.5, mixed(64))
    full, _ = rows.run(8, sampled=True)
    monkeypatch.setattr(module, "SEGMENT_WARPS", warps)
    monkeypatch.setattr(module, "SETTLE_WARPS", warps)
    assert torch.equal(rows.run(8, sampled=True)[0], full)


def test_a_graph_chooses_for_as_many_rows_as_the_device_says_when_it_runs() -> None:
    rows = Rows(256, 49152, 0.5, mixed(256))
    full, _ = rows.run(8, sampled=True)
    real = on_device(40)
    workspace = PickWorkspace(256, 49152, CARD)
    out, pool = torch.empty_like(full), torch.zeros(256, dtype=torch.int32, device=CARD)
    arguments = (workspace, rows.logits, rows.asked, rows.mask, out, pool, real)
    module.choose(*arguments)
    module.sample(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module.choose(*arguments)
        module.sample(*arguments)
    for count in (256, 40, 1, 256):
        out.fill_(UNTOUCHED)
        real.fill_(count)
        graph.replay()
        assert torch.equal(out[:count], full[:count])
        assert bool((out[count:] == UNTOUCHED).all())


def within_rounding(
    logits: np.ndarray, allowed: np.ndarray, params: SamplingParams, position: int, ours: int, theirs: int
) -> bool:
    """Whether rounding may choose between two tokens: scores, or the weight at a cut, are that near."""
    tokens = np.flatnonzero(allowed)
    values = logits[tokens].astype(np.float64)
    scaled = (values - values.max()) / params.temperature
    score = dict(zip(tokens.tolist(), scaled + sampling.gumbel(params.seed, position, tokens), strict=True))
    kept = np.lexsort((tokens, -scaled))[: params.top_k or None]
    weight = np.exp(scaled[kept])
    share = (np.cumsum(weight) - weight) / weight.sum()
    return bool(np.abs(share - params.top_p).min() < 1e-5 or abs(score[ours] - score[theirs]) < 1e-4)


def test_sampled_tokens_are_those_of_the_plain_definition_on_a_cpu() -> None:
    random = np.random.default_rng(5)
    params = [
        SamplingParams(
            temperature=float(random.choice([0.2, 0.7, 1.0, 1.5, 5.0])),
            top_k=int(random.choice([0, 0, 1, 20, 300, 20000])),
            top_p=float(random.choice([1.0, 1.0, 0.95, 0.8, 0.1])),
            seed=int(random.integers(2**63)),
        )
        for _ in range(256)
    ]
    rows = Rows(256, 32000, 0.5, params)
    out, pool = rows.run(sampled=True)
    found = on_host(out)
    logits, bits = rows.logits.cpu().numpy(), rows.mask.cpu().numpy()
    near = 0
    for w, asked in enumerate(params):
        allowed = sampling.allowed_tokens(bits[w], logits.shape[1])
        expected, position = (
            sampling.sample(logits[w], allowed, asked, FIRST_POSITION + w),
            FIRST_POSITION + w,
        )
        token = int(found.ids[w])
        if token != expected:
            assert within_rounding(logits[w], allowed, asked, position, token, expected), (w, asked)
            near += 1
    assert near <= 4
    assert (found.logits == logits[np.arange(256), found.ids]).all()
    assert (pool.cpu().numpy() == found.ids).all()
