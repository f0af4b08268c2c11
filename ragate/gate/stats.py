"""The gate's statistics: bounds of a mean drop, how likely chance made it, how many items it takes to see one.

Functions of numbers alone: the same numbers give the same result in whatever order they come and on any machine.
scipy and numpy are imported when first asked for, since `ragate --help` needs neither.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

CONFIDENCE = 0.95
"""Of each bound by itself: between the two lies the mean with 90 %."""
DETECTABLE = 2.486
"""Normal quantiles of 95 % confidence and 80 % power: a true drop of so many standard errors is seen in 4 of 5 runs."""
EXACT_UP_TO = 16
"""Up to so many numbers other than 0 every choice of signs is counted: 65,536 at most."""
FLIPS = 10_000
SEED = 20_260_115
"""Any fixed number: the same scores always give the same p."""
ROUNDING = 1e-10
"""Share of the sum of sizes within which two sums are the same: what adding in another order may change."""


class Estimate(NamedTuple):
    """A mean with its bounds."""

    mean: float
    lower: float
    upper: float
    """Each holds with 95 % by itself."""
    error: float
    """Standard error of the mean."""


def mean_of(values: Sequence[float]) -> float:
    """Mean with one rounding, so that the order of the values is irrelevant."""
    return math.fsum(values) / len(values)


def johnson_bounds(values: Sequence[float]) -> Estimate:
    """Bounds of the mean of independent `values` that allow for their skew.

    Johnson, "Modified t tests and confidence intervals for asymmetrical populations", JASA 73 (1978): the t interval
    shifted by m3 / (6 s² n) · (1 + 2 t²). Equal values are their own bounds; of a single one nothing is known, so its
    bounds are infinite. Raises ValueError for no values.
    """
    n = len(values)
    mean = mean_of(values)
    if n == 1:
        return Estimate(mean, -math.inf, math.inf, math.inf)
    deviations = [value - mean for value in values]
    variance = math.fsum(d * d for d in deviations) / (n - 1)
    if variance == 0.0:
        return Estimate(mean, mean, mean, 0.0)
    t = t_quantile(CONFIDENCE, n - 1)
    third = math.fsum(d**3 for d in deviations) / n
    shift = third / (6 * variance * n) * (1 + 2 * t * t)
    error = math.sqrt(variance / n)
    return Estimate(mean, mean + shift - t * error, mean + shift + t * error, error)


def t_quantile(probability: float, freedom: int) -> float:
    """The value below which Student's t with `freedom` degrees of freedom lies with `probability`."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))


def cluster_sums(values: Sequence[float], labels: Sequence[Hashable]) -> list[float]:
    """The sum of each cluster, in the order in which the clusters appear; labels say which value belongs where."""
    clusters: dict[Hashable, list[float]] = {}
    for value, label in zip(values, labels, strict=True):
        clusters.setdefault(label, []).append(value)
    return [math.fsum(members) for members in clusters.values()]


def clustered(values: Sequence[float], labels: Sequence[Hashable]) -> list[float]:
    """One number a cluster, whose mean is that of `values` and whose scatter is that of the clusters' sums.

    With G clusters of n values in all, cluster c becomes mean + G/n · (sum of its deviations from the mean): bounds
    made of these have G - 1 degrees of freedom and the cluster-robust standard error (Liang and Zeger, Biometrika 73,
    1986, with the factor G / (G - 1)). Clusters of one value each give the values themselves.
    """
    mean = mean_of(values)
    sums = cluster_sums([value - mean for value in values], labels)
    return [mean + len(sums) / len(values) * total for total in sums]


def sign_flip_p(values: Sequence[float], *, flips: int = FLIPS, seed: int = SEED) -> float:
    """Probability of a sum at least this large if each value might as well have had the other sign.

    Fisher's randomization test for pairs (The Design of Experiments, 1935), one-sided: small where the values are
    positive too often and too large for chance. Every choice of signs counts where at most `EXACT_UP_TO` values are
    not 0; else `flips` random ones do, and the observed one with them, so that p is never 0.
    """
    import numpy as np

    ordered = np.array(sorted(value for value in values if value != 0.0), dtype=np.float64)
    count = len(ordered)
    slack = ROUNDING * float(np.abs(ordered).sum())
    if count <= EXACT_UP_TO:
        turned = np.zeros(1)  # the sums of the values that are turned around, for each choice of them
        for value in ordered:
            turned = np.concatenate([turned, turned + value])
        return float(np.count_nonzero(turned <= slack)) / len(turned)
    # a sum is at least as large as the one observed where what is turned around was not positive in all
    words = -(-count // 64)
    bits = np.random.PCG64(seed)
    as_large = 0
    step = max(1, 4_000_000 // (64 * words))
    for start in range(0, flips, step):
        rows = min(step, flips - start)
        # raw bits: numpy promises that they stay the same, of its random numbers it does not
        raw = bits.random_raw(rows * words).astype("<u8").reshape(rows, words).view(np.uint8)
        chosen = np.unpackbits(raw, axis=1)[:, :count]
        as_large += int(np.count_nonzero(chosen.astype(np.float64) @ ordered <= slack))
    return (1 + as_large) / (1 + flips)


def fewest_changed(level: float) -> int:
    """How many values other than 0 it takes at least for `sign_flip_p` below `level`: k of them give 2^-k or more."""
    return math.floor(-math.log2(level)) + 1


def holm(probabilities: Sequence[float]) -> list[float]:
    """The p values adjusted for being several (Holm, Scandinavian Journal of Statistics 6, 1979), in their order."""
    adjusted = [0.0] * len(probabilities)
    largest = 0.0
    ranked = sorted(range(len(probabilities)), key=lambda i: probabilities[i])
    for rank, i in enumerate(ranked):
        largest = max(largest, min(1.0, (len(probabilities) - rank) * probabilities[i]))
        adjusted[i] = largest
    return adjusted


def mcnemar_p(broken: int, mended: int) -> float:
    """Probability that so many or more of the items that changed sides broke, if each might as well have mended.

    McNemar's exact test, one-sided; 1 where none broke.
    """
    from scipy.special import betainc

    # the upper tail of a binomial distribution with even odds, as an incomplete beta function
    return float(betainc(broken, mended + 1, 0.5)) if broken else 1.0


def detectable_drop(error: float, accuracy: float | None = None) -> float:
    """The least true drop that runs with this standard error see in 4 of 5 cases.

    A judge with balanced `accuracy` B shows only 2B - 1 of a drop, so that it must be larger by as much.
    """
    return DETECTABLE * error / (1.0 if accuracy is None else 2 * accuracy - 1)


def items_needed(error: float, items: int, drop: float) -> int:
    """How many items with the scatter of these `items` see a true `drop` above 0 in 4 of 5 cases; at least 1."""
    ratio = DETECTABLE * error / drop
    # a hair less, so that a whole number is not raised by rounding
    return max(1, math.ceil(items * ratio * ratio * (1 - 1e-12)))
