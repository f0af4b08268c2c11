"""`Quality`: all figures of one judge on one set of labels, as data; page and terminal are made from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import BeforeValidator, Field

from ragate.judging import stats
from ragate.judging.asks import Row, Said
from ragate.judging.labelled import Subject
from ragate.judging.mapping import METHODS, ScoreMap, apply, crossfits, crossfitted, fit
from ragate.run import Frozen

HISTOGRAM = 20
"""Bars over [0, 1]."""
CURVE = 200
"""Points of a ROC curve that are kept."""
MISSES = 20
"""The most confident wrong verdicts that are listed."""
LEAST_GROUP = 10
"""A generator with fewer items gets no row of its own."""
LONGEST = 2_000
"""Characters of a text that are kept with a miss."""

Figure = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A number; NaN, where there is none, is null in JSON."""


class Interval(Frozen):
    """A figure with its 95 % cluster-bootstrap interval."""

    value: Figure
    lower: Figure
    upper: Figure


class ScoreFigures(Frozen):
    """How well one score tells the labels apart."""

    name: str
    auroc: Interval
    auroc_within: Interval
    """Within generators; of contexts, within the item that they belong to."""
    balanced_accuracy: Interval
    """At a threshold chosen on one half of the sources and tested on the other."""
    gain: Interval | None
    """AUROC less that of word overlap, on the same resamples; `None` of the floors."""


class Agreement(Frozen):
    """Verdicts against labels at one threshold."""

    sensitivity: Figure
    specificity: Figure
    balanced_accuracy: Figure
    kappa: Figure
    counts: tuple[Figure, Figure, Figure, Figure]
    """Labelled 1 judged 1, labelled 1 judged 0, labelled 0 judged 1, labelled 0 judged 0."""


class Group(Frozen):
    """The items of one generator."""

    name: str
    items: int
    positive: float
    """Share labelled 1."""
    auroc: Figure
    balanced_accuracy: Figure
    """At P = 0.5."""
    mean: float
    """Mean of the hard scores."""


class Bin(Frozen):
    """A bin of the reliability diagram."""

    items: int
    score: float
    share: float


class Miss(Frozen):
    """A confident wrong verdict."""

    id: str
    label: int
    soft: float
    question: str
    answer: str
    said: Said
    """The verdict that decided."""


class Quality(Frozen):
    """One judge on one set of labels."""

    judge: str
    subject: Subject
    statements: str
    """How answers became statements: `sentences` or `judge`; empty of contexts."""
    data: str
    items: int
    """Rows with a verdict: answers, or contexts."""
    positive: int
    """Of those, labelled 1."""
    clusters: int
    unlabelled: int
    failed: tuple[str, ...]
    """What got no verdict."""
    scores: tuple[ScoreFigures, ...]
    """The judge's first, the floors last."""
    as_it_is: Agreement
    """At P = 0.5 of the weakest statement, which is the verdict that the judge gives."""
    at_threshold: Agreement
    """Each half judged at the other's best threshold, both halves together, mean of the halvings."""
    threshold: Figure
    """The best threshold of the judge's score on all items."""
    error_before: Figure
    """Expected calibration error of the least P, 15 bins of equal mass. It, and not the product, goes through the map:
    a statement's P must."""
    error_after: dict[str, Figure]
    """The same after each map, fitted on the other half."""
    scores_map: ScoreMap
    shown_hard: Figure
    shown_soft: Figure
    reliability: tuple[Bin, ...]
    reliability_after: tuple[Bin, ...]
    roc: dict[str, tuple[tuple[float, float], ...]]
    histogram: dict[str, tuple[int, ...]]
    """Counts of the least P by label."""
    groups: tuple[Group, ...]
    misses: tuple[Miss, ...] = Field(default=())


class Source(NamedTuple):
    """What was measured, for the headline."""

    judge: str
    subject: Subject
    statements: str
    data: str
    unlabelled: int
    failed: tuple[str, ...]


SCORES: dict[str, Callable[[Row], float]] = {
    "judge": lambda row: row.soft,
    "judge, least over statements": lambda row: row.least,
    "judge, mean over statements": lambda row: row.mean,
    "judge, hard verdicts": lambda row: row.hard,
    "word overlap": lambda row: row.overlap,
    "shortness": lambda row: row.brevity,
    "length": lambda row: -row.brevity,
}
"""Name -> score. `shortness` is fewer content words, which speaks for an answer; `length` is more, for a context."""
UNUSED: dict[Subject, tuple[str, ...]] = {
    "faithfulness": ("length",),
    "relevance": ("judge, least over statements", "judge, mean over statements", "shortness"),
}
"""Scores that say nothing of a subject."""


def quality_of(rows: Sequence[Row], source: Source, *, resamples: int = stats.RESAMPLES) -> Quality:
    """All figures; those that need both labels are NaN where one is missing. `rows` must not be empty."""
    labels = np.array([row.label for row in rows], dtype=np.int64)
    clusters = [row.cluster for row in rows]
    codes = stats.group_codes(clusters)
    soft = np.array([row.soft for row in rows], dtype=np.float64)
    least = np.array([row.least for row in rows], dtype=np.float64)
    hard = np.array([row.hard for row in rows], dtype=np.float64)
    fitted = fit(least, labels, codes)
    after = {method: crossfitted(least, labels, codes, method) for method in METHODS}
    mapped = after[fitted.method]
    # what a map shows on the items that it was fitted on is more than it shows on others
    statement_means = np.array([row.mean for row in rows])
    for part, other in crossfits(least, labels, codes):
        for i in np.flatnonzero(part).tolist():
            said = np.array([s.probability for s in rows[i].said])
            statement_means[i] = apply(other, said, fitted.method).mean()
    return Quality(
        judge=source.judge,
        subject=source.subject,
        statements=source.statements if source.subject == "faithfulness" else "",
        data=source.data,
        items=len(rows),
        positive=int(labels.sum()),
        clusters=len(set(clusters)),
        unlabelled=source.unlabelled,
        failed=source.failed,
        scores=tuple(
            _figures(name, rows, labels, resamples) for name in SCORES if name not in UNUSED[source.subject]
        ),
        as_it_is=_agreement(labels, (least >= 0.5).astype(np.int64)),
        at_threshold=_at_threshold(soft, labels, codes),
        threshold=stats.best_threshold(soft, labels),
        error_before=stats.calibration_error(least, labels),
        error_after={str(name): stats.calibration_error(s, labels) for name, s in after.items()},
        scores_map=fitted,
        shown_hard=_gap(hard, labels),
        shown_soft=_gap(statement_means, labels),
        reliability=_bins(least, labels),
        reliability_after=_bins(mapped, labels),
        roc={
            name: _thinned(stats.roc(np.array([SCORES[name](row) for row in rows]), labels))
            for name in ("judge", "word overlap")
        },
        histogram={str(label): _histogram(least[labels == label]) for label in (1, 0)},
        groups=_groups(rows) if source.subject == "faithfulness" else (),
        misses=_misses(rows),
    )


def _figures(name: str, rows: Sequence[Row], labels: stats.Ints, resamples: int) -> ScoreFigures:
    scores = [SCORES[name](row) for row in rows]
    known, clusters = labels.tolist(), [row.cluster for row in rows]
    generators, overlaps = [row.generator for row in rows], [row.overlap for row in rows]
    found = stats.discrimination(scores, known, generators, clusters, resamples=resamples)
    gain = None
    if name.startswith("judge"):
        gain = _interval(stats.auroc_gain(scores, overlaps, known, clusters, resamples=resamples))
    return ScoreFigures(
        name=name,
        auroc=_interval(found.auroc),
        auroc_within=_interval(found.auroc_within),
        balanced_accuracy=_interval(found.balanced_accuracy),
        gain=gain,
    )


def _interval(found: stats.Interval) -> Interval:
    return Interval(**found._asdict())


def _agreement(labels: stats.Ints, verdicts: stats.Ints) -> Agreement:
    cells = stats.confusion(labels, verdicts)
    return Agreement(
        sensitivity=cells.sensitivity,
        specificity=cells.specificity,
        balanced_accuracy=cells.balanced_accuracy,
        kappa=stats.kappa(labels, verdicts),
        counts=cells,
    )


def _at_threshold(soft: stats.Floats, labels: stats.Ints, clusters: stats.Ints) -> Agreement:
    found = stats.halvings(soft, labels, clusters)
    if not found:
        nan = float("nan")
        return Agreement(
            sensitivity=nan, specificity=nan, balanced_accuracy=nan, kappa=nan, counts=(nan, nan, nan, nan)
        )
    counts = np.mean([each.confusion for each in found], axis=0)
    cells = stats.Confusion(*(round(float(count), 2) for count in counts))
    return Agreement(
        sensitivity=cells.sensitivity,
        specificity=cells.specificity,
        balanced_accuracy=float(np.mean([each.balanced_accuracy for each in found])),
        kappa=float(np.mean([stats.kappa(labels, each.verdicts) for each in found])),
        counts=cells,
    )


def _gap(scores: stats.Floats, labels: stats.Ints) -> float:
    """How far the mean score falls when all that was labelled 1 becomes 0."""
    if not 0 < labels.sum() < len(labels):
        return float("nan")
    return float(scores[labels == 1].mean() - scores[labels == 0].mean())


def _bins(scores: stats.Floats, labels: stats.Ints) -> tuple[Bin, ...]:
    return tuple(Bin(**each._asdict()) for each in stats.reliability(scores, labels))


def _thinned(points: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """At most `CURVE` of the points, the ends among them."""
    if len(points) <= CURVE:
        return tuple(points)
    return tuple(points[i * (len(points) - 1) // (CURVE - 1)] for i in range(CURVE))


def _histogram(scores: stats.Floats) -> tuple[int, ...]:
    return tuple(int(n) for n in np.histogram(scores, bins=HISTOGRAM, range=(0, 1))[0])


def _groups(rows: Sequence[Row]) -> tuple[Group, ...]:
    found = []
    for name in sorted({row.generator for row in rows}):
        own = [row for row in rows if row.generator == name]
        if len(own) < LEAST_GROUP:
            continue
        labels = np.array([row.label for row in own], dtype=np.int64)
        verdicts = np.array([row.least >= 0.5 for row in own], dtype=np.int64)
        found.append(
            Group(
                name=name,
                items=len(own),
                positive=float(labels.mean()),
                auroc=stats.auroc(np.array([row.soft for row in own]), labels),
                balanced_accuracy=stats.confusion(labels, verdicts).balanced_accuracy,
                mean=float(np.mean([row.hard for row in own])),
            )
        )
    return tuple(found)


def _misses(rows: Sequence[Row]) -> tuple[Miss, ...]:
    """Wrong at P = 0.5, the most confident first; of an answer, with its weakest statement."""
    wrong = [row for row in rows if (row.least >= 0.5) != (row.label == 1)]
    wrong.sort(key=lambda row: (-abs(row.least - 0.5), row.id))
    return tuple(
        Miss(
            id=row.id,
            label=row.label,
            soft=row.least,
            question=row.question[:LONGEST],
            answer=row.answer[:LONGEST],
            said=_cut(min(row.said, key=lambda said: said.probability)),
        )
        for row in wrong[:MISSES]
    )


def _cut(said: Said) -> Said:
    return said.model_copy(update={"text": said.text[:LONGEST]})
