"""`decide`: the verdict on a run against a baseline, by the point rule: a mean drop of δ or more fails."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from ragate.errors import EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_INVALID, EXIT_PASS, ConfigError
from ragate.gate.baseline import SAME, ItemChange, changed_items, diff_fields, mean
from ragate.run import Frozen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ragate.gate.baseline import Baseline
    from ragate.run import Run

Verdict = Literal["PASS", "INCONCLUSIVE", "FAIL", "INVALID"]
Mode = Literal["relative", "absolute"]

EXIT_CODES: dict[Verdict, int] = {
    "PASS": EXIT_PASS,
    "INCONCLUSIVE": EXIT_INCONCLUSIVE,
    "FAIL": EXIT_FAIL,
    "INVALID": EXIT_INVALID,
}
SEVERITY: tuple[Verdict, ...] = ("PASS", "INCONCLUSIVE", "FAIL", "INVALID")
"""Mildest first; a run takes the worst of its metrics."""

FIELD_METRICS = {"embeddings": "answer_relevance"}
"""Fields of the fingerprint that belong to one metric, as `prompt_<metric>` does to each."""
MIN_PAIRED = 10
MAX_UNSCORED = 0.02
MIN_RELATIVE_MEAN = 0.2
"""Below this baseline mean a relative limit is meaningless: the threshold is taken as points."""
DETECTABLE = 2.486
"""Normal quantiles of 95 % confidence and 80 % power: 2.486 s/sqrt(n) is the least drop seen reliably."""
INTACT, BROKEN = 0.8, 0.2
"""A critical item breaks when its score goes from `INTACT` or more to `BROKEN` or less."""


ACCEPT = "if the change is wanted, `ragate baseline set` accepts it as the new baseline"


class Reason(NamedTuple):
    """Why a comparison is invalid, and what to do about it."""

    text: str
    way_out: str


class MetricVerdict(Frozen):
    """One metric against the baseline. Means, drop and limit are over the paired items, in score units."""

    metric: str
    verdict: Verdict
    base_mean: float | None
    head_mean: float | None
    drop: float | None
    """Baseline mean minus current mean: positive is worse. `None` where nothing could be paired."""
    limit: float | None
    """δ: a drop this large fails."""
    mode_used: Mode
    limit_note: str | None
    """How the limit came about: `5 % of 0.920`, `absolute`, or why relative fell back to absolute."""
    paired: int
    """Items with a score on both sides."""
    changed: tuple[ItemChange, ...]
    """Paired items whose score differs, largest drop first."""
    broken: tuple[str, ...]
    """Critical items that went from 0.8 or more to 0.2 or less."""
    detectable: float | None
    """The least drop that this many items with this much scatter show reliably: 2.486 s/sqrt(n)."""
    sentence: str


class GateResult(Frozen):
    """The verdict on a run: the worst of its metrics, and why."""

    verdict: Verdict
    sentence: str
    """Begins with the verdict word; one line."""
    reasons: tuple[str, ...]
    """Why the comparison is INVALID, each naming what differs; else empty."""
    way_out: str | None
    """What to do about a FAIL or the first reason of an INVALID, with its command."""
    threshold: float
    mode: Mode
    metrics: tuple[MetricVerdict, ...]

    @property
    def exit_code(self) -> int:
        """0 PASS, 1 FAIL, 2 INCONCLUSIVE, 3 INVALID."""
        return EXIT_CODES[self.verdict]


def decide(
    base: Baseline,
    run: Run,
    *,
    threshold: float = 0.05,
    mode: Mode = "relative",
    metrics: Sequence[str] | None = None,
) -> GateResult:
    """Hold `run` against `base`.

    `threshold` is the limit δ: a share of the baseline mean when `mode` is relative, else score points.
    `metrics` narrows the comparison; by default it is over all metrics of both sides, which must be the same.
    Raises ConfigError when a setting makes no sense; whatever is wrong with the data is an INVALID verdict.
    """
    if not 0 <= threshold <= 1:  # also refuses NaN
        raise ConfigError(f"threshold must be between 0 and 1, got {threshold:g}; 5 % is 0.05")
    if mode not in ("relative", "absolute"):
        raise ConfigError(f"threshold_mode must be relative or absolute, got {mode!r}")
    wanted = tuple(dict.fromkeys((*run.metrics, *base.metrics) if metrics is None else metrics))

    shared = _reasons_for_all(base, run, wanted)
    verdicts, reasons = [], list(shared)
    for metric in wanted:
        own = _reasons_for_metric(base, run, metric)
        reasons += own
        verdicts.append(_decide_metric(base, run, metric, threshold, mode, invalid=bool(shared or own)))

    verdict: Verdict = "INVALID" if reasons else _worst(verdicts)
    sentence = (
        _invalid_sentence([reason.text for reason in reasons]) if reasons else _sentence(verdict, verdicts)
    )
    return GateResult(
        verdict=verdict,
        sentence=f"{verdict}: {sentence}",
        reasons=tuple(reason.text for reason in reasons),
        way_out=reasons[0].way_out if reasons else ACCEPT if verdict == "FAIL" else None,
        threshold=threshold,
        mode=mode,
        metrics=tuple(verdicts),
    )


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
        way_out = "scores made in another way are not comparable; `ragate baseline set` makes a new baseline"
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
        way_out = "`ragate baseline set` adds it" if missing[0] == "baseline" else "add it to --metrics"
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
    for item in run.items:
        if item.critical and item.id in scored and item.id not in usable and not run.partial:
            text = f"critical item {shorten(item.id, 40)} has no {metric} score in the run"
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


def _decide_metric(
    base: Baseline, run: Run, metric: str, threshold: float, mode: Mode, *, invalid: bool
) -> MetricVerdict:
    before, after = base.values(metric), _usable(run, metric)
    paired = [item for item in before if item in after]
    n = len(paired)
    base_mean, head_mean = mean(before[i] for i in paired), mean(after[i] for i in paired)
    if base_mean is None or head_mean is None:
        return MetricVerdict(
            metric=metric,
            verdict="INVALID",
            base_mean=base.mean(metric),
            head_mean=mean(after.values()),
            drop=None,
            limit=None,
            mode_used=mode,
            limit_note=None,
            paired=0,
            changed=(),
            broken=(),
            detectable=None,
            sentence=f"{metric} cannot be compared",
        )
    # one exact sum, so that equal scores give 0 exactly and the order of the items is irrelevant
    drop = math.fsum([*(before[i] for i in paired), *(-after[i] for i in paired)]) / n
    mode_used: Mode = mode
    if mode == "relative" and base_mean < MIN_RELATIVE_MEAN - SAME:
        mode_used = "absolute"
        note = f"absolute: {base_mean:.3f} is below {MIN_RELATIVE_MEAN}, too low for a relative limit"
    elif mode == "relative":
        note = f"{threshold * 100:g} % of {base_mean:.3f}"
    else:
        note = "absolute"
    limit = threshold * base_mean if mode_used == "relative" else threshold

    critical = {item.id for item in run.items if item.critical}
    broken = tuple(
        i for i in paired if i in critical and before[i] >= INTACT - SAME and after[i] <= BROKEN + SAME
    )
    # drop > 0: with a threshold of 0 an unchanged run still passes
    fails = (drop > 0 and drop >= limit - SAME) or bool(broken)
    detectable = None
    if n > 1:
        variance = math.fsum((before[i] - after[i] - drop) ** 2 for i in paired) / (n - 1)
        detectable = DETECTABLE * math.sqrt(variance / n)
    return MetricVerdict(
        metric=metric,
        verdict="INVALID" if invalid else "FAIL" if fails else "PASS",
        base_mean=base_mean,
        head_mean=head_mean,
        drop=drop,
        limit=limit,
        mode_used=mode_used,
        limit_note=note,
        paired=n,
        changed=changed_items(before, after),
        broken=broken,
        detectable=detectable,
        sentence=_metric_sentence(metric, drop, limit, base_mean, head_mean, n, broken, mode, mode_used),
    )


def _metric_sentence(
    metric: str,
    drop: float,
    limit: float,
    base_mean: float,
    head_mean: float,
    n: int,
    broken: Sequence[str],
    mode: Mode,
    mode_used: Mode,
) -> str:
    over = f"from {base_mean:.3f} to {head_mean:.3f} over {n} items"
    if drop > 0:
        fell, allowed = _distinct_points(drop, limit)
        text = f"{metric} fell {fell} (limit {allowed}), {over}"
    elif drop < 0:
        text = f"{metric} rose {points(drop)}, {over}"
    else:
        text = f"{metric} stayed at {head_mean:.3f} over {n} items"
    if broken:
        named = ", ".join(shorten(item, 40) for item in broken[:3])
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        which = "critical item" if len(broken) == 1 else "critical items"
        text = f"{which} {named}{more} broke on {metric}; {text}"
    if mode_used != mode:
        text += f"; the baseline mean is below {MIN_RELATIVE_MEAN}, so the limit is absolute"
    return text


def _sentence(verdict: Verdict, verdicts: Sequence[MetricVerdict]) -> str:
    """What the run's verdict rests on: the metric furthest over its limit, or the largest change."""

    def used(v: MetricVerdict) -> float:
        """How much of its limit the drop used up."""
        return (v.drop or 0.0) / max(v.limit or 0.0, SAME)

    worst = sorted((v for v in verdicts if v.verdict == verdict), key=used, reverse=True)
    if verdict == "PASS":
        size = f"{_count(len(verdicts), 'metric')} over {max(v.paired for v in verdicts)} items"
        if all(not v.changed for v in verdicts):
            return f"no score changed; {size}"
        if used(worst[0]) > 0:
            return f"no metric fell to its limit; closest: {worst[0].sentence}"
        if used(worst[-1]) < 0:
            return f"no metric fell; {worst[-1].sentence}"
        return f"no metric changed on average; {size}"
    return "; ".join([worst[0].sentence, *(f"also {v.sentence}" for v in worst[1:])])


def _invalid_sentence(reasons: Sequence[str]) -> str:
    more = f" (and {_count(len(reasons) - 1, 'more reason')})" if len(reasons) > 1 else ""
    return reasons[0] + more


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _distinct_points(drop: float, limit: float) -> tuple[str, str]:
    """Both in points, with as many digits as it takes to tell them apart."""
    for digits in (1, 2, 3, 4):
        fell, allowed = f"{drop * 100:.{digits}f} pt", f"{limit * 100:.{digits}f} pt"
        if fell != allowed or abs(drop - limit) <= SAME:
            break
    return (points(drop), allowed) if digits == 1 else (fell, allowed)


def _shorten_pair(old: str | None, new: str | None, width: int = 24) -> tuple[str, str]:
    """Both values short, beginning near the place where they differ, so that they still look different."""
    if old is None or new is None:
        return shorten(old or "none", width), shorten(new or "none", width)
    letters = enumerate(zip(old, new, strict=False))
    same = next((i for i, (a, b) in letters if a != b), min(len(old), len(new)))
    start = same - 6 if same >= width - 1 else 0
    head = "…" if start else ""
    return head + shorten(old[start:], width), head + shorten(new[start:], width)
