"""`decide`: the verdict on a run against a baseline, and one sentence that says what it rests on.

A metric FAILs when its mean fell by the limit or more and chance does not do that, and PASSes when the upper bound of
its drop is below the limit; what is neither is INCONCLUSIVE. What cannot be compared is INVALID: it fails closed.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field

from ragate.errors import EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_INVALID, EXIT_PASS, ConfigError
from ragate.gate.baseline import SAME, ItemChange, changed_items, diff_fields, mean
from ragate.gate.stats import (
    cluster_sums,
    clustered,
    detectable_drop,
    fewest_changed,
    holm,
    items_needed,
    johnson_bounds,
    mcnemar_p,
    sign_flip_p,
)
from ragate.run import Frozen

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from ragate.gate.baseline import Baseline
    from ragate.run import Run

Verdict = Literal["PASS", "INCONCLUSIVE", "FAIL", "INVALID"]
Mode = Literal["relative", "absolute"]
Strategy = Literal["significant", "point"]
OnInconclusive = Literal["auto", "fail", "warn"]

EXIT_CODES: dict[Verdict, int] = {
    "PASS": EXIT_PASS,
    "INCONCLUSIVE": EXIT_INCONCLUSIVE,
    "FAIL": EXIT_FAIL,
    "INVALID": EXIT_INVALID,
}
SEVERITY: tuple[Verdict, ...] = ("PASS", "INCONCLUSIVE", "FAIL", "INVALID")
"""Mildest first; a run takes the worst of its metrics."""

FIELD_METRICS = {"embeddings": "answer_relevance", "statements": "faithfulness"}
"""Fields of the fingerprint that belong to one metric, as `prompt_<metric>` does to each."""
MIN_PAIRED = 10
MAX_UNSCORED = 0.02
MIN_RELATIVE_MEAN = 0.2
"""Below this baseline mean a relative limit is meaningless: the threshold is taken as points."""
SIGNIFICANT = 0.05
"""A drop whose p, adjusted for the number of metrics, is below this is not chance."""
MIN_CLUSTERS = 10
"""Fewer source documents than this say too little about how documents differ: items count as independent."""
INTACT, BROKEN = 0.8, 0.2
"""An item breaks when its score goes from `INTACT` or more to `BROKEN` or less, and is mended the other way."""


ACCEPT = "if the change is wanted, `ragate baseline bless` accepts it as the new baseline"
EVALUATE_RESERVE = "`ragate eval --update-baseline` makes a baseline that holds the reserve"


class Reason(NamedTuple):
    """Why a comparison is invalid, and what to do about it."""

    text: str
    way_out: str


class Rule(Frozen):
    """What one metric is held to, where it is not what the others are; `None` is as for the others."""

    threshold: Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)] | None = None
    """The drop that fails: a share of the baseline's mean, or points when the mode is absolute."""
    threshold_mode: Mode | None = None
    """Whether this metric's threshold is relative or in points."""
    min: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)] | None = None
    """The floor: a mean below it fails whatever the baseline was."""


class MetricVerdict(Frozen):
    """One metric against the baseline. Means, drop, bounds and limit are over the paired items, in score units."""

    metric: str
    verdict: Verdict
    base_mean: float | None
    head_mean: float | None
    drop: float | None
    """Baseline mean minus current mean: positive is worse. `None` where nothing could be paired."""
    limit: float | None
    """δ in score units: a drop this large fails."""
    limit_relative: float | None
    """The same as a share of the baseline's mean; `None` where that is 0."""
    mode_used: Mode
    limit_note: str | None
    """How the limit came about: `5 % of 0.920`, `absolute`, or why relative fell back to absolute."""
    paired: int
    """Items with a score on both sides."""
    changed: tuple[ItemChange, ...]
    """Paired items whose score differs, largest drop first."""
    broken: tuple[str, ...]
    """Critical items that went from 0.8 or more to 0.2 or less."""
    lower: float | None = None
    upper: float | None = None
    """Bounds of the drop, each with 95 % by itself (Johnson 1978)."""
    clusters: int | None = None
    """Source documents whose sums the bounds and p are of; `None` where the items count as independent."""
    units_changed: int = 0
    """Clusters whose sum changed, or items that changed where they count as independent: what p is made of."""
    units_needed: int | None = None
    """The fewest of them that can show a drop not to be chance, beside so many metrics."""
    p: float | None = None
    """Sign-flip p of a drop this large by chance, adjusted for the number of metrics (Holm)."""
    p_alone: float | None = None
    """The same before the adjustment."""
    items_broken: int = 0
    """Paired items that went from 0.8 or more to 0.2 or less, critical or not."""
    items_mended: int = 0
    """Paired items that went the other way."""
    mcnemar_p: float | None = None
    """McNemar's exact p that so many broke and so few were mended by chance, one-sided."""
    detectable: float | None = None
    """The least drop that this many items with this much scatter show reliably: 2.486 s/sqrt(n)."""
    detectable_true: float | None = None
    """The same of the true drop, of which a judge with the known balanced accuracy B shows 2B - 1."""
    items_needed: int | None = None
    """Items with this scatter that show a drop of the limit reliably."""
    floor: float | None = None
    """The lowest mean allowed, where there is one."""
    mean_of_all: float | None = None
    """Mean of all the run's scores, those without a partner in the baseline too: what a floor is held against."""
    warnings: tuple[str, ...] = ()
    """What does not decide but should be known."""
    sentence: str

    @property
    def below_floor(self) -> bool:
        """Whether the current mean is under the floor."""
        mean = self.mean_of_all
        return self.floor is not None and mean is not None and mean < self.floor - SAME


class GateResult(Frozen):
    """The verdict on a run: the worst of its metrics, and why."""

    verdict: Verdict
    sentence: str
    """Begins with the verdict word; one line."""
    exit_code: int
    """0 PASS, 1 FAIL, 2 INCONCLUSIVE (0 where that only warns), 3 INVALID."""
    reasons: tuple[str, ...]
    """Why the comparison is INVALID, each naming what differs; else empty."""
    way_out: str | None
    """What to do about a verdict other than PASS, with its command."""
    warnings: tuple[str, ...] = ()
    """What does not decide but should be known: small real losses, a reserve that could not be used, ..."""
    threshold: float
    mode: Mode
    strategy: Strategy
    metrics: tuple[MetricVerdict, ...]
    run_digest: str | None = None
    """sha256 of the run file that this is the verdict on, where it is one on a stored run."""
    drift: GateResult | None = None
    """The same run against the pinned release baseline, where there is one; the run takes the worst of both."""

    @property
    def drift_warnings(self) -> tuple[str, ...]:
        """What should be known of the comparison with the release, beyond the run's own warnings."""
        return () if self.drift is None else tuple(w for w in self.drift.warnings if w not in self.warnings)


def decide(
    base: Baseline,
    run: Run,
    *,
    threshold: float = 0.05,
    mode: Mode = "relative",
    strategy: Strategy = "significant",
    on_inconclusive: OnInconclusive = "auto",
    metrics: Sequence[str] | None = None,
    rules: Mapping[str, Rule] | None = None,
    release: Baseline | None = None,
    release_path: str = "RELEASE",
    judge_accuracy: float | Mapping[str, float] | None = None,
) -> GateResult:
    """Hold `run` against `base`, and against the pinned `release` too where there is one.

    `threshold` is the limit δ: a share of the baseline mean when `mode` is relative, else score points; `rules` has
    what differs for a metric. By the strategy `point` the mean drop alone decides. `metrics` narrows the comparison;
    by default it is over all metrics of both sides and all that have a floor, and one that a side lacks is INVALID.
    `release_path` is what the commands named for the release call it.
    An INCONCLUSIVE run fails, warns, or (`auto`) fails where a mean fell by its limit or more.
    `judge_accuracy` is the judge's balanced accuracy on labelled data, where it is known: of all metrics, or by metric.
    Raises ConfigError when a setting makes no sense; whatever is wrong with the data is an INVALID verdict.
    """
    if not 0 <= threshold <= 1:  # also refuses NaN
        raise ConfigError(f"threshold must be between 0 and 1, got {threshold:g}; 5 % is 0.05")
    if mode not in ("relative", "absolute"):
        raise ConfigError(f"threshold_mode must be relative or absolute, got {mode!r}")
    if strategy not in ("significant", "point"):
        raise ConfigError(f"strategy must be significant or point, got {strategy!r}")
    if on_inconclusive not in ("auto", "fail", "warn"):
        raise ConfigError(f"on_inconclusive must be auto, fail or warn, got {on_inconclusive!r}")
    floors = [metric for metric, rule in (rules or {}).items() if rule.min is not None]
    wanted = tuple(dict.fromkeys((*run.metrics, *base.metrics, *floors) if metrics is None else metrics))
    if not isinstance(judge_accuracy, Mapping):
        judge_accuracy = {} if judge_accuracy is None else dict.fromkeys(wanted, judge_accuracy)
    for accuracy in judge_accuracy.values():
        if not 0.5 < accuracy <= 1:
            raise ConfigError(f"judge_accuracy must be above 0.5 (guessing) and at most 1, got {accuracy:g}")
    terms = _Terms(threshold, mode, strategy, on_inconclusive, rules or {}, judge_accuracy)
    result = _compare(base, run, wanted, terms)
    if release is None:
        return result
    watched = [metric for metric in release.metrics if metrics is None or metric in metrics]
    unwatched = [metric for metric in metrics or () if metric not in release.metrics]
    if unwatched:  # asked for by name: that its drift is not seen must not go unsaid
        told = f"drift since the release is not watched for {', '.join(unwatched)}: its baseline has no such scores"
        result = result.model_copy(update={"warnings": (*result.warnings, told)})
    if release.metrics and not watched:
        return result
    # a floor is of the run alone, and has been held above
    bare = {metric: rule.model_copy(update={"min": None}) for metric, rule in terms.rules.items()}
    drift = _compare(release, run, tuple(watched), terms._replace(rules=bare))
    return _with_drift(result, drift, release, release_path)


class _Terms(NamedTuple):
    """The settings of a comparison."""

    threshold: float
    mode: Mode
    strategy: Strategy
    on_inconclusive: OnInconclusive
    rules: Mapping[str, Rule]
    judge_accuracy: Mapping[str, float]

    def of(self, metric: str) -> tuple[float, Mode, float | None]:
        """(threshold, mode, floor) of a metric; what it does not have of its own is the common one."""
        rule = self.rules.get(metric, Rule())
        threshold = self.threshold if rule.threshold is None else rule.threshold
        return threshold, rule.threshold_mode or self.mode, rule.min


def _compare(base: Baseline, run: Run, wanted: Sequence[str], terms: _Terms) -> GateResult:
    """The verdict of `run` against one baseline."""
    left_out, warnings = _left_out(base, run)
    if left_out:
        base, run = _without(base, run, left_out)
    shared = _reasons_for_all(base, run, wanted)
    reasons = list(shared)
    found: list[MetricVerdict] = []
    invalid = []
    for metric in wanted:
        own = _reasons_for_metric(base, run, metric)
        reasons += own
        invalid.append(bool(shared or own))
        found.append(_measured(base, run, metric, terms))
    verdicts = [
        _decided(v, terms, invalid=is_invalid)
        for v, is_invalid in zip(_adjusted(found), invalid, strict=True)
    ]
    verdict: Verdict = "INVALID" if reasons else _worst(verdicts)
    sentence = (
        _invalid_sentence([reason.text for reason in reasons]) if reasons else _sentence(verdict, verdicts)
    )
    warnings += [] if reasons else [warning for v in verdicts for warning in v.warnings]
    way_outs = {"FAIL": _accept_or_lower(verdicts, terms), "INCONCLUSIVE": _more_items(verdicts)}
    return GateResult(
        verdict=verdict,
        sentence=f"{verdict}: {sentence}",
        exit_code=_exit_code(verdict, verdicts, terms.on_inconclusive),
        reasons=tuple(reason.text for reason in reasons),
        way_out=reasons[0].way_out if reasons else way_outs.get(verdict),
        warnings=tuple(dict.fromkeys(warnings)),
        threshold=terms.threshold,
        mode=terms.mode,
        strategy=terms.strategy,
        metrics=tuple(verdicts),
    )


def _adjusted(found: Sequence[MetricVerdict]) -> list[MetricVerdict]:
    """`found` with each p adjusted for there being several (Holm), and what that takes at least."""
    tested = [v.p_alone for v in found if v.p_alone is not None]
    adjusted = iter(holm(tested))
    return [
        v
        if v.p_alone is None
        else v.model_copy(
            update={
                "p": next(adjusted),
                # Holm multiplies a p by the number of those that are not smaller
                "units_needed": fewest_changed(SIGNIFICANT / sum(p >= v.p_alone for p in tested)),
            }
        )
        for v in found
    ]


def _with_drift(result: GateResult, drift: GateResult, release: Baseline, path: str) -> GateResult:
    """`result`, made worse where the run has drifted too far from the pinned release, whose file is at `path`."""
    name = f"the release of {release.date:%Y-%m-%d}"
    alike = drift.verdict == result.verdict != "PASS"
    way_out = drift.way_out
    if drift.verdict == "FAIL":
        way_out = (
            "it fails until a newer one is pinned"
            if alike
            else "drifted in small steps: find them with `ragate baseline diff`, or pin a newer release"
        )
    drift = drift.model_copy(
        update={
            "way_out": way_out and _naming(path, way_out),
            "warnings": tuple(_naming(path, warning) for warning in drift.warnings),
        }
    )
    if SEVERITY.index(drift.verdict) <= SEVERITY.index(result.verdict):
        changes: dict[str, object] = {"drift": drift}
        if alike:
            changes["exit_code"] = max(result.exit_code, drift.exit_code)
            if drift.way_out != result.way_out:
                changes["way_out"] = f"{result.way_out}; as for the release, {drift.way_out}"
        return result.model_copy(update=changes)
    return result.model_copy(
        update={
            "verdict": drift.verdict,
            "sentence": f"{drift.verdict}: against {name}, {drift.sentence.partition(': ')[2]}",
            "exit_code": drift.exit_code,
            "reasons": tuple(f"against {name}: {reason}" for reason in drift.reasons),
            "way_out": drift.way_out,
            "drift": drift,
        }
    )


def _naming(path: str, text: str) -> str:
    """`text` with its commands that read or write a baseline pointed at the one at `path`."""
    option = f"--baseline {shlex.quote(path)}"
    return re.sub(
        r"`ragate (?:baseline \w+|eval --update-baseline)", lambda found: f"{found[0]} {option}", text
    )


def _exit_code(verdict: Verdict, verdicts: Sequence[MetricVerdict], on_inconclusive: OnInconclusive) -> int:
    if verdict != "INCONCLUSIVE" or on_inconclusive == "fail":
        return EXIT_CODES[verdict]
    fell = any(
        v.drop is not None and v.limit is not None and _reaches(v.drop, v.limit)
        for v in verdicts
        if v.verdict == "INCONCLUSIVE"
    )
    return EXIT_CODES[verdict] if fell and on_inconclusive == "auto" else EXIT_PASS


def _reaches(drop: float, limit: float) -> bool:
    """Whether a mean fell by its limit or more; with a limit of 0 an unchanged one did not."""
    return drop > 0 and drop >= limit - SAME


def _left_out(base: Baseline, run: Run) -> tuple[set[str], list[str]]:
    """The items of a reserve that only one side has scored, or in another version; and what to say of it."""
    mine = {item.id for item in run.items if item.reserve}
    if run.reserve_hash == base.reserve_hash:
        return set(), []
    warnings = []
    if mine:
        what = "another reserve" if base.reserve else "no reserve"
        warnings.append(
            f"the {len(mine)} reserve items were not compared: the baseline holds {what}; {EVALUATE_RESERVE}"
        )
    return mine | set(base.reserve), warnings


def _without(base: Baseline, run: Run, left_out: set[str]) -> tuple[Baseline, Run]:
    items = {item: scores for item, scores in base.items.items() if item not in left_out}
    kept = {
        "items": tuple(item for item in run.items if item.id not in left_out),
        "scores": tuple(score for score in run.scores if score.item not in left_out),
    }
    return base.model_copy(update={"items": items}), run.model_copy(update=kept)


def points(value: float) -> str:
    """A difference of scores in points, without its sign: 0.061 -> `6.1 pt`."""
    size = abs(value) * 100
    return "under 0.1 pt" if 0 < size < 0.05 else f"{size:.1f} pt"


def shorten(value: str, width: int = 24) -> str:
    """`value` cut to `width` characters, with `…` where it was cut."""
    return value if len(value) <= width else value[: width - 1].rstrip() + "…"


def _worst(verdicts: Sequence[MetricVerdict]) -> Verdict:
    return max((v.verdict for v in verdicts), key=SEVERITY.index)


def _usable(run: Run, metric: str) -> dict[str, float]:
    """Item id -> value of the scores that can be compared; a number that is not finite is no score."""
    return {
        s.item: s.value
        for s in run.scores
        if s.metric == metric and s.state == "ok" and s.value is not None and math.isfinite(s.value)
    }


def _reasons_for_all(base: Baseline, run: Run, wanted: Sequence[str]) -> list[Reason]:
    """Why no metric of the two can be compared."""
    reasons = []
    if run.partial:
        made, wanted_scores = len(run.scores), len(run.items) * len(run.metrics)
        text = f"the run is PARTIAL: {made} of {wanted_scores} scores were made"
        reasons.append(Reason(text, "`ragate eval` resumes it"))
    # the fields of a metric that is not compared, or is missing and named for it, say nothing about the others
    compared = set(wanted) & set(base.metrics) & set(run.metrics)
    others = {*base.metrics, *run.metrics} - compared
    moot = {f"prompt_{metric}" for metric in others} | {f for f, m in FIELD_METRICS.items() if m in others}
    for diff in diff_fields(base.fingerprint, run.fingerprint):
        if diff.field in moot:
            continue
        old, new = _shorten_pair(diff.old, diff.new)
        way_out = (
            "scores made in another way are not comparable; `ragate baseline rescore` judges the baseline's "
            "stored answers anew, `ragate baseline set` makes a new baseline"
        )
        reasons.append(Reason(f"{diff.field} differs: baseline {old}, run {new}", way_out))
    if base.testset_hash != run.testset_hash:
        old, new = shorten(base.testset_hash, 13), shorten(run.testset_hash, 13)
        counts = f"{len(base.items)} items in the baseline, {len(run.items)} in the run"
        text = f"the test set differs: hash {old} in the baseline, {new} in the run ({counts})"
        way_out = "run the whole test set, without --limit, or make a new baseline with `ragate baseline set`"
        reasons.append(Reason(text, way_out))
    if not wanted:
        reasons.append(Reason("there is no metric to compare", "name one with --metrics"))
    return reasons


def _reasons_for_metric(base: Baseline, run: Run, metric: str) -> list[Reason]:
    """Why this metric of the two cannot be compared."""
    sides = {"baseline": base.metrics, "run": run.metrics}
    missing = [side for side, metrics in sides.items() if metric not in metrics]
    if missing:
        way_out = (
            "`ragate baseline set` adds it"
            if missing == ["baseline"]
            else "score it: name it in `metrics`, or let `ragate baseline set` drop it with --force"
        )
        return [Reason(f"{metric} is missing in the {' and the '.join(missing)}", way_out)]

    reasons = []
    usable = _usable(run, metric)
    recorded = {s.item: s.state for s in run.scores if s.metric == metric}
    base_ids, run_ids = list(base.items), [item.id for item in run.items]
    if base.testset_hash == run.testset_hash:  # of one test set each side must have every item
        base_ids = run_ids = list(dict.fromkeys((*base_ids, *run_ids)))
    base_bad = [base.state(item, metric) for item in base_ids]
    run_bad = [recorded.get(item, "missing") for item in run_ids if item not in usable]
    # a score called ok whose value is no finite number is a NaN
    run_bad = ["nan" if state == "ok" else state for state in run_bad]
    reasons += _too_many("baseline", metric, [state for state in base_bad if state != "ok"], len(base_ids))
    if not run.partial:
        reasons += _too_many("run", metric, run_bad, len(run_ids))
    scored = base.values(metric)
    paired = scored.keys() & usable.keys()
    if len(paired) < MIN_PAIRED:
        text = f"{metric} has {len(paired)} paired items and a verdict needs {MIN_PAIRED}"
        reasons.append(Reason(text, "use a larger test set"))
    critical = {item.id for item in run.items if item.critical} | set(base.critical)
    judged = {item.id for item in run.items}
    whole = base.testset_hash == run.testset_hash  # else that is said, and why items are gone with it
    for name in (item for item in base.items if item in critical and (whole or item in judged)):
        if name not in scored and base.state(name, metric) in ("nan", "error", "timeout", "truncated"):
            text = f"critical item {shorten(name, 40)} has no {metric} score in the baseline"
            reasons.append(Reason(text, "make a baseline where it has one with `ragate baseline set`"))
        elif name in scored and name not in usable and not run.partial:
            text = f"critical item {shorten(name, 40)} has no {metric} score in the run"
            reasons.append(Reason(text, "see its error in the report and run `ragate eval` again"))
    return reasons


def _too_many(side: str, metric: str, bad: Sequence[str], total: int) -> list[Reason]:
    if len(bad) <= MAX_UNSCORED * total + SAME:
        return []
    counts = ", ".join(f"{bad.count(state)} {state}" for state in sorted(set(bad)))
    text = f"{metric} has no score for {len(bad)} of {total} items of the {side} ({counts})"
    if side == "baseline":
        return [Reason(text, "make a baseline from a run without errors with `ragate baseline set`")]
    allowed = f"at most {MAX_UNSCORED * 100:g} % may be without"
    return [Reason(text, f"{allowed}; see the errors in the report and run `ragate eval` again")]


def _measured(base: Baseline, run: Run, metric: str, terms: _Terms) -> MetricVerdict:
    """Everything about one metric but its verdict, its adjusted p and its sentence."""
    before, after = base.values(metric), _usable(run, metric)
    paired = [item for item in before if item in after]
    n = len(paired)
    threshold, mode, floor = terms.of(metric)
    base_mean, head_mean = mean(before[i] for i in paired), mean(after[i] for i in paired)
    if base_mean is None or head_mean is None or n < 2:  # of one item nothing is known of the scatter
        return MetricVerdict(
            metric=metric,
            verdict="INVALID",
            base_mean=base.mean(metric),
            head_mean=mean(after.values()),
            mean_of_all=mean(after.values()),
            drop=None,
            limit=None,
            limit_relative=None,
            mode_used=mode,
            limit_note=None,
            paired=n,
            changed=(),
            broken=(),
            floor=floor,
            sentence=f"{metric} cannot be compared",
        )
    mode_used: Mode = mode
    if mode == "relative" and base_mean < MIN_RELATIVE_MEAN - SAME:
        mode_used = "absolute"
        note = f"absolute: {base_mean:.3f} is below {MIN_RELATIVE_MEAN}, too low for a relative limit"
    elif mode == "relative":
        note = f"{threshold * 100:g} % of {base_mean:.3f}"
    else:
        note = "absolute"
    limit = threshold * base_mean if mode_used == "relative" else threshold

    # what is within rounding is no drop at all: an unchanged system has drops of exactly 0
    drops = [0.0 if abs(before[i] - after[i]) <= SAME else before[i] - after[i] for i in paired]
    fallen = [i for i, value in zip(paired, drops, strict=True) if value]
    drop = math.fsum([*(before[i] for i in fallen), *(-after[i] for i in fallen)]) / n  # rounded once
    labels, told = _clusters_of(base, run, paired)
    clusters: int | None = len(set(labels))
    few = n > len(set(labels)) and len(set(labels)) < MIN_CLUSTERS
    warnings = [told] if told else []
    if few and fallen:
        warnings.append(
            f"the items are of {_count(len(set(labels)), 'cluster')}, too few to tell how clusters differ (it takes "
            f"{MIN_CLUSTERS}): they count as independent"
        )
    if few or n == clusters:
        clusters, labels = None, [(i,) for i in paired]
    estimate = johnson_bounds(clustered(drops, labels) if clusters else drops)
    sums = cluster_sums(drops, labels)

    critical = {item.id for item in run.items if item.critical} | set(base.critical)
    sides = {i: (_side(before[i]), _side(after[i])) for i in paired}
    moved = Counter(sides.values())
    broken, mended = moved["intact", "broken"], moved["broken", "intact"]
    return MetricVerdict(
        metric=metric,
        verdict="INVALID",
        base_mean=base_mean,
        head_mean=head_mean,
        mean_of_all=mean(after.values()),
        drop=drop,
        limit=limit,
        limit_relative=limit / base_mean if base_mean > 0 else None,
        mode_used=mode_used,
        limit_note=note,
        paired=n,
        changed=changed_items(before, after),
        broken=tuple(i for i in paired if i in critical and sides[i] == ("intact", "broken")),
        lower=estimate.lower,
        upper=estimate.upper,
        clusters=clusters,
        units_changed=sum(total != 0.0 for total in sums),
        p_alone=sign_flip_p(sums),
        items_broken=broken,
        items_mended=mended,
        mcnemar_p=mcnemar_p(broken, mended),
        detectable=detectable_drop(estimate.error),
        detectable_true=None
        if metric not in terms.judge_accuracy
        else detectable_drop(estimate.error, terms.judge_accuracy[metric]),
        items_needed=items_needed(estimate.error, n, limit) if limit > 0 else None,
        floor=floor,
        warnings=tuple(warnings),
        sentence="",
    )


def _clusters_of(base: Baseline, run: Run, paired: Sequence[str]) -> tuple[list[Hashable], str | None]:
    """The cluster of each paired item, and what to say where the run's are not the baseline's.

    The baseline's count: in no hash, those of the run could be edited until a drop looks like that of one document.
    An item without a cluster is one by itself.
    """
    now: dict[str, str | None] = {item.id: item.cluster for item in run.items}
    mine: list[Hashable] = [now.get(item) or (item,) for item in paired]
    if base.clusters is None:
        told = (
            "the baseline is of an older version and does not know which items belong together: the run's own "
            "clusters count, which a change may edit; `ragate baseline set` makes one that knows"
        )
        return mine, told if any(isinstance(label, str) for label in mine) else None
    labels: list[Hashable] = [base.clusters.get(item) or (item,) for item in paired]
    if _grouping(mine) == _grouping(labels):  # other names do not matter
        return labels, None
    moved = sum(old != new for old, new in zip(labels, mine, strict=True))
    told = (
        f"{_count(moved, 'item')} changed cluster: those of the baseline count; if that is wanted, "
        "`ragate baseline bless` takes the new ones"
    )
    return labels, told


def _grouping(labels: Sequence[Hashable]) -> list[int]:
    """For each label the place where it is first: equal where the same items are together."""
    first: dict[Hashable, int] = {}
    return [first.setdefault(label, place) for place, label in enumerate(labels)]


def _side(score: float) -> str:
    """`intact`, `broken` or between."""
    return "intact" if score >= INTACT - SAME else "broken" if score <= BROKEN + SAME else "between"


def _decided(v: MetricVerdict, terms: _Terms, *, invalid: bool) -> MetricVerdict:
    """`v` with its verdict, what it warns of, and its sentence."""
    if v.drop is None or v.limit is None or v.upper is None or v.p is None:
        return v
    verdict = verdict_of_drop(v.drop, v.upper, v.p, v.limit, terms.strategy)
    warnings = list(v.warnings)
    if verdict == "PASS" and v.drop > 0 and v.p < SIGNIFICANT and terms.strategy == "significant":
        warnings.append(
            f"WARN: {v.metric} lost {points(v.drop)}, less than the limit but not by chance "
            f"(p {chance(v.p)}): many such losses add up"
        )
    if v.broken or v.below_floor:
        verdict = "FAIL"
    if invalid:
        verdict = "INVALID"
    _, mode, _ = terms.of(v.metric)
    decided = v.model_copy(update={"verdict": verdict, "warnings": tuple(warnings)})
    return decided.model_copy(update={"sentence": _metric_sentence(decided, terms.strategy, mode)})


def verdict_of_drop(drop: float, upper: float, p: float, limit: float, strategy: Strategy) -> Verdict:
    """The rule of GATE.md for one metric, of numbers alone."""
    if strategy == "point":
        return "FAIL" if _reaches(drop, limit) else "PASS"
    if _reaches(drop, limit):
        return "FAIL" if p < SIGNIFICANT else "INCONCLUSIVE"
    # nothing fell at all: passes with a limit of 0 as well
    return "PASS" if upper < limit - SAME or upper <= 0 else "INCONCLUSIVE"


def _metric_sentence(v: MetricVerdict, strategy: Strategy, mode: Mode) -> str:
    """Drop, limit in points and as a share, interval and p, means and items, in one sentence."""
    assert v.drop is not None and v.limit is not None and v.lower is not None and v.upper is not None
    assert v.base_mean is not None and v.head_mean is not None and v.p is not None
    fell, allowed, low, high = _distinct_points(v.drop, v.limit, v.lower, v.upper)
    relative = "" if v.limit_relative is None else f" = {v.limit_relative * 100:.3g} %"
    measured = f"limit {allowed}{relative}, 90 % interval of the drop {low} to {high}"
    if strategy == "significant" and v.drop > 0:
        measured += f", p {chance(v.p)}"
    over = f"over {v.paired} items" + (f" of {v.clusters} clusters" if v.clusters else "")
    if v.drop > 0:
        text = f"{v.metric} fell {fell} ({measured}), from {v.base_mean:.3f} to {v.head_mean:.3f} {over}"
    elif v.drop < 0:
        text = f"{v.metric} rose {fell} ({measured}), from {v.base_mean:.3f} to {v.head_mean:.3f} {over}"
    else:
        text = f"{v.metric} stayed at {v.head_mean:.3f} ({measured}) {over}"
    if v.below_floor:
        text = f"{v.metric} is at {_below(v.mean_of_all or 0.0, v.floor or 0.0)}, its floor; {text}"
    if v.broken:
        named = ", ".join(shorten(item, 40) for item in v.broken[:3])
        more = f" and {len(v.broken) - 3} more" if len(v.broken) > 3 else ""
        which = "critical item" if len(v.broken) == 1 else "critical items"
        text = f"{which} {named}{more} broke on {v.metric}; {text}"
    if _too_few_changed(v):
        unit = "cluster" if v.clusters else "item"
        text += (
            f"; only {_count(v.units_changed, unit)} changed, too few to rule out chance: "
            f"a FAIL takes {v.units_needed} or more"
        )
    if v.mode_used != mode:
        text += f"; the baseline mean is below {MIN_RELATIVE_MEAN}, so the limit is absolute"
    return text


def _too_few_changed(v: MetricVerdict) -> bool:
    """Whether a mean fell by its limit, but in so few clusters or items that no p of them is below 0.05."""
    if v.verdict != "INCONCLUSIVE" or v.drop is None or v.limit is None or v.units_needed is None:
        return False
    return _reaches(v.drop, v.limit) and v.units_changed < v.units_needed


def _below(value: float, floor: float) -> str:
    """`0.680, below 0.7`, with as many digits as it takes to tell them apart."""
    digits = next(d for d in (3, 4, 5, 10) if float(f"{value:.{d}f}") < floor or d == 10)
    return f"{value:.{digits}f}, below {floor:g}"


def chance(p: float) -> str:
    """A p-value for people."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _accept_or_lower(verdicts: Sequence[MetricVerdict], terms: _Terms) -> str:
    """How a FAIL is accepted where it is wanted: a floor holds whatever the baseline is."""
    failed = [v for v in verdicts if v.verdict == "FAIL"]
    floors = ", ".join(v.metric for v in failed if v.below_floor)
    if not floors:
        return ACCEPT
    lower = f"lower `min` of {floors} in ragate.toml"
    if all(v.below_floor and not _fails_by_itself(v, terms) for v in failed):
        return f"no new baseline mends a mean below its floor: raise it, or {lower} if the change is wanted"
    return f"{ACCEPT}; a mean below its floor it does not accept: for that, {lower}"


def _fails_by_itself(v: MetricVerdict, terms: _Terms) -> bool:
    """Whether it fails against the baseline, its floor aside."""
    if v.drop is None or v.limit is None or v.upper is None or v.p is None:
        return False
    return bool(v.broken) or verdict_of_drop(v.drop, v.upper, v.p, v.limit, terms.strategy) == "FAIL"


def _more_items(verdicts: Sequence[MetricVerdict]) -> str:
    """What makes an open verdict decidable."""
    needed = [v.items_needed for v in verdicts if v.verdict == "INCONCLUSIVE" and v.items_needed is not None]
    paired = max((v.paired for v in verdicts), default=0)
    enough = f"about {max(needed)} items" if needed and max(needed) > paired else "more items"
    if any(v.clusters and _too_few_changed(v) for v in verdicts):
        enough += " of more clusters"
    return (
        f"{enough} would tell: add some to the test set or its reserve, or let a person look at what changed"
    )


def _sentence(verdict: Verdict, verdicts: Sequence[MetricVerdict]) -> str:
    """What the run's verdict rests on: the metric furthest over its limit, or the largest change."""

    def used(v: MetricVerdict) -> float:
        """How much of its limit the drop used up."""
        return (v.drop or 0.0) / max(v.limit or 0.0, SAME)

    worst = sorted((v for v in verdicts if v.verdict == verdict), key=used, reverse=True)
    if verdict == "PASS":
        size = f"{_count(len(verdicts), 'metric')} over {max(v.paired for v in verdicts)} items"
        warned = "".join(
            f"; {warning}" for v in worst for warning in v.warnings if warning.startswith("WARN")
        )
        if all(not v.changed for v in verdicts):
            return (
                f"no score changed; {size}; every drop is 0.0 pt, interval 0.0 to 0.0 pt, {_limits(verdicts)}"
            )
        if used(worst[0]) > 0:
            return f"no metric fell to its limit; closest: {worst[0].sentence}{warned}"
        if used(worst[-1]) < 0:
            return f"no metric fell; {worst[-1].sentence}"
        return f"no metric changed on average; {size}; {worst[0].sentence}"
    text = "; ".join([worst[0].sentence, *(f"also {v.sentence}" for v in worst[1:])])
    return f"too few items to tell whether a limit is reached: {text}" if verdict == "INCONCLUSIVE" else text


def _limits(verdicts: Sequence[MetricVerdict]) -> str:
    """The limits of all metrics in points and as shares, from the least to the largest."""

    def between(values: list[float], unit: str, form: str) -> str:
        low, high = f"{min(values) * 100:{form}}", f"{max(values) * 100:{form}}"
        return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"

    shares = [v.limit_relative for v in verdicts if v.limit_relative is not None]
    text = f"limit {between([v.limit or 0.0 for v in verdicts], 'pt', '.1f')}"
    return f"{text} = {between(shares, '%', '.3g')}" if shares else text


def _invalid_sentence(reasons: Sequence[str]) -> str:
    more = f" (and {_count(len(reasons) - 1, 'more reason')})" if len(reasons) > 1 else ""
    return reasons[0] + more


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _distinct_points(drop: float, limit: float, lower: float, upper: float) -> tuple[str, str, str, str]:
    """All four in points, with as many digits as it takes to tell drop and upper bound from the limit."""

    def text(value: float, digits: int) -> str:
        shown = f"{value * 100:.{digits}f}".replace("-", "−")
        return shown.lstrip("−") if not shown.strip("−0.") else shown  # no −0.0

    for digits in (1, 2, 3, 4):
        alike = (
            abs(value - limit) > SAME and text(value, digits) == text(limit, digits)
            for value in (drop, upper)
        )
        if not any(alike):
            break
    fell = points(drop) if digits == 1 else f"{text(abs(drop), digits)} pt"
    return fell, f"{text(limit, digits)} pt", text(lower, digits), f"{text(upper, digits)} pt"


def _shorten_pair(old: str | None, new: str | None, width: int = 24) -> tuple[str, str]:
    """Both values short, beginning near the place where they differ, so that they still look different."""
    if old is None or new is None:
        return shorten(old or "none", width), shorten(new or "none", width)
    letters = enumerate(zip(old, new, strict=False))
    same = next((i for i, (a, b) in letters if a != b), min(len(old), len(new)))
    start = same - 6 if same >= width - 1 else 0
    head = "…" if start else ""
    return head + shorten(old[start:], width), head + shorten(new[start:], width)
