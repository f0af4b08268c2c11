"""The numbers behind the reports' drawings: distributions of scores, drops with their bounds and limits, curves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from ragate.gate.baseline import SAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ragate.gate.verdict import MetricVerdict

BINS = 10


class Distribution(NamedTuple):
    """Old and new scores as bars, and where means and limit stand; heights are shares of the tallest bar."""

    bars: list[tuple[float, float]]
    base: float | None
    head: float | None
    limit: float | None
    """The mean that must not be reached, in score units."""


class Interval(NamedTuple):
    """A drop with its bounds, zero and limit on an axis of which all are shares in [0, 1]; right is worse."""

    zero: float
    limit: float
    drop: float
    lower: float
    upper: float


def distribution(
    base: Iterable[float],
    head: Iterable[float],
    base_mean: float | None,
    head_mean: float | None,
    limit: float | None,
) -> Distribution:
    """The drawing of one metric; `limit` is a drop in score units."""
    old, new = histogram(base), histogram(head)
    tallest = max((*old, *new, 1e-9))
    return Distribution(
        bars=[(share / tallest, other / tallest) for share, other in zip(old, new, strict=True)],
        base=base_mean,
        head=head_mean,
        limit=None if base_mean is None or limit is None else max(base_mean - limit, 0.0),
    )


def histogram(values: Iterable[float]) -> list[float]:
    """Share of the values in each of `BINS` equal bins over [0, 1]."""
    numbers = list(values)
    counts = [0] * BINS
    for value in numbers:
        # 0.3 * 10 is 2.9999…, and a score of 1 belongs to the last bin
        counts[min(max(int(value * BINS + SAME), 0), BINS - 1)] += 1
    return [count / len(numbers) if numbers else 0.0 for count in counts]


def intervals(verdicts: Sequence[MetricVerdict]) -> dict[str, Interval]:
    """Metric -> its interval, all on one axis so that they can be compared by eye.

    One that is not known, or has no end (as the bounds of a single number), is left out: it has no place on an axis.
    """
    drawn = [
        (v.metric, v.limit, v.drop, v.lower, v.upper)
        for v in verdicts
        if v.limit is not None and v.drop is not None and v.lower is not None and v.upper is not None
        if all(map(math.isfinite, (v.limit, v.drop, v.lower, v.upper)))
    ]
    if not drawn:
        return {}
    ends = [value for _, *numbers in drawn for value in numbers]
    # some of the side where nothing is wrong is always seen
    low, high = min(0.0, *ends), max(ends)
    low = min(low, -0.25 * high)
    room = max(high - low, SAME) * 0.06
    low, high = low - room, high + room

    def share(value: float) -> float:
        return (value - low) / (high - low)

    return {
        metric: Interval(share(0.0), share(limit), share(drop), share(lower), share(upper))
        for metric, limit, drop, lower, upper in drawn
    }


def path_of(points: Iterable[tuple[float, float]], width: float, height: float) -> str:
    """An SVG path through points of the unit square, whose y grows upwards."""
    steps = " ".join(f"{x * width:.1f} {(1 - y) * height:.1f}" for x, y in points)
    return f"M{steps}" if steps else ""


def heights(*counts: Sequence[int]) -> list[tuple[float, ...]]:
    """Bars of several histograms over the same bins, each histogram as shares of its own sum, the tallest bar 1."""
    shares = [[n / max(sum(each), 1) for n in each] for each in counts]
    tallest = max((share for each in shares for share in each), default=0.0) or 1.0
    return [tuple(share / tallest for share in bars) for bars in zip(*shares, strict=True)]
