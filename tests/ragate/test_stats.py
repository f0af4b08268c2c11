"""The statistics against scipy, statsmodels, published examples and brute force."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from ragate.gate.stats import (
    cluster_sums,
    clustered,
    detectable_drop,
    fewest_changed,
    holm,
    items_needed,
    johnson_bounds,
    mcnemar_p,
    mean_of,
    sign_flip_p,
    t_quantile,
)

DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
"""Crossed less self-fertilized maize, in eighths of an inch: Fisher, The Design of Experiments, section 21."""

DROPS = st.integers(-20, 20).map(lambda k: k / 20)
"""Differences of scores such as ragas gives: multiples of a twentieth, many of them equal."""


def brute_force_p(values: list[float]) -> float:
    """Of all choices of signs, the share whose sum is at least that of `values`, in exact integers of 1/1000."""
    whole = [round(1000 * value) for value in values]
    sums = [sum(choice) for choice in itertools.product(*((v, -v) for v in whole))]
    return sum(total >= sum(whole) for total in sums) / len(sums)


# Bounds


@pytest.mark.parametrize("freedom", [1, 2, 9, 11, 49, 99, 999, 100_000])
def test_quantiles_of_t_are_scipys(freedom: int) -> None:
    assert t_quantile(0.95, freedom) == pytest.approx(scipy_stats.t.ppf(0.95, freedom), rel=1e-12)


def test_without_skew_the_bounds_are_those_of_the_t_interval() -> None:
    values = [-0.4, -0.1, 0.0, 0.1, 0.4, 0.2, -0.2, 0.3, -0.3, 0.0]
    bounds = johnson_bounds(values)
    test = scipy_stats.ttest_1samp(values, 0.0).confidence_interval(0.90)  # 5 % on each side
    assert (bounds.lower, bounds.upper) == pytest.approx((test.low, test.high), abs=1e-15)
    assert bounds.error == pytest.approx(scipy_stats.sem(values))


@pytest.mark.parametrize("seed", range(5))
def test_with_skew_they_are_shifted_as_johnson_says(seed: int) -> None:
    values = np.random.default_rng(seed).exponential(0.1, 60)
    n, t = 60, scipy_stats.t.ppf(0.95, 59)
    s2, m3 = values.var(ddof=1), scipy_stats.moment(values, 3)
    shift = m3 / (6 * s2 * n) * (1 + 2 * t**2)
    bounds = johnson_bounds(values.tolist())
    assert bounds.mean == pytest.approx(values.mean(), rel=1e-13)
    assert bounds.upper == pytest.approx(values.mean() + shift + t * math.sqrt(s2 / n), rel=1e-12)
    assert bounds.lower == pytest.approx(values.mean() + shift - t * math.sqrt(s2 / n), rel=1e-12)


def test_johnsons_shift_solves_his_statistic_for_the_mean() -> None:
    """J = [(x̄ - μ) + m3/(6 s² n) + m3/(3 s⁴) (x̄ - μ)²] √n / s, with (x̄ - μ)² ≈ t² s²/n, is ±t at the bounds."""
    values = [0.0] * 40 + [0.2, 0.3, 0.5, 1.0, 1.0]
    n, t = 45, scipy_stats.t.ppf(0.95, 44)
    s2, m3 = float(np.var(values, ddof=1)), float(scipy_stats.moment(values, 3))
    bounds = johnson_bounds(values)
    for bound, sign in ((bounds.lower, 1), (bounds.upper, -1)):
        square = t**2 * s2 / n
        j = ((bounds.mean - bound) + m3 / (6 * s2 * n) + m3 / (3 * s2**2) * square) * math.sqrt(n / s2)
        assert j == pytest.approx(sign * t)


def test_equal_values_are_their_own_bounds_and_of_one_value_nothing_is_known() -> None:
    assert johnson_bounds([0.0] * 30) == (0.0, 0.0, 0.0, 0.0)
    assert johnson_bounds([0.25] * 30) == (0.25, 0.25, 0.25, 0.0)
    assert johnson_bounds([0.3])[1:] == (-math.inf, math.inf, math.inf)


@given(st.lists(DROPS, min_size=2, max_size=30), st.integers(0, 2**32))
def test_no_statistic_depends_on_the_order_of_the_values(values: list[float], seed: int) -> None:
    mixed = random.Random(seed).sample(values, len(values))
    assert johnson_bounds(mixed) == johnson_bounds(values)
    assert sign_flip_p(mixed, flips=500) == sign_flip_p(values, flips=500)


# Clusters


def test_clusters_have_the_robust_standard_error_of_the_textbook() -> None:
    """Cameron and Miller (2015), with G/(G-1); for an intercept alone it is statsmodels' cluster covariance."""
    statsmodels = pytest.importorskip("statsmodels.api")
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 12, 80)
    values = rng.normal(0.05, 0.2, 80) + 0.1 * rng.normal(size=12)[labels]
    bounds = johnson_bounds(clustered(values.tolist(), labels.tolist()))
    fit = statsmodels.OLS(values, np.ones(80)).fit(
        cov_type="cluster", cov_kwds={"groups": labels, "use_correction": False}
    )
    assert bounds.mean == pytest.approx(values.mean())
    assert bounds.error == pytest.approx(fit.bse[0] * math.sqrt(12 / 11))


def test_clusters_of_equal_size_are_judged_by_their_means() -> None:
    values = [0.1, 0.3, 0.0, 0.0, 0.5, 0.1, -0.2, 0.4]
    means = [0.2, 0.0, 0.3, 0.1]
    assert clustered(values, "aabbccdd") == pytest.approx(means)
    assert cluster_sums(values, "aabbccdd") == pytest.approx([0.4, 0.0, 0.6, 0.2])


@given(st.lists(DROPS, min_size=2, max_size=20))
def test_clusters_of_one_item_are_the_items(values: list[float]) -> None:
    assert clustered(values, range(len(values))) == pytest.approx(values)
    assert sign_flip_p(cluster_sums(values, range(len(values))), flips=300) == sign_flip_p(values, flips=300)


def test_items_that_fall_together_are_fewer_observations() -> None:
    values, labels = [0.4, 0.4, 0.4, 0.0, 0.0, 0.0] * 4, [i // 3 for i in range(24)]
    assert johnson_bounds(clustered(values, labels)).upper > johnson_bounds(values).upper
    assert sign_flip_p(cluster_sums(values, labels)) == 1 / 2**4 > sign_flip_p(values)


# Sign flips


def test_fishers_own_count_of_darwins_maize() -> None:
    """863 of the 32,768 choices of signs have a sum of 314 or more."""
    assert sum(DARWIN) == 314
    assert sign_flip_p(DARWIN) == 863 / 32_768


@given(st.lists(DROPS, min_size=1, max_size=9))
def test_few_values_are_counted_as_brute_force_does(values: list[float]) -> None:
    assert sign_flip_p(values) == pytest.approx(brute_force_p(values), abs=1e-12)


def test_values_that_no_binary_fraction_holds_still_tie() -> None:
    values = [1 / 3, 1 / 3, 1 / 3, 0.1 + 0.2, -0.3, 2 / 3, -1.0]
    thirds = [10 / 30, 10 / 30, 10 / 30, 9 / 30, -9 / 30, 20 / 30, -1]
    assert sign_flip_p(values) == brute_force_p([round(t * 30) / 1000 for t in thirds])


@pytest.mark.parametrize("seed", range(4))
def test_it_is_scipys_permutation_test_exact_and_sampled(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for n, tolerance in ((12, 1e-12), (60, 0.012)):
        values = rng.normal(0.1, 0.5, n)

        def total(x: np.ndarray, axis: int = -1) -> np.ndarray:
            return np.asarray(x.sum(axis=axis))

        found = scipy_stats.permutation_test(
            (values,),
            total,
            permutation_type="samples",
            alternative="greater",
            n_resamples=20_000 if n > 12 else math.inf,
            rng=np.random.default_rng(1),
        ).pvalue
        assert sign_flip_p(values.tolist()) == pytest.approx(found, abs=tolerance)


def test_signs_alone_give_the_binomial_test() -> None:
    values = [0.5] * 11 + [-0.5] * 4
    exact = scipy_stats.binomtest(11, 15, alternative="greater").pvalue
    assert sign_flip_p(values) == pytest.approx(exact)


def test_sampling_tends_to_the_exact_count() -> None:
    """16 values are counted; with a 17th of next to nothing the same question is sampled."""
    values = [*DARWIN, 20.0]
    exact = sign_flip_p(values)
    error = math.sqrt(exact * (1 - exact))
    for flips in (1_000, 10_000, 200_000):
        for seed in (1, 2, 3):
            sampled = sign_flip_p([*values, 1e-7], flips=flips, seed=seed)
            assert abs(sampled - exact) < 4.5 * error / math.sqrt(flips) + 1 / flips


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-20, 20).filter(bool), min_size=17, max_size=18))
def test_sampling_tends_to_the_exact_count_of_any_values(twentieths: list[int]) -> None:
    sums = np.zeros(1, dtype=np.int64)
    for value in twentieths:
        sums = np.concatenate([sums + value, sums - value])
    exact = float((sums >= sum(twentieths)).mean())
    sampled = sign_flip_p([value / 20 for value in twentieths], flips=20_000)
    assert abs(sampled - exact) < 5 * math.sqrt(exact * (1 - exact) / 20_000) + 1 / 20_000


def test_an_unchanged_system_has_p_1_and_sampled_p_is_never_0() -> None:
    assert sign_flip_p([0.0] * 50) == 1.0
    assert sign_flip_p([0.5] * 100) == 1 / 10_001


def test_sixteen_values_other_than_0_are_counted_and_seventeen_are_sampled() -> None:
    assert sign_flip_p([0.5] * 16 + [0.0] * 50) == 1 / 2**16
    assert sign_flip_p([0.5] * 17) == 1 / 10_001


def test_the_same_scores_have_the_same_p_on_every_machine() -> None:
    """A number that anybody can compare with: the signs are PCG64's raw bits, which numpy keeps as they are."""
    values = [math.sin(i) / 4 + 0.04 for i in range(100)]
    assert sign_flip_p(values) == 120 / 10_001


@settings(max_examples=40, deadline=None)
@given(
    st.one_of(
        st.lists(DROPS, min_size=2, max_size=12),
        st.lists(DROPS.map(lambda d: d + 0.001), min_size=17, max_size=30),
    ),
    st.integers(1, 400),
)
def test_a_larger_drop_of_every_item_never_has_a_larger_p_or_smaller_bounds(
    values: list[float], more: int
) -> None:
    shifted = [value + more * 0.005 for value in values]
    if len(values) > 16 and 0.0 in shifted:
        return  # another number of values other than 0 draws other signs
    assert sign_flip_p(shifted, flips=1_000) <= sign_flip_p(values, flips=1_000)
    assert johnson_bounds(shifted).upper > johnson_bounds(values).upper
    assert johnson_bounds(shifted).lower > johnson_bounds(values).lower


# Holm, McNemar, power


@pytest.mark.parametrize(
    ("level", "fewest"), [(0.05, 5), (0.05 / 2, 6), (0.05 / 3, 6), (0.05 / 4, 7), (1 / 32, 6)]
)
def test_the_fewest_values_whose_p_can_be_below_a_level(level: float, fewest: int) -> None:
    assert fewest_changed(level) == fewest
    assert sign_flip_p([1.0] * fewest) < level <= sign_flip_p([1.0] * (fewest - 1))


def test_holms_adjustment_of_a_textbook_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.4]) == [0.4]


def test_holms_adjustment_is_that_of_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    rng = random.Random(2)
    for count in (1, 2, 3, 4, 8, 8, 8):
        probabilities = [rng.choice([0.0, 1.0, 0.01, rng.random(), rng.random() / 20]) for _ in range(count)]
        wanted = multitest.multipletests(probabilities, method="holm")[1]
        assert holm(probabilities) == pytest.approx(wanted.tolist())


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(0, 2**32))
def test_holms_adjustment_keeps_the_ranks_and_makes_no_p_smaller(ps: list[float], seed: int) -> None:
    adjusted = dict(zip(ps, holm(ps), strict=True))
    assert all(adjusted[p] >= p and adjusted[p] <= 1 for p in ps)
    assert [adjusted[p] for p in sorted(ps)] == sorted(holm(ps))
    mixed = random.Random(seed).sample(ps, len(ps))
    assert holm(mixed) == [adjusted[p] for p in mixed]


def test_mcnemars_exact_test_of_a_published_table() -> None:
    """Fagerland, Lydersen and Laake (2013), airway hyper-responsiveness before and after: 7 and 1, p 0.0703."""
    assert 2 * mcnemar_p(7, 1) == pytest.approx(0.0703, abs=5e-5)


@pytest.mark.parametrize(
    ("broken", "mended"), [(0, 0), (0, 5), (1, 0), (5, 5), (7, 1), (1, 7), (40, 22), (900, 800)]
)
def test_mcnemar_is_the_binomial_test_of_scipy_and_half_of_statsmodels(broken: int, mended: int) -> None:
    p = mcnemar_p(broken, mended)
    if broken + mended:
        wanted = scipy_stats.binomtest(broken, broken + mended, alternative="greater").pvalue
        assert p == pytest.approx(wanted, rel=1e-10)
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    if broken > mended:
        assert min(1.0, 2 * p) == pytest.approx(tables.mcnemar([[0, broken], [mended, 0]], exact=True).pvalue)


def test_the_detectable_drop_is_seen_in_four_of_five_runs_and_a_weak_judge_shows_half_of_it() -> None:
    z = scipy_stats.norm.ppf(0.95) + scipy_stats.norm.ppf(0.80)
    assert detectable_drop(0.01) == pytest.approx(0.01 * z, rel=1e-3)
    assert detectable_drop(0.01, accuracy=0.75) == pytest.approx(2 * detectable_drop(0.01))
    assert detectable_drop(0.01, accuracy=1.0) == detectable_drop(0.01)


def test_as_many_items_as_needed_make_the_limit_the_detectable_drop() -> None:
    assert items_needed(0.2 / math.sqrt(100), 100, 0.05) == math.ceil((2.486 * 0.2 / 0.05) ** 2)
    needed = items_needed(0.2 / math.sqrt(100), 100, 0.05)
    assert detectable_drop(0.2 / math.sqrt(needed)) <= 0.05 < detectable_drop(0.2 / math.sqrt(needed - 1))
    assert items_needed(detectable_drop(0.02) / 2.486, 100, detectable_drop(0.02)) == 100
    assert items_needed(0.0, 100, 0.05) == 1


def test_a_mean_is_rounded_once() -> None:
    assert mean_of([1e16, 1.0, -1e16, 1.0]) == 0.5


def test_importing_the_statistics_imports_neither_scipy_nor_numpy() -> None:
    code = (
        "import sys, ragate.cli, ragate.gate.verdict; print(*sorted({'scipy', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
