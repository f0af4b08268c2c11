"""How well scores tell 1 from 0: discrimination, agreement, calibration, and what chance leaves of them.

Functions of numbers alone; random choices are seeded. numpy and scipy are imported when this module is.
Scores are higher for label 1; `clusters` says which items share a source and so may not be split or drawn apart.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BINS = 15
"""Bins of equal mass behind the expected calibration error."""
RESAMPLES = 2_000
SPLITS = 20
"""Halvings that the balanced accuracy is averaged over, each in both directions."""
SEED = 20_260_115


class Interval(NamedTuple):
    """A figure with the bounds of its 95 % interval."""

    value: float
    lower: float
    upper: float


class Confusion(NamedTuple):
    """Counts of items by label and verdict; 1 is positive."""

    true_positive: float
    false_negative: float
    false_positive: float
    true_negative: float

    @property
    def sensitivity(self) -> float:
        """Share of the items labelled 1 that got verdict 1; NaN where there are none."""
        return _ratio(self.true_positive, self.true_positive + self.false_negative)

    @property
    def specificity(self) -> float:
        """Share of the items labelled 0 that got verdict 0; NaN where there are none."""
        return _ratio(self.true_negative, self.true_negative + self.false_positive)

    @property
    def balanced_accuracy(self) -> float:
        """Mean of sensitivity and specificity."""
        return (self.sensitivity + self.specificity) / 2


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


class Halving(NamedTuple):
    """Items judged with a threshold that was chosen on the other half of the clusters."""

    verdicts: Ints
    confusion: Confusion
    """Of both halves together."""
    balanced_accuracy: float
    """Mean of the two halves' own."""


def auroc(scores: Floats, labels: Ints, weights: Floats | None = None) -> float:
    """Probability that an item labelled 1 scores above one labelled 0, ties counting half; NaN without both.

    The area under the ROC curve (Hanley and McNeil, Radiology 143, 1982); `weights` count items several times.
    """
    wins, pairs = _wins(_ranks(scores), labels, np.ones(len(scores)) if weights is None else weights)
    return _ratio(wins, pairs)


def _ranks(scores: Floats) -> Ints:
    """Place of each score among the distinct ones."""
    return np.unique(scores, return_inverse=True)[1].astype(np.int64)


def _wins(ranks: Ints, labels: Ints, weights: Floats) -> tuple[float, float]:
    """(pairs that the item labelled 1 wins, all pairs)."""
    size = int(ranks.max()) + 1 if len(ranks) else 0
    ones = np.bincount(ranks, weights * (labels == 1), minlength=size)
    zeros = np.bincount(ranks, weights * (labels == 0), minlength=size)
    below = np.cumsum(zeros) - zeros
    return float(ones @ (below + zeros / 2)), float(ones.sum() * zeros.sum())


def auroc_within(
    scores: Floats, labels: Ints, groups: Sequence[Hashable], weights: Floats | None = None
) -> float:
    """AUROC of pairs within one group, all groups' pairs together: knowing the group wins nothing."""
    codes = group_codes(groups)
    weights = np.ones(len(scores)) if weights is None else weights
    return _within(_group_ranks(scores, codes), labels, weights)


class _Places(NamedTuple):
    """Each item's place among the distinct scores of its group, the groups one after the other."""

    of_item: Ints
    group: Ints
    """Of each place."""


def _group_ranks(scores: Floats, codes: Ints) -> _Places:
    pairs = np.stack([codes.astype(np.float64), scores], axis=1)
    distinct, places = np.unique(pairs, axis=0, return_inverse=True)
    return _Places(places.reshape(-1).astype(np.int64), distinct[:, 0].astype(np.int64))


def _within(places: _Places, labels: Ints, weights: Floats) -> float:
    size = len(places.group)
    ones = np.bincount(places.of_item, weights * (labels == 1), minlength=size)
    zeros = np.bincount(places.of_item, weights * (labels == 0), minlength=size)
    group_zeros = np.bincount(places.group, zeros)
    before = np.cumsum(group_zeros) - group_zeros
    below = np.cumsum(zeros) - zeros - before[places.group]
    wins = ones @ (below + zeros / 2)
    return _ratio(float(wins), float(np.bincount(places.group, ones) @ group_zeros))


def group_codes(groups: Sequence[Hashable]) -> Ints:
    """A number for each group, in the order in which groups appear."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(group, len(known)) for group in groups], dtype=np.int64)


def roc(scores: Floats, labels: Ints) -> list[tuple[float, float]]:
    """The ROC curve: (false positive rate, true positive rate) from (0, 0) to (1, 1), a point a distinct score."""
    ranks = _ranks(scores)
    ones = np.bincount(ranks, labels == 1)[::-1].cumsum()
    zeros = np.bincount(ranks, labels == 0)[::-1].cumsum()
    points = zip(zeros / max(zeros[-1], 1), ones / max(ones[-1], 1), strict=True)
    return [(0.0, 0.0), *((float(x), float(y)) for x, y in points)]


def confusion(labels: Ints, verdicts: Ints, weights: Floats | None = None) -> Confusion:
    """How verdicts and labels meet."""
    weights = np.ones(len(labels)) if weights is None else weights
    cells = np.bincount(2 * labels + verdicts, weights, minlength=4)
    return Confusion(float(cells[3]), float(cells[2]), float(cells[1]), float(cells[0]))


def best_threshold(scores: Floats, labels: Ints, weights: Floats | None = None) -> float:
    """The threshold (a score at or above it is a 1) of the highest balanced accuracy.

    Halfway between two scores; of several as good, the middle one.
    """
    weights = np.ones(len(scores)) if weights is None else weights
    values, ranks = np.unique(scores, return_inverse=True)
    ones = np.bincount(ranks, weights * (labels == 1))
    zeros = np.bincount(ranks, weights * (labels == 0))
    # threshold i lies under values[i]; the last one lies above all
    missed = np.concatenate([[0.0], np.cumsum(ones)]) / max(ones.sum(), 1e-300)
    refused = np.concatenate([[0.0], np.cumsum(zeros)]) / max(zeros.sum(), 1e-300)
    gains = refused - missed
    best = np.flatnonzero(gains >= gains.max() - 1e-12)
    chosen = int(best[len(best) // 2])
    edges = np.concatenate([[values[0]], (values[:-1] + values[1:]) / 2, [np.nextafter(values[-1], np.inf)]])
    return float(edges[chosen])


def halves(clusters: Ints, seed: int) -> npt.NDArray[np.bool_]:
    """Which items are in the first half: half of the clusters, drawn at random."""
    count = int(clusters.max()) + 1
    first = np.random.default_rng(seed).permutation(count) < (count + 1) // 2
    return np.asarray(first[clusters])


def halving(
    scores: Floats, labels: Ints, clusters: Ints, seed: int, weights: Floats | None = None
) -> Halving | None:
    """Each half judged with the other's threshold; `None` where a half lacks a label."""
    weights = np.ones(len(scores)) if weights is None else weights
    first = halves(clusters, seed)
    verdicts = np.zeros(len(scores), dtype=np.int64)
    accuracies = []
    for tested in (first, ~first):
        chosen = ~tested
        if any(not weights[part & (labels == label)].sum() for part in (tested, chosen) for label in (0, 1)):
            return None
        threshold = best_threshold(scores[chosen], labels[chosen], weights[chosen])
        verdicts[tested] = scores[tested] >= threshold
        accuracies.append(confusion(labels[tested], verdicts[tested], weights[tested]).balanced_accuracy)
    return Halving(verdicts, confusion(labels, verdicts, weights), sum(accuracies) / 2)


def halvings(scores: Floats, labels: Ints, clusters: Ints, *, seed: int = SEED) -> list[Halving]:
    """`SPLITS` halvings; fewer where a half lacks a label."""
    found = (halving(scores, labels, clusters, seed + i) for i in range(SPLITS))
    return [each for each in found if each is not None]


def kappa(labels: Ints, verdicts: Ints) -> float:
    """Cohen's kappa (Educational and Psychological Measurement 20, 1960): agreement beyond chance; NaN if all alike."""
    cells = confusion(labels, verdicts)
    n = len(labels)
    agreed = (cells.true_positive + cells.true_negative) / n
    ones = (cells.true_positive + cells.false_negative) * (cells.true_positive + cells.false_positive)
    zeros = (cells.false_positive + cells.true_negative) * (cells.false_negative + cells.true_negative)
    chance = (ones + zeros) / n**2
    return _ratio(agreed - chance, 1 - chance)


class Bin(NamedTuple):
    """Items of neighbouring scores: how many, their mean score and their share of label 1."""

    items: int
    score: float
    share: float


def reliability(scores: Floats, labels: Ints, bins: int = BINS) -> list[Bin]:
    """Bins of equal mass, lowest scores first; equal scores may fall into two bins, in the items' order."""
    order = np.argsort(scores, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return [Bin(len(part), float(scores[part].mean()), float(labels[part].mean())) for part in parts]


def calibration_error(scores: Floats, labels: Ints, bins: int = BINS) -> float:
    """Expected calibration error: mean distance of score and share over bins of equal mass, by items.

    Naeini et al. 2015 with the equal-mass bins of Nguyen and O'Connor 2015.
    """
    found = reliability(scores, labels, bins)
    return sum(b.items * abs(b.score - b.share) for b in found) / len(scores) if found else float("nan")


Figures = dict[str, float]


def cluster_bootstrap(
    figures: Callable[[Floats, int], Figures],
    clusters: Ints,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> dict[str, tuple[float, float]]:
    """95 % percentile interval of each figure over resamples of whole clusters, drawn with replacement.

    `figures` gets the times that each item was drawn, and the number of the resample; a figure that is NaN there
    (no label 0 was drawn) is left out.
    """
    count = int(clusters.max()) + 1
    random = np.random.default_rng(seed)
    found: dict[str, list[float]] = {}
    for number in range(resamples):
        drawn = np.bincount(random.integers(count, size=count), minlength=count).astype(np.float64)
        for name, value in figures(drawn[clusters], number).items():
            found.setdefault(name, []).append(value)
    return {name: _percentiles(values) for name, values in found.items()}


def _percentiles(values: list[float]) -> tuple[float, float]:
    kept = np.array([value for value in values if not np.isnan(value)])
    if not len(kept):
        return float("nan"), float("nan")
    low, high = np.percentile(kept, [2.5, 97.5])
    return float(low), float(high)


class Discrimination(NamedTuple):
    """What one score tells of the labels; a figure without both labels is NaN."""

    auroc: Interval
    auroc_within: Interval
    """Within groups."""
    balanced_accuracy: Interval
    """At a threshold chosen on one half of the clusters and tested on the other."""


def discrimination(
    scores: Sequence[float],
    labels: Sequence[int],
    groups: Sequence[Hashable],
    clusters: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Discrimination:
    """The three figures with cluster-bootstrap intervals; each resample halves the clusters anew."""
    s, y = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    sources = group_codes(clusters)
    ranks, within = _ranks(s), _group_ranks(s, group_codes(groups))

    def figures(weights: Floats, number: int) -> Figures:
        halved = halving(s, y, sources, seed + number, weights)
        return {
            "auroc": _ratio(*_wins(ranks, y, weights)),
            "auroc_within": _within(within, y, weights),
            "balanced_accuracy": halved.balanced_accuracy if halved else float("nan"),
        }

    intervals = cluster_bootstrap(figures, sources, resamples=resamples, seed=seed)
    split = [each.balanced_accuracy for each in halvings(s, y, sources, seed=seed)]
    values = figures(np.ones(len(s)), 0) | {
        "balanced_accuracy": float(np.mean(split)) if split else float("nan")
    }
    found: dict[str, Any] = {name: Interval(values[name], *intervals[name]) for name in values}
    return Discrimination(**found)


def auroc_gain(
    scores: Sequence[float],
    others: Sequence[float],
    labels: Sequence[int],
    clusters: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """AUROC of `scores` less that of `others` on the same items, with its paired cluster-bootstrap interval."""
    y = np.asarray(labels, dtype=np.int64)
    ours, theirs = (_ranks(np.asarray(each, dtype=np.float64)) for each in (scores, others))

    def figures(weights: Floats, number: int) -> Figures:
        return {"gain": _ratio(*_wins(ours, y, weights)) - _ratio(*_wins(theirs, y, weights))}

    interval = cluster_bootstrap(figures, group_codes(clusters), resamples=resamples, seed=seed)["gain"]
    return Interval(figures(np.ones(len(y)), 0)["gain"], *interval)
