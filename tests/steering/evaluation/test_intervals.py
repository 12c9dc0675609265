"""Intervals and tests against published values, closed forms and slow counts."""

import math
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saesteer.checkpoints.errors import UsageError
from saesteer.steering.evaluation import intervals


def test_wilson_against_published_values() -> None:
    # Newcombe 1998, table I, method 3 (score): 81/263, 15/148, 0/20, 1/29
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        # four published decimals
        assert intervals.wilson(successes, n) == pytest.approx((low, high), abs=6e-5)
    assert intervals.wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate_and_is_symmetric(pair: tuple[int, int]) -> None:
    successes, n = pair
    low, high = intervals.wilson(successes, n)
    assert 0.0 <= low <= successes / n <= high <= 1.0
    mirrored = intervals.wilson(n - successes, n)
    assert math.isclose(low, 1 - mirrored[1], abs_tol=1e-12)  # rounding of a few float64 steps
    widths = [h - w for w, h in (intervals.wilson(successes, n, c) for c in (0.5, 0.9, 0.99))]
    assert all(a < b for a, b in pairwise(widths))


@pytest.mark.parametrize("arguments", [(2, 1), (-1, 3), (1, 2, 1.0)])
def test_wilson_refuses(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError):
        intervals.wilson(*arguments)


def test_bootstrap_mean_is_close_to_the_normal_interval() -> None:
    values = [float(i % 10) for i in range(400)]
    found = intervals.bootstrap_mean(values)
    error = math.sqrt(8.25 / 400)  # variance of 0..9, each as often
    assert found.value == pytest.approx(4.5)
    # a percentile of 10,000 draws is known to about 2 % of the error here
    assert found.low == pytest.approx(4.5 - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(4.5 + 1.96 * error, abs=0.1 * error)
    assert found == intervals.bootstrap_mean(values)
    assert math.isnan(intervals.bootstrap_mean([]).value)


def test_pairs_that_move_together_have_a_narrow_difference() -> None:
    theirs = [float(i % 2) for i in range(60)]
    ours = [value + 0.5 for value in theirs]
    gap = intervals.paired_difference(ours, theirs)
    assert (gap.value, gap.low, gap.high) == (0.5, 0.5, 0.5)
    with pytest.raises(UsageError, match="2 contents against 1"):
        intervals.paired_difference([1.0, 0.0], [1.0])


def _sign_test_slow(more: int, less: int) -> float:
    """Of all ways to flip the coins, the share as lopsided as this one."""
    flips = [sum(flip) for flip in product((0, 1), repeat=more + less)]
    extreme = [n for n in flips if abs(2 * n - len(flips[:1]) * (more + less)) >= abs(more - less)]
    return len(extreme) / len(flips)


@pytest.mark.parametrize(("more", "less"), [(0, 0), (1, 0), (5, 1), (3, 3), (8, 2), (0, 7)])
def test_sign_test_equals_the_slow_count(more: int, less: int) -> None:
    ours = [1.0] * more + [0.0] * less + [0.5] * 4
    theirs = [0.0] * more + [1.0] * less + [0.5] * 4
    wins, losses, p = intervals.sign_test(ours, theirs)
    assert (wins, losses) == (more, less)
    assert p == pytest.approx(_sign_test_slow(more, less))


def test_holm_by_hand() -> None:
    # sorted: .005 x 4, .01 x 3, .03 x 2, .04 x 1, made monotone
    assert intervals.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert intervals.holm([]) == []
    assert intervals.holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_never_lowers_a_p_and_keeps_their_order(values: list[float]) -> None:
    adjusted = intervals.holm(values)
    assert all(p <= a <= 1 for p, a in zip(values, adjusted, strict=True))
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert all(adjusted[a] <= adjusted[b] for a, b in pairwise(order))
