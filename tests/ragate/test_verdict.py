"""The verdict: words, limits, floors, reserve, drift and exit codes of GATE.md."""

from __future__ import annotations

import math
import random
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import FINGERPRINT, broken_run, errored_run, good_run, partial_run, plain_run, worse_run

from ragate.errors import ConfigError
from ragate.gate.baseline import Baseline, baseline_of
from ragate.gate.stats import clustered, holm, johnson_bounds, sign_flip_p
from ragate.gate.verdict import SEVERITY, GateResult, Rule, decide

if TYPE_CHECKING:
    from ragate.run import Run

DATE = datetime(2025, 11, 20, 9, 30, tzinfo=UTC)


def _baseline(run: Run) -> Baseline:
    return baseline_of(run, commit=None, date=DATE)


def _gate(base: list[float], head: list[float | str], **options: object) -> GateResult:
    return decide(_baseline(plain_run({"m": base})), plain_run({"m": head}), **options)  # type: ignore[arg-type]


def test_a_drop_above_the_limit_fails_and_the_sentence_has_all_the_numbers() -> None:
    result = _gate([0.92] * 100, [0.859] * 100)
    assert result.sentence == (
        "FAIL: m fell 6.1 pt (limit 4.6 pt = 5 %, 90 % interval of the drop 6.1 to 6.1 pt, p < 0.001), "
        "from 0.920 to 0.859 over 100 items"
    )
    assert (result.verdict, result.exit_code) == ("FAIL", 1)
    assert result.metrics[0].limit == pytest.approx(0.046)
    assert result.metrics[0].limit_note == "5 % of 0.920"


def test_a_drop_below_the_limit_passes_and_says_how_close_it_came() -> None:
    result = _gate([0.92] * 20, [0.9] * 20)
    assert result.sentence.startswith(
        "PASS: no metric fell to its limit; closest: m fell 2.0 pt (limit 4.6 pt = 5 %, 90 % interval"
    )
    assert result.exit_code == 0


@pytest.mark.parametrize("base", [1.0, 0.9, 0.7, 0.3, 1 / 3, 0.123456789])
@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_a_drop_of_exactly_the_limit_fails_whatever_the_rounding(base: float, mode: str) -> None:
    head = base * 0.95 if mode == "relative" and base >= 0.2 else base - 0.05
    assert _gate([base] * 37, [head] * 37, mode=mode).verdict == "FAIL"
    assert _gate([base] * 37, [head + 1e-6] * 37, mode=mode).verdict == "PASS"


def test_numbers_that_look_alike_get_digits_until_they_differ() -> None:
    said = _gate([0.92] * 10, [0.92 - 0.045978] * 10).sentence
    assert "fell 4.598 pt (limit 4.600 pt = 5 %, 90 % interval of the drop 4.598 to 4.598 pt" in said


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
    assert [(m.lower, m.upper, m.p) for m in result.metrics] == [(0.0, 0.0, 1.0)] * 4
    assert result.sentence == (
        "PASS: no score changed; 4 metrics over 100 items; "
        "every drop is 0.0 pt, interval 0.0 to 0.0 pt, limit 4.2 to 4.7 pt = 5 %"
    )


def test_an_unchanged_run_passes_a_threshold_of_zero_and_any_loss_fails_it() -> None:
    assert _gate([0.9] * 10, [0.9] * 10, threshold=0.0).verdict == "PASS"
    assert _gate([0.9] * 10, [0.9] * 9 + [0.899], threshold=0.0, strategy="point").verdict == "FAIL"
    assert _gate([0.9] * 10, [0.9] * 9 + [0.899], threshold=0.0).exit_code == 2  # one item may be chance
    assert _gate([0.9] * 10, [0.899] * 10, threshold=0.0).verdict == "FAIL"


def test_the_run_takes_the_worst_metric_and_names_every_failing_one() -> None:
    result = decide(_baseline(good_run()), worse_run())
    verdicts = {m.metric: m.verdict for m in result.metrics}
    assert (
        verdicts
        == {
            "context_precision": "INCONCLUSIVE",  # 11 clusters: the upper bound of 1.6 points is 4.5, the limit 4.2
            "context_recall": "FAIL",
            "faithfulness": "FAIL",
            "answer_relevance": "INCONCLUSIVE",
        }
    )
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


def test_a_critical_item_does_not_escape_by_being_cut_out_or_by_an_error_in_the_baseline() -> None:
    whole = plain_run({"m": [0.9] * 100})
    base = _baseline(whole).model_copy(update={"critical": ("q000",)})
    cut = whole.model_copy(update={"items": whole.items[1:], "scores": whole.scores[1:]})
    assert decide(base, cut).reasons == ("critical item q000 has no m score in the run",)
    unscored = _baseline(plain_run({"m": ["nan", *[0.9] * 99]})).model_copy(update={"critical": ("q000",)})
    assert decide(unscored, plain_run({"m": [0.0, *[0.9] * 99]})).reasons == (
        "critical item q000 has no m score in the baseline",
    )


def test_a_floor_is_held_against_all_scores_of_the_run() -> None:
    base, run = plain_run({"m": ["nan", "nan", *[0.81] * 98]}), plain_run({"m": [0.0, 0.0, *[0.81] * 98]})
    result = decide(_baseline(base), run, rules={"m": Rule(min=0.8)})
    assert (result.verdict, result.exit_code) == ("FAIL", 1)
    assert "m is at 0.794, below 0.8, its floor" in result.sentence


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
    assert result.verdict == "INCONCLUSIVE"
    assert decide(base, worse_run(), metrics=["answer_relevance"], strategy="point").verdict == "PASS"
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


# What is chance, and what is not


def test_bounds_and_p_are_those_of_the_paired_drops() -> None:
    rng = random.Random(1)
    base = [rng.choice([1.0, 1.0, 0.75, 0.5]) for _ in range(60)]
    head = [b if rng.random() < 0.7 else rng.random() for b in base]
    metric = _gate(base, [*head]).metrics[0]
    drops = [b - h for b, h in zip(base, head, strict=True)]
    bounds = johnson_bounds(drops)
    assert (metric.lower, metric.upper) == pytest.approx((bounds.lower, bounds.upper))
    assert metric.p == metric.p_alone == sign_flip_p(drops)
    assert metric.items_needed == math.ceil((2.486 * bounds.error * math.sqrt(60) / (metric.limit or 0)) ** 2)


def test_a_drop_above_the_limit_that_chance_may_have_made_is_inconclusive_and_exits_2() -> None:
    result = _gate([1.0] * 40, [0.0] * 3 + [1.0] * 37)  # 7.5 points, p = 1/8
    assert (result.verdict, result.exit_code) == ("INCONCLUSIVE", 2)
    assert result.metrics[0].p == 1 / 8
    assert "INCONCLUSIVE: too few items to tell whether a limit is reached: m fell 7.5 pt" in result.sentence
    assert "about 176 items would tell" in (result.way_out or "")
    assert result.metrics[0].items_needed == 176


def test_a_drop_below_the_limit_whose_bound_is_above_it_is_inconclusive_and_only_warns() -> None:
    result = _gate([1.0] * 40, [0.0] + [1.0] * 39)  # 2.5 points, upper bound above 5
    assert result.metrics[0].upper is not None and result.metrics[0].upper > 0.05
    assert (result.verdict, result.exit_code) == ("INCONCLUSIVE", 0)


@pytest.mark.parametrize(("fallen", "codes"), [(3, (2, 2, 0)), (1, (0, 2, 0))])
def test_what_inconclusive_does_can_be_chosen(fallen: int, codes: tuple[int, int, int]) -> None:
    head = [0.0] * fallen + [1.0] * (40 - fallen)
    found = [_gate([1.0] * 40, [*head], on_inconclusive=how) for how in ("auto", "fail", "warn")]
    assert [result.verdict for result in found] == ["INCONCLUSIVE"] * 3
    assert tuple(result.exit_code for result in found) == codes


def test_by_the_point_strategy_the_mean_alone_decides() -> None:
    assert _gate([1.0] * 40, [0.0] * 3 + [1.0] * 37, strategy="point").verdict == "FAIL"
    passed = _gate([1.0] * 40, [0.0] + [1.0] * 39, strategy="point")
    assert (passed.verdict, passed.exit_code) == ("PASS", 0)
    assert "90 % interval of the drop" in passed.sentence
    assert ", p " not in passed.sentence


def test_a_small_but_real_loss_passes_with_a_warning() -> None:
    head = [0.98] * 50 + [1.0] * 50
    result = _gate([1.0] * 100, [*head])
    assert (result.verdict, result.exit_code) == ("PASS", 0)
    assert result.warnings == result.metrics[0].warnings
    assert "WARN: m lost 1.0 pt, less than the limit but not by chance (p < 0.001)" in result.warnings[0]
    assert result.sentence.endswith(result.warnings[0])
    assert _gate([1.0] * 100, [0.98] + [1.0] * 99).warnings == ()
    # p is 1/32 alone and 1/16 beside another metric: that is no reason to warn
    base, head = [1.0] * 100, [0.98] * 5 + [1.0] * 95
    assert _gate(base, [*head]).warnings != ()
    assert (
        decide(_baseline(plain_run({"a": base, "b": base})), plain_run({"a": head, "b": base})).warnings == ()
    )


def test_several_metrics_must_be_surer_by_holms_rule() -> None:
    head: list[float] = [0.0] * 5 + [1.0] * 45  # p = 1/32 alone, 10 points
    assert _gate([1.0] * 50, [*head]).verdict == "FAIL"
    same = [1.0] * 50
    base = _baseline(plain_run({"a": same, "b": same, "c": same, "d": same}))
    result = decide(base, plain_run({"a": head, "b": same, "c": same, "d": same}))
    assert [m.p for m in result.metrics] == pytest.approx(holm([1 / 32, 1, 1, 1]))
    assert (result.metrics[0].p, result.metrics[0].p_alone) == (4 / 32, 1 / 32)
    assert result.verdict == "INCONCLUSIVE"


def test_items_that_broke_and_were_mended_are_counted_with_mcnemars_p() -> None:
    metric = _gate(
        [1.0] * 10 + [0.1] * 3 + [0.5] * 10, [0.2] * 7 + [1.0] * 3 + [0.9, 0.1, 0.1] + [0.0] * 10
    ).metrics[0]
    assert (metric.items_broken, metric.items_mended) == (7, 1)
    assert metric.mcnemar_p == pytest.approx(9 / 256)


def test_a_judge_of_known_accuracy_shows_part_of_a_drop_and_the_detectable_one_is_larger() -> None:
    metric = _gate([1.0] * 50, [0.9, 1.0] * 25, judge_accuracy=0.75).metrics[0]
    assert metric.detectable_true == pytest.approx(2 * (metric.detectable or 0))
    assert _gate([1.0] * 50, [0.9, 1.0] * 25).metrics[0].detectable_true is None
    known = {"another": 0.9}
    assert _gate([1.0] * 50, [0.9, 1.0] * 25, judge_accuracy=known).metrics[0].detectable_true is None
    with pytest.raises(ConfigError, match="judge_accuracy"):
        _gate([1.0] * 50, [1.0] * 50, judge_accuracy=0.5)


# Clusters


def _clustered_run(head: list[float], clusters: list[str | None]) -> Run:
    run = plain_run({"m": head})
    items = tuple(
        item.model_copy(update={"cluster": cluster})
        for item, cluster in zip(run.items, clusters, strict=True)
    )
    return run.model_copy(update={"items": items})


def test_items_of_one_document_count_together() -> None:
    names: list[str | None] = [f"d{i // 5}" for i in range(60)]
    head = [0.5] * 10 + [1.0] * 50  # two of twelve documents fell
    together = decide(_baseline(_clustered_run([1.0] * 60, names)), _clustered_run(head, names))
    apart = decide(_baseline(plain_run({"m": [1.0] * 60})), plain_run({"m": head}))
    drops = [1.0 - h for h in head]
    assert together.metrics[0].clusters == 12
    assert together.metrics[0].upper == pytest.approx(johnson_bounds(clustered(drops, names)).upper)
    assert together.metrics[0].p == 1 / 4
    assert (together.verdict, apart.verdict) == ("INCONCLUSIVE", "FAIL")
    assert "over 60 items of 12 clusters" in together.sentence


def test_an_item_without_a_cluster_is_one_by_itself_and_few_clusters_are_no_clusters() -> None:
    head = [0.9] * 10 + [1.0] * 20

    def gate(names: list[str | None]) -> GateResult:
        return decide(_baseline(_clustered_run([1.0] * 30, names)), _clustered_run(head, names))

    assert gate(["d1"] * 10 + [None] * 20).metrics[0].clusters == 21
    few, none = gate([f"d{i % 9}" for i in range(30)]), gate([None] * 30)
    assert (few.metrics[0].clusters, none.metrics[0].clusters) == (None, None)
    assert few.metrics[0].upper == none.metrics[0].upper
    assert few.warnings[0].startswith("the items are of 9 clusters, too few to tell how clusters differ")


def test_relabelling_the_clusters_does_not_change_the_verdict_and_is_told() -> None:
    head = [0.5] * 20 + [1.0] * 40  # as twenty items it is no chance, as one document it may be
    names: list[str | None] = [f"d{i // 2}" for i in range(60)]
    base = _baseline(_clustered_run([1.0] * 60, names))
    honest = decide(base, _clustered_run(head, names))
    relabelled = decide(base, _clustered_run(head, ["one"] * 20 + names[20:]))
    assert (honest.verdict, honest.warnings) == ("FAIL", ())
    assert (relabelled.verdict, relabelled.sentence) == ("FAIL", honest.sentence)
    assert relabelled.metrics[0].clusters == 30
    assert relabelled.warnings == (
        "20 items changed cluster: those of the baseline count; if that is wanted, `ragate baseline bless` takes the "
        "new ones",
    )
    removed = decide(base, _clustered_run(head, [None] * 60))
    assert (removed.metrics[0].p, len(removed.warnings)) == (honest.metrics[0].p, 1)


def test_clusters_under_other_names_are_the_same_clusters() -> None:
    base = _baseline(_clustered_run([1.0] * 60, [f"d{i // 5}" for i in range(60)]))
    renamed = decide(base, _clustered_run([1.0] * 60, [f"docs/{i // 5}.md" for i in range(60)]))
    assert (renamed.verdict, renamed.warnings) == ("PASS", ())


def test_a_baseline_that_does_not_know_its_clusters_takes_those_of_the_run_and_says_so() -> None:
    names: list[str | None] = [f"d{i // 5}" for i in range(60)]
    old = _baseline(plain_run({"m": [1.0] * 60})).model_copy(update={"version": 2, "clusters": None})
    result = decide(old, _clustered_run([1.0] * 60, names))
    assert result.metrics[0].clusters == 12
    assert "the run's own clusters count" in result.warnings[0]
    assert decide(old, plain_run({"m": [1.0] * 60})).warnings == ()


@pytest.mark.parametrize(("fallen", "verdict"), [(4, "INCONCLUSIVE"), (5, "FAIL")])
def test_an_open_verdict_says_where_too_few_clusters_changed_for_a_fail(fallen: int, verdict: str) -> None:
    names: list[str | None] = [f"d{i // 5}" for i in range(60)]
    head = [0.5] * (5 * fallen) + [1.0] * (60 - 5 * fallen)
    result = decide(_baseline(_clustered_run([1.0] * 60, names)), _clustered_run(head, names))
    metric = result.metrics[0]
    assert (result.verdict, metric.units_changed, metric.units_needed) == (verdict, fallen, 5)
    told = "only 4 clusters changed, too few to rule out chance: a FAIL takes 5 or more"
    assert (told in result.sentence) == (verdict == "INCONCLUSIVE")
    if verdict == "INCONCLUSIVE":
        assert "items of more clusters would tell" in (result.way_out or "")


def test_the_more_metrics_are_held_at_once_the_more_items_must_change() -> None:
    same, fell = [1.0] * 40, [0.0] * 6 + [1.0] * 34
    for others, needed in ((0, 5), (1, 6), (2, 6), (3, 7)):
        columns = {f"m{i}": same for i in range(others)}
        gate = decide(_baseline(plain_run({"m": same} | columns)), plain_run({"m": fell} | columns))
        assert gate.metrics[0].units_needed == needed
        assert gate.verdict == ("FAIL" if needed <= 6 else "INCONCLUSIVE")
    assert "only 6 items changed, too few to rule out chance: a FAIL takes 7 or more" in gate.sentence


# Limits of one metric, floors, critical items


def _two(head_a: list[float], head_b: list[float], **options: object) -> GateResult:
    base = _baseline(plain_run({"a": [0.8] * 20, "b": [0.8] * 20}))
    return decide(base, plain_run({"a": head_a, "b": head_b}), **options)  # type: ignore[arg-type]


def test_a_metric_may_have_a_limit_and_a_mode_of_its_own() -> None:
    rules = {"b": Rule(threshold=0.02, threshold_mode="absolute")}
    result = _two([0.77] * 20, [0.77] * 20, rules=rules)
    assert [(m.metric, m.verdict, m.limit, m.mode_used) for m in result.metrics] == [
        ("a", "PASS", pytest.approx(0.04), "relative"),
        ("b", "FAIL", 0.02, "absolute"),
    ]
    assert "b fell 3.0 pt (limit 2.0 pt = 2.5 %" in result.sentence


def test_a_mean_below_its_floor_fails_whatever_the_baseline_was() -> None:
    result = _two([0.8] * 20, [0.79] * 20, rules={"b": Rule(min=0.795)})
    assert (result.verdict, result.metrics[1].below_floor) == ("FAIL", True)
    assert "b is at 0.790, below 0.795, its floor; b fell 1.0 pt" in result.sentence
    assert _two([0.8] * 20, [0.8] * 20, rules={"b": Rule(min=0.9)}, strategy="point").verdict == "FAIL"
    assert _two([0.8] * 20, [0.8] * 20, rules={"b": Rule(min=0.8)}).verdict == "PASS"


def test_the_way_out_of_a_breached_floor_is_not_to_bless_it() -> None:
    floor = {"b": Rule(min=0.795)}
    alone = _two([0.8] * 20, [0.79] * 20, rules=floor).way_out
    assert alone == (
        "no new baseline mends a mean below its floor: raise it, or lower `min` of b in ragate.toml if the change is "
        "wanted"
    )
    for a, b in ((0.5, 0.79), (0.8, 0.5)):
        assert _two([a] * 20, [b] * 20, rules=floor).way_out == (
            "if the change is wanted, `ragate baseline bless` accepts it as the new baseline; a mean below its floor "
            "it does not accept: for that, lower `min` of b in ragate.toml"
        )
    assert _two([0.5] * 20, [0.8] * 20, rules=floor).way_out == (
        "if the change is wanted, `ragate baseline bless` accepts it as the new baseline"
    )


def test_a_floor_of_a_metric_that_nobody_scored_is_invalid_not_forgotten() -> None:
    result = _two([0.8] * 20, [0.8] * 20, rules={"c": Rule(min=0.5)})
    assert result.reasons == ("c is missing in the baseline and the run",)


def test_taking_the_mark_off_a_critical_item_does_not_free_it() -> None:
    run = good_run()
    base = _baseline(run)
    assert "serving-004" in base.critical
    broken = broken_run()
    unmarked = broken.model_copy(
        update={"items": tuple(i.model_copy(update={"critical": False}) for i in broken.items)}
    )
    assert decide(base, unmarked).metrics[2].broken == ("serving-004",)
    assert decide(base, unmarked).verdict == "FAIL"


# The reserve


def _with_reserve(core: list[float], reserve: list[float], mark: str = "r") -> Run:
    run = plain_run({"m": [*core, *reserve]}, testset_hash="c" * 64, reserve_hash=mark * 64)
    items = tuple(i.model_copy(update={"reserve": at >= len(core)}) for at, i in enumerate(run.items))
    return run.model_copy(update={"items": items})


def test_a_reserve_that_both_sides_have_is_compared_with_the_rest() -> None:
    base = _baseline(_with_reserve([1.0] * 40, [1.0] * 40))
    core = [0.0] * 3 + [1.0] * 37
    alone = plain_run({"m": core}, testset_hash="c" * 64)
    assert decide(base, alone).verdict == "INCONCLUSIVE"
    assert decide(base, alone).metrics[0].paired == 40
    whole = decide(base, _with_reserve(core, [0.0] * 4 + [1.0] * 36))
    assert (whole.verdict, whole.metrics[0].paired) == ("FAIL", 80)


def test_a_reserve_that_only_the_run_has_or_in_another_version_is_left_out_and_it_says_so() -> None:
    run = _with_reserve([1.0] * 20, [0.0] * 20)
    for base in (
        _baseline(plain_run({"m": [1.0] * 20}, testset_hash="c" * 64)),
        _baseline(_with_reserve([1.0] * 20, [1.0] * 20, mark="s")),
    ):
        result = decide(base, run)
        assert (result.verdict, result.metrics[0].paired) == ("PASS", 20)
        assert result.warnings[0].startswith("the 20 reserve items were not compared: the baseline holds")


# Drift


def test_small_losses_that_each_pass_are_caught_by_the_pinned_release() -> None:
    release = _baseline(plain_run({"m": [1.0] * 100}))
    level, base, caught = 1.0, release, []
    for _ in range(10):
        level -= 0.01
        run = plain_run({"m": [level] * 100})
        step, pinned = decide(base, run), decide(base, run, release=release)
        assert (step.verdict, len(step.warnings)) == ("PASS", 1)
        caught.append(pinned.verdict)
        base = _baseline(run)
    assert caught == ["PASS"] * 4 + ["FAIL"] * 6
    assert pinned.exit_code == 1
    assert pinned.drift is not None and pinned.drift.verdict == "FAIL"
    assert pinned.sentence.startswith("FAIL: against the release of 2025-11-20, m fell 10.0 pt")


def test_a_release_that_cannot_be_compared_is_invalid() -> None:
    run = plain_run({"m": [1.0] * 20})
    other = _baseline(plain_run({"m": [1.0] * 20}, fingerprint={"judge": "older"}))
    result = decide(_baseline(run), run, release=other)
    assert (result.verdict, result.exit_code) == ("INVALID", 3)
    assert result.reasons[0].startswith("against the release of 2025-11-20: ")
    assert "`ragate baseline rescore --baseline RELEASE` judges" in (result.way_out or "")
    assert "`ragate baseline set --baseline RELEASE` makes" in (result.way_out or "")
    named = decide(_baseline(run), run, release=other, release_path="my baselines/1.4.json")
    assert "`ragate baseline rescore --baseline 'my baselines/1.4.json'`" in (named.way_out or "")


def test_where_baseline_and_release_are_both_of_another_judge_both_ways_out_are_named() -> None:
    run = plain_run({"m": [1.0] * 20})
    other = _baseline(plain_run({"m": [1.0] * 20}, fingerprint={"judge": "older"}))
    way_out = decide(other, run, release=other, release_path="r.json").way_out or ""
    assert "`ragate baseline rescore` judges" in way_out
    assert "; as for the release, scores made in another way" in way_out
    assert "`ragate baseline rescore --baseline r.json` judges" in way_out


def test_what_fails_against_the_release_as_well_is_not_said_to_be_mended_by_a_bless() -> None:
    base = _baseline(plain_run({"m": [1.0] * 20}))
    failed = decide(base, plain_run({"m": [0.5] * 20}), release=base)
    assert (failed.way_out or "").endswith("; as for the release, it fails until a newer one is pinned")
    drifted = decide(
        _baseline(plain_run({"m": [0.5] * 20})),
        plain_run({"m": [0.5] * 20}),
        release=base,
        release_path="r.json",
    )
    assert "find them with `ragate baseline diff --baseline r.json`" in (drifted.way_out or "")


def test_a_floor_is_no_drift() -> None:
    run = plain_run({"m": [0.5] * 20})
    result = decide(_baseline(run), run, release=_baseline(run), rules={"m": Rule(min=0.8)})
    assert result.drift is not None and result.drift.verdict == "PASS"
    assert (result.verdict, (result.way_out or "").startswith("no new baseline")) == ("FAIL", True)


def test_warnings_about_the_release_are_those_that_the_run_does_not_have_itself() -> None:
    run = _clustered_run([1.0] * 60, [f"d{i // 5}" for i in range(60)])
    old = _baseline(run).model_copy(update={"clusters": None})
    assert decide(_baseline(run), run, release=_baseline(run)).drift_warnings == ()
    (told,) = decide(_baseline(run), run, release=old, release_path="r.json").drift_warnings
    assert "`ragate baseline set --baseline r.json` makes one that knows" in told


def test_metrics_asked_for_by_name_are_held_against_the_release_or_said_not_to_be() -> None:
    run = plain_run({"m": [0.5] * 20, "new": [1.0] * 20, "other": [1.0] * 20})
    release = _baseline(plain_run({"m": [1.0] * 20, "other": [1.0] * 20}))
    both = decide(_baseline(run), run, release=release, metrics=["m", "new"])
    assert both.drift is not None and [v.metric for v in both.drift.metrics] == ["m"]
    told = "drift since the release is not watched for new: its baseline has no such scores"
    assert (both.verdict, both.warnings) == ("FAIL", (told,))
    alone = decide(_baseline(run), run, release=release, metrics=["new"])
    assert (alone.verdict, alone.drift, alone.warnings) == ("PASS", None, (told,))


def test_a_metric_that_is_younger_than_the_release_is_no_obstacle() -> None:
    run = plain_run({"m": [1.0] * 20, "new": [1.0] * 20})
    release = _baseline(plain_run({"m": [1.0] * 20}))
    assert decide(_baseline(run), run, release=release).verdict == "PASS"
    assert decide(_baseline(run), run, release=release, metrics=["new"]).verdict == "PASS"
    worse = decide(_baseline(run), plain_run({"m": [0.5] * 20, "new": [1.0] * 20}), release=release)
    assert (worse.verdict, worse.sentence.startswith("FAIL: m fell")) == ("FAIL", True)


# Properties


SCORES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=10, max_size=40)


@given(SCORES, st.integers(0, 39), st.floats(0, 1), st.sampled_from(["relative", "absolute"]))
def test_by_the_point_rule_a_lower_score_never_gives_a_milder_verdict(
    scores: list[tuple[float, float]], at: int, lower: float, mode: str
) -> None:
    base, head = [b for b, _ in scores], [h for _, h in scores]
    worse = list(head)
    worse[at % len(head)] = min(head[at % len(head)], lower)
    before, after = (_gate(base, [*h], mode=mode, strategy="point") for h in (head, worse))
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


TENTHS = st.integers(0, 20).map(lambda k: k / 20)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(TENTHS, TENTHS), min_size=10, max_size=14),
    st.integers(1, 200),
    st.sampled_from(["relative", "absolute"]),
)
def test_the_larger_the_drop_the_worse_the_verdict(
    scores: list[tuple[float, float]], more: int, mode: str
) -> None:
    """Every item falls by as much more; from halved scores, so that there is room."""
    base = [0.5 + b / 2 for b, _ in scores]
    head = [0.5 + h / 2 for _, h in scores]
    before = _gate(base, [*head], mode=mode, on_inconclusive="fail")
    after = _gate(base, [h - more / 400 for h in head], mode=mode, on_inconclusive="fail")
    assert SEVERITY.index(after.verdict) >= SEVERITY.index(before.verdict)
    assert (after.metrics[0].drop or 0) > (before.metrics[0].drop or 0)


@settings(max_examples=40, deadline=None)
@given(SCORES, st.floats(0.01, 0.5))
def test_no_drop_above_the_limit_exits_0_unless_that_was_asked_for(
    scores: list[tuple[float, float]], threshold: float
) -> None:
    result = _gate([b for b, _ in scores], [h for _, h in scores], threshold=threshold)
    metric = result.metrics[0]
    if (metric.drop or 0) >= (metric.limit or 0):
        assert result.exit_code in (1, 2)


@settings(max_examples=40, deadline=None)
@given(SCORES)
def test_every_sentence_has_the_interval_and_the_limit_in_points_and_as_a_share(
    scores: list[tuple[float, float]],
) -> None:
    for strategy in ("significant", "point"):
        result = _gate([b for b, _ in scores], [h for _, h in scores], strategy=strategy)
        assert "interval" in result.sentence
        assert re.search(r"limit (\d+\.\d+) pt( = [\d.e+]+ %)?", result.sentence)
        assert result.sentence.startswith(f"{result.verdict}: ")
        assert "\n" not in result.sentence
