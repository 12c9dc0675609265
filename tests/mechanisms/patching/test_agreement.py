"""Agreement of a shortcut with exact patches, by hand."""

import math

import numpy as np
import pytest

from saesteer.mechanisms.patching.agreement import agreement, nodes_to_check


def test_agreement_by_hand() -> None:
    exact = np.array([3.0, -2.0, 1.0, 0.0] + [0.1 * i for i in range(1, 9)])
    found = agreement(exact, exact * 2)
    assert (found.nodes, found.sign) == (12, 1.0)
    assert (found.pearson, found.spearman) == pytest.approx((1, 1))
    assert found.recall == {10: 1.0} and not found.is_low
    turned = agreement(exact, -exact)
    assert (turned.sign, turned.spearman) == pytest.approx((0, -1)) and turned.is_low
    assert "Spearman -1.00" in str(turned)


def test_constant_estimates_are_low() -> None:
    found = agreement(np.arange(12.0), np.zeros(12))
    assert math.isnan(found.spearman) and found.is_low


def test_recall_counts_the_top_by_size() -> None:
    exact = np.arange(12.0) * np.array([1, -1] * 6)
    fast = exact.copy()
    fast[[0, 11]] = exact[[11, 0]]  # the largest is taken for the smallest
    assert agreement(exact, fast).recall[10] == 0.9


def test_checked_nodes_are_the_largest_and_some_of_every_size() -> None:
    fast = np.linspace(-1, 1, 201)
    chosen = nodes_to_check(fast, 10, 20, seed=0)
    assert chosen == nodes_to_check(fast, 10, 20, seed=0) != nodes_to_check(fast, 10, 20, seed=1)
    assert len(chosen) == len(set(chosen)) == 30
    largest = np.argsort(-np.abs(fast), kind="stable")[:10]
    assert set(largest) <= set(chosen)
    sizes = np.abs(fast[chosen])
    assert all(((low <= sizes) & (sizes < low + 0.25)).sum() >= 3 for low in (0, 0.25, 0.5, 0.75))
    assert nodes_to_check(fast[:3], 10, 5, 0) == [0, 1, 2]
