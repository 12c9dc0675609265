"""Densities of a matrix whose levels are known by hand."""

import numpy as np
import pytest

from saesteer.mechanisms.reading_config import AttributeConfig
from saesteer.mechanisms.readings.density import densities, instruction_score

SCORES = np.array(
    [
        [1.0, 2.0, -3.0, 0.0],  # level 10, 10, 0, 0
        [0.71, 1.5, 1.0, 0.0],  # 8, 8, 10, 0
        [0.70, -9.0, 0.9, 0.0],  # 7: nothing; 0; 9
        [0.0, 0.0, 0.0, 0.0],
    ]
)


def test_by_hand() -> None:
    density, held = densities(SCORES, AttributeConfig())
    raw = [
        20 / (2 * 10**4) ** 0.25,
        26 / (2 * 8**4 + 10**4) ** 0.25,
        9 / 9,
        0.0,
    ]
    assert density == pytest.approx(np.array(raw) / max(raw))
    assert held.tolist() == [0.5, 0.75, 0.25, 0.0]
    assert instruction_score(density, 1, 3) == pytest.approx(density[1:3].sum() / 2)


def test_density_goes_with_the_count() -> None:
    """a_n is about K_n^(3/4)."""
    scores = np.tril(np.ones((16, 16)))
    density, held = densities(scores, AttributeConfig())
    assert density == pytest.approx(held**0.75)


def test_columns_may_be_scaled() -> None:
    """So p and log p give the same: they differ by a factor p a column."""
    by = np.array([1e-9, 0.3, 7.0, 1.0])
    for one, other in zip(
        densities(SCORES, AttributeConfig()), densities(SCORES * by, AttributeConfig()), strict=True
    ):
        assert one == pytest.approx(other)


def test_nothing_positive_is_no_density() -> None:
    density, held = densities(-np.ones((2, 3)), AttributeConfig())
    assert density.tolist() == held.tolist() == [0.0, 0.0]
