"""Intervals over groups cover what they promise, and nulls are rejected as often as said."""

import numpy as np
import pytest
from scipy.stats import binom

from saesteer.mechanisms.statistics import (
    bootstrap_ratio,
    grouped,
    permutation_test,
    sign_p_values,
)

RUNS = 500


def test_groups_are_summed() -> None:
    sums, counts = grouped(np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), ["a", "b", "a"])
    assert sums.tolist() == [[6.0, 8.0], [3.0, 4.0]] and counts.tolist() == [2, 1]


def test_few_groups_have_no_interval() -> None:
    low, high = bootstrap_ratio(np.ones((7, 2)), np.ones(7))
    assert np.isnan(low).all() and np.isnan(high).all()
    low, high = bootstrap_ratio(np.ones((8, 2)), np.ones(8))
    assert low.tolist() == high.tolist() == [1.0, 1.0]


def test_a_denominator_around_zero_has_no_interval() -> None:
    low, _ = bootstrap_ratio(np.ones((10, 1)), np.array([1.0, -1.0] * 5))
    assert np.isnan(low).all()


def test_unequal_groups_count_by_their_rows() -> None:
    """The mean of rows, not of group means."""
    sums, counts = np.array([[10.0]] * 4 + [[0.0]] * 4), np.array([10.0] * 4 + [1.0] * 4)
    low, high = bootstrap_ratio(sums, counts)
    assert low[0] < 40 / 44 < high[0] <= 1.0


@pytest.mark.parametrize("pairs_a_group", [1, 3])
def test_the_bootstrap_covers(pairs_a_group: int) -> None:
    drawn = np.random.default_rng(0)
    groups, cells = 40, 500  # cells are independent runs
    values = drawn.normal(0.3, 1, (groups, cells)).repeat(pairs_a_group, axis=0)
    sums, counts = grouped(values, [str(i // pairs_a_group) for i in range(len(values))])
    low, high = bootstrap_ratio(sums, counts, resamples=1000)
    covered = float(((low < 0.3) & (0.3 < high)).mean())
    # A percentile bootstrap of 40 covers a little under 95 %; 3 points are 3 standard errors.
    assert 0.91 < covered < 0.97


def test_the_sign_test_rejects_a_null_as_often_as_it_says() -> None:
    drawn = np.random.default_rng(1)
    rejected = sum(p < 0.05 for p in sign_p_values(drawn.normal(0, 1, (25, RUNS))))
    # Exact at 25 groups: 8 or fewer, or 17 or more, of one sign.
    size = 2 * binom.cdf(7, 25, 0.5)
    assert size < 0.05
    assert rejected <= binom.ppf(0.999, RUNS, size)
    assert rejected >= binom.ppf(0.001, RUNS, size)


def test_permutations_reject_the_null_as_often_as_said() -> None:
    drawn = np.random.default_rng(0)
    hits = sum(permutation_test(*drawn.normal(size=(2, 12)), draws=200) < 0.05 for _ in range(RUNS))
    assert binom.ppf(0.001, RUNS, 0.05) <= hits <= binom.ppf(0.999, RUNS, 0.05)
    assert permutation_test(np.ones(8), np.zeros(8)) < 0.01
    assert permutation_test(np.ones(8), np.ones(8)) == 1
