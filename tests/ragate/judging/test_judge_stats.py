"""The statistics of a judge against published values, brute force and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from ragate.judging.stats import (
    auroc,
    auroc_within,
    best_threshold,
    calibration_error,
    cluster_bootstrap,
    confusion,
    discrimination,
    group_codes,
    halves,
    halving,
    kappa,
    reliability,
    roc,
)

scored = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1)), min_size=2, max_size=40).filter(
    lambda pairs: len({label for _, label in pairs}) == 2
)


def arrays(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([s / 6 for s, _ in pairs]), np.array([y for _, y in pairs])


@given(scored)
def test_auroc_is_the_share_of_pairs_won_with_ties_half(pairs: list[tuple[int, int]]) -> None:
    scores, labels = arrays(pairs)
    ones, zeros = scores[labels == 1], scores[labels == 0]
    won = sum((a > b) + (a == b) / 2 for a in ones for b in zeros) / (len(ones) * len(zeros))
    assert auroc(scores, labels) == pytest.approx(won, abs=1e-12)
    assert auroc(scores, labels) == pytest.approx(
        mannwhitneyu(ones, zeros).statistic / (len(ones) * len(zeros)), abs=1e-12
    )


@given(scored)
def test_a_weight_counts_an_item_several_times(pairs: list[tuple[int, int]]) -> None:
    scores, labels = arrays(pairs)
    times = np.arange(1, len(scores) + 1) % 3 + 1
    assert auroc(scores, labels, times.astype(float)) == pytest.approx(
        auroc(np.repeat(scores, times), np.repeat(labels, times)), abs=1e-12
    )


@given(scored)
def test_the_area_under_the_curve_is_the_auroc(pairs: list[tuple[int, int]]) -> None:
    scores, labels = arrays(pairs)
    x, y = np.array(roc(scores, labels)).T
    assert np.trapezoid(y, x) == pytest.approx(auroc(scores, labels), abs=1e-12)


def test_auroc_of_a_published_example() -> None:
    # scikit-learn's documentation of roc_auc_score
    assert auroc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])) == 0.75


def test_auroc_without_a_label_is_no_number() -> None:
    assert math.isnan(auroc(np.array([0.1, 0.9]), np.array([1, 1])))


def test_within_groups_the_group_wins_nothing() -> None:
    # the scores tell the groups apart, and within each they are upside down or right
    scores = np.array([0.9, 0.8, 0.7, 0.1, 0.2])
    labels = np.array([1, 1, 0, 1, 0])
    groups = ["good", "good", "good", "bad", "bad"]
    assert auroc_within(scores, labels, groups) == pytest.approx(2 / 3)  # 2 of 2 pairs and 0 of 1
    assert auroc(scores, labels) == pytest.approx(4 / 6)
    assert math.isnan(auroc_within(np.array([0.1, 0.9]), np.array([0, 1]), ["a", "b"]))


@given(scored, st.integers(1, 4))
def test_within_groups_it_is_the_groups_own_pairs_together(pairs: list[tuple[int, int]], count: int) -> None:
    scores, labels = arrays(pairs)
    groups = [i * 7 % count for i in range(len(pairs))]
    weights = (np.arange(len(pairs)) % 3).astype(float)
    won = total = 0.0
    for group in set(groups):
        own = np.array([each == group for each in groups])
        size = weights[own & (labels == 1)].sum() * weights[own & (labels == 0)].sum()
        if size:
            won += auroc(scores[own], labels[own], weights[own]) * size
            total += size
    found = auroc_within(scores, labels, groups, weights)
    assert found == pytest.approx(won / total, abs=1e-12) if total else math.isnan(found)


def test_kappa_of_a_published_example() -> None:
    # Wikipedia, Cohen's kappa: 20 both yes, 15 both no, 5 and 10 apart: 0.4
    labels = np.array([1] * 25 + [0] * 25)
    verdicts = np.array([1] * 20 + [0] * 5 + [1] * 10 + [0] * 15)
    assert kappa(labels, verdicts) == pytest.approx(0.4)
    assert tuple(confusion(labels, verdicts)) == (20, 5, 10, 15)
    assert math.isnan(kappa(np.array([1, 1]), np.array([1, 1])))


def test_sensitivity_and_specificity_are_shares_of_their_own_label() -> None:
    cells = confusion(np.array([1, 1, 1, 1, 0, 0]), np.array([1, 1, 1, 0, 1, 0]))
    assert (cells.sensitivity, cells.specificity, cells.balanced_accuracy) == (0.75, 0.5, 0.625)


@given(scored)
def test_no_threshold_is_better_than_the_best(pairs: list[tuple[int, int]]) -> None:
    scores, labels = arrays(pairs)

    def accuracy(threshold: float) -> float:
        return confusion(labels, (scores >= threshold).astype(int)).balanced_accuracy

    tried = [accuracy(t) for t in np.linspace(-0.01, 1.01, 103)]
    assert accuracy(best_threshold(scores, labels)) == pytest.approx(max(tried), abs=1e-12)


def test_the_threshold_of_a_half_comes_from_the_other() -> None:
    # cluster "a" has its border at 0.5, cluster "b" at 0.2: each misjudges the other's
    scores = np.array([0.4, 0.6, 0.1, 0.3])
    labels = np.array([0, 1, 0, 1])
    found = halving(scores, labels, np.array([0, 0, 1, 1]), seed=0)
    assert found is not None
    assert found.verdicts.tolist() == [1, 1, 0, 0]
    assert found.balanced_accuracy == 0.5
    assert tuple(found.confusion) == (1, 1, 1, 1)


def test_a_half_without_a_label_has_no_threshold() -> None:
    assert halving(np.array([0.1, 0.9]), np.array([0, 1]), np.array([0, 1]), seed=0) is None


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(0, 99))
def test_halves_keep_clusters_together_and_are_halves(clusters: list[int], seed: int) -> None:
    codes = group_codes(clusters)
    first = halves(codes, seed)
    sides = {code: set(first[codes == code].tolist()) for code in codes.tolist()}
    assert all(len(side) == 1 for side in sides.values())
    count = sum(side == {True} for side in sides.values())
    assert count == (len(sides) + 1) // 2


def test_calibration_error_counts_how_far_shares_are_from_scores() -> None:
    scores = np.array([0.2] * 10 + [0.9] * 10)
    labels = np.array([0] * 8 + [1] * 2 + [1] * 5 + [0] * 5)
    assert calibration_error(scores, labels, bins=2) == pytest.approx((0.0 + 0.4) / 2)
    bins = reliability(scores, labels, bins=2)
    assert [b.items for b in bins] == [10, 10]
    assert [b.share for b in bins] == [0.2, 0.5]


def test_the_bootstrap_interval_of_a_mean_is_that_of_theory() -> None:
    # 200 clusters of one value each: the percentile interval is near mean -+ 1.96 standard errors
    values = np.random.default_rng(3).normal(size=200)
    found = cluster_bootstrap(lambda w, n: {"mean": float(w @ values / w.sum())}, np.arange(200))
    error = values.std(ddof=0) / math.sqrt(200)
    assert found["mean"] == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.25 * error
    )


def test_clusters_are_drawn_whole() -> None:
    clusters = np.array([0, 0, 1, 1, 1])
    seen: list[list[float]] = []

    def note(weights: np.ndarray, number: int) -> dict[str, float]:
        seen.append(weights.tolist())
        return {}

    cluster_bootstrap(note, clusters, resamples=50)
    assert all(w[0] == w[1] and w[2] == w[3] == w[4] and w[0] + w[2] == 2 for w in seen)


def test_figures_are_the_same_each_time_and_lie_in_their_intervals() -> None:
    random = np.random.default_rng(1)
    labels = random.integers(0, 2, 120).tolist()
    scores = [0.3 * y + float(random.uniform()) * 0.7 for y in labels]
    clusters = [i // 3 for i in range(120)]
    groups = [i % 4 for i in range(120)]
    first = discrimination(scores, labels, groups, clusters, resamples=100)
    assert first == discrimination(scores, labels, groups, clusters, resamples=100)
    for figure in first:
        assert figure.lower <= figure.value <= figure.upper
    assert first.auroc.value == auroc(np.array(scores), np.array(labels))
