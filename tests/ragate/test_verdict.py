"""The verdict: words, limits and exit codes of GATE.md under the point rule."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import FINGERPRINT, broken_run, errored_run, good_run, partial_run, plain_run, worse_run

from ragate.errors import ConfigError
from ragate.gate.baseline import Baseline, baseline_of
from ragate.gate.verdict import SEVERITY, GateResult, decide

if TYPE_CHECKING:
    from ragate.run import Run

DATE = datetime(2025, 11, 20, 9, 30, tzinfo=UTC)


def _baseline(run: Run) -> Baseline:
    return baseline_of(run, commit=None, date=DATE)


def _gate(base: list[float], head: list[float | str], **options: object) -> GateResult:
    return decide(_baseline(plain_run({"m": base})), plain_run({"m": head}), **options)  # type: ignore[arg-type]


def test_a_drop_above_the_limit_fails_and_the_sentence_has_all_the_numbers() -> None:
    result = _gate([0.92] * 100, [0.859] * 100)
    assert result.sentence == "FAIL: m fell 6.1 pt (limit 4.6 pt), from 0.920 to 0.859 over 100 items"
    assert (result.verdict, result.exit_code) == ("FAIL", 1)
    assert result.metrics[0].limit == pytest.approx(0.046)
    assert result.metrics[0].limit_note == "5 % of 0.920"


def test_a_drop_below_the_limit_passes_and_says_how_close_it_came() -> None:
    result = _gate([0.92] * 20, [0.9] * 20)
    assert result.sentence.startswith(
        "PASS: no metric fell to its limit; closest: m fell 2.0 pt (limit 4.6 pt)"
    )
    assert result.exit_code == 0


@pytest.mark.parametrize("base", [1.0, 0.9, 0.7, 0.3, 1 / 3, 0.123456789])
@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_a_drop_of_exactly_the_limit_fails_whatever_the_rounding(base: float, mode: str) -> None:
    head = base * 0.95 if mode == "relative" and base >= 0.2 else base - 0.05
    assert _gate([base] * 37, [head] * 37, mode=mode).verdict == "FAIL"
    assert _gate([base] * 37, [head + 1e-6] * 37, mode=mode).verdict == "PASS"


def test_numbers_that_look_alike_get_digits_until_they_differ() -> None:
    assert "fell 4.598 pt (limit 4.600 pt)" in _gate([0.92] * 10, [0.92 - 0.045978] * 10).sentence


def test_an_absolute_limit_is_in_score_points() -> None:
    assert _gate([0.6] * 10, [0.56] * 10, mode="absolute").verdict == "PASS"
    assert _gate([0.6] * 10, [0.56] * 10, mode="relative").verdict == "FAIL"


def test_a_low_baseline_mean_makes_the_limit_absolute_and_says_so() -> None:
    metric = _gate([0.1] * 10, [0.06] * 10).metrics[0]
    assert (metric.mode_used, metric.limit, metric.verdict) == ("absolute", 0.05, "PASS")
    assert "the limit is absolute" in metric.sentence
    assert _gate([0.2] * 10, [0.2] * 10).metrics[0].mode_used == "relative"


def test_an_unchanged_run_passes_with_a_drop_of_exactly_zero() -> None:
    run = good_run()
    result = decide(_baseline(run), run)
    assert [m.drop for m in result.metrics] == [0.0] * 4
    assert [m.detectable for m in result.metrics] == [0.0] * 4
    assert result.sentence == "PASS: no score changed; 4 metrics over 100 items"


def test_an_unchanged_run_passes_a_threshold_of_zero_and_any_loss_fails_it() -> None:
    assert _gate([0.9] * 10, [0.9] * 10, threshold=0.0).verdict == "PASS"
    assert _gate([0.9] * 10, [0.9] * 9 + [0.899], threshold=0.0).verdict == "FAIL"


def test_the_run_takes_the_worst_metric_and_names_every_failing_one() -> None:
    result = decide(_baseline(good_run()), worse_run())
    verdicts = {m.metric: m.verdict for m in result.metrics}
    assert verdicts == {
        "context_precision": "PASS",
        "context_recall": "FAIL",
        "faithfulness": "FAIL",
        "answer_relevance": "PASS",
    }
    assert result.verdict == "FAIL"
    assert result.sentence.startswith("FAIL: faithfulness fell")
    assert "; also context_recall fell" in result.sentence


def test_changed_items_are_ranked_by_their_drop() -> None:
    metric = _gate([1.0] * 10, [1.0, 0.5, 0.0, 0.5] + [1.0] * 6).metrics[0]
    assert [(c.item, c.base, c.head, c.drop) for c in metric.changed] == [
        ("q002", 1.0, 0.0, 1.0),
        ("q001", 1.0, 0.5, 0.5),
        ("q003", 1.0, 0.5, 0.5),
    ]


def test_a_difference_of_a_rounding_error_is_no_change() -> None:
    assert _gate([1.0] * 10, [0.9999999999] * 10).metrics[0].changed == ()


def test_the_detectable_drop_is_2486_thousandths_of_the_standard_error() -> None:
    metric = _gate([1.0] * 10, [0.8, 1.0] * 5).metrics[0]
    assert metric.detectable == pytest.approx(2.486 * math.sqrt(0.1**2 * 10 / 9) / math.sqrt(10))


def test_a_critical_item_that_broke_fails_though_the_mean_hardly_moved() -> None:
    result = decide(_baseline(good_run()), broken_run())
    metric = next(m for m in result.metrics if m.metric == "faithfulness")
    assert result.verdict == "FAIL"
    assert metric.broken == ("serving-004",)
    assert (metric.drop or 0) < (metric.limit or 0)
    assert "critical item serving-004 broke on faithfulness" in result.sentence


def test_an_item_that_is_not_critical_may_break() -> None:
    assert _gate([1.0] * 100, [0.0] + [1.0] * 99).verdict == "PASS"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"fingerprint": FINGERPRINT | {"judge": "sha256:other"}},
            "judge differs: baseline sha256:9f2c51d04ab37e66…",
        ),
        (
            {"fingerprint": {k: v for k, v in FINGERPRINT.items() if k != "ragas"}},
            "ragas differs: baseline 0.4.3, run none",
        ),
        ({"testset_hash": "f" * 64}, "the test set differs: hash"),
        ({"partial": True}, "PARTIAL"),
        ({"metrics": ("faithfulness",)}, "context_precision is missing in the run"),
        (
            {"metrics": ("new", "context_precision", "context_recall", "faithfulness", "answer_relevance")},
            "new is missing in the baseline",
        ),
    ],
)
def test_what_cannot_be_compared_is_invalid_and_named(changes: dict[str, object], says: str) -> None:
    run = good_run()
    result = decide(_baseline(run), run.model_copy(update=changes))
    assert (result.verdict, result.exit_code) == ("INVALID", 3)
    assert any(says in reason for reason in result.reasons)
    assert result.sentence.startswith("INVALID: ")


def test_values_that_differ_only_at_their_end_are_shown_where_they_differ() -> None:
    base = _baseline(plain_run({"m": [1.0] * 10}, fingerprint={"judge": "registry/some/long/model/path/q4"}))
    result = decide(
        base, plain_run({"m": [1.0] * 10}, fingerprint={"judge": "registry/some/long/model/path/q8"})
    )
    assert "judge differs: baseline …path/q4, run …path/q8" in result.reasons[0]


def test_a_limited_run_is_invalid_by_the_test_set_hash() -> None:
    result = decide(_baseline(good_run(100)), good_run(12))
    assert [r.split(":")[0] for r in result.reasons] == ["the test set differs"]
    assert "--limit" in (result.way_out or "")
    assert result.metrics[0].paired == 12


def test_fewer_than_ten_paired_items_are_invalid() -> None:
    assert "9 paired items" in _gate([1.0] * 9, [1.0] * 9).sentence
    assert _gate([1.0] * 10, [1.0] * 10).verdict == "PASS"


@pytest.mark.parametrize("state", ["nan", "error", "timeout", "truncated"])
def test_more_than_two_percent_without_a_score_is_invalid_on_either_side(state: str) -> None:
    whole: list[float | str] = [1.0] * 100
    two, three = [*whole[2:], state, state], [*whole[3:], state, state, state]
    assert _gate([1.0] * 100, two).verdict == "PASS"
    result = _gate([1.0] * 100, three)
    assert result.reasons == (f"m has no score for 3 of 100 items of the run (3 {state})",)
    assert "at most 2 %" in (result.way_out or "")
    assert "of the baseline" in _gate(three, whole).sentence  # type: ignore[arg-type]


def test_an_ok_score_that_is_no_number_counts_as_nan() -> None:
    assert "3 nan" in _gate([1.0] * 100, [1.0] * 97 + [float("nan")] * 3).sentence


def test_scores_cut_out_of_a_baseline_or_a_run_are_missing_not_ignored() -> None:
    base, run = _baseline(plain_run({"m": [1.0] * 100})), plain_run({"m": [1.0] * 100})
    cut = base.model_copy(update={"items": dict(list(base.items.items())[:50])})
    assert "50 missing" in decide(cut, run).sentence
    assert "40 missing" in decide(base, run.model_copy(update={"scores": run.scores[40:]})).sentence


def test_a_critical_item_without_a_score_is_invalid() -> None:
    run = good_run()
    scores = tuple(
        s.model_copy(update={"state": "timeout", "value": None})
        if (s.item, s.metric) == ("serving-004", "faithfulness")
        else s
        for s in run.scores
    )
    result = decide(_baseline(run), run.model_copy(update={"scores": scores}))
    assert result.reasons == ("critical item serving-004 has no faithfulness score in the run",)


def test_errors_make_only_their_metric_invalid_but_the_run_with_it() -> None:
    result = decide(_baseline(good_run()), errored_run())
    assert {m.metric: m.verdict for m in result.metrics}["faithfulness"] == "INVALID"
    assert {m.metric: m.verdict for m in result.metrics}["context_recall"] == "PASS"
    assert result.verdict == "INVALID"


def test_a_partial_run_says_so_and_does_not_call_its_missing_scores_errors() -> None:
    result = decide(_baseline(good_run()), partial_run())
    assert len(result.reasons) == 1
    assert result.sentence.startswith("INVALID: the run is PARTIAL")


def test_naming_metrics_narrows_the_comparison_to_them() -> None:
    base = _baseline(good_run())
    result = decide(base, worse_run(), metrics=["answer_relevance"])
    assert [m.metric for m in result.metrics] == ["answer_relevance"]
    assert result.verdict == "PASS"
    assert decide(base, good_run(), metrics=["nonsense"]).verdict == "INVALID"
    assert decide(base, good_run(), metrics=[]).verdict == "INVALID"


def test_the_fingerprint_of_a_metric_that_is_not_compared_is_no_obstacle() -> None:
    fields = FINGERPRINT | {"prompt_faithfulness": "a", "prompt_answer_relevance": "b"}
    base = _baseline(good_run(fingerprint=fields))
    own = {k: v for k, v in fields.items() if k not in ("embeddings", "prompt_answer_relevance")}
    run = good_run(fingerprint=own)
    run = run.model_copy(update={"metrics": ("context_precision", "context_recall", "faithfulness")})
    assert decide(base, run, metrics=["faithfulness"]).verdict == "PASS"
    assert decide(base, run).reasons == ("answer_relevance is missing in the run",)
    other = run.model_copy(update={"fingerprint": own | {"prompt_faithfulness": "c"}})
    assert decide(base, other, metrics=["faithfulness"]).verdict == "INVALID"


@pytest.mark.parametrize("threshold", [-0.01, 1.01, 5, float("nan")])
def test_a_threshold_that_is_no_share_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"5 % is 0\.05"):
        _gate([1.0] * 10, [1.0] * 10, threshold=threshold)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="threshold_mode"):
        _gate([1.0] * 10, [1.0] * 10, mode="percent")


SCORES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=10, max_size=40)


@given(SCORES, st.integers(0, 39), st.floats(0, 1), st.sampled_from(["relative", "absolute"]))
def test_a_lower_score_never_gives_a_milder_verdict(
    scores: list[tuple[float, float]], at: int, lower: float, mode: str
) -> None:
    base, head = [b for b, _ in scores], [h for _, h in scores]
    worse = list(head)
    worse[at % len(head)] = min(head[at % len(head)], lower)
    before, after = _gate(base, [*head], mode=mode), _gate(base, [*worse], mode=mode)
    assert SEVERITY.index(after.verdict) >= SEVERITY.index(before.verdict)
    assert (after.metrics[0].drop or 0) >= (before.metrics[0].drop or 0)


@given(SCORES, st.integers(0, 2**32))
def test_the_order_of_the_items_is_irrelevant(scores: list[tuple[float, float]], seed: int) -> None:
    base = _baseline(plain_run({"m": [b for b, _ in scores]}))
    run = plain_run({"m": [h for _, h in scores]})
    rng = random.Random(seed)
    mixed = run.model_copy(
        update={
            "items": tuple(rng.sample(run.items, len(run.items))),
            "scores": tuple(rng.sample(run.scores, len(run.scores))),
        }
    )
    shuffled = base.model_copy(update={"items": dict(rng.sample(list(base.items.items()), len(base.items)))})
    assert decide(shuffled, mixed) == decide(base, run)


@given(st.lists(st.floats(0, 1), min_size=10, max_size=60))
def test_equal_scores_always_pass_with_no_drop(values: list[float]) -> None:
    result = _gate(values, [*values])
    assert (result.verdict, result.metrics[0].drop) == ("PASS", 0.0)
