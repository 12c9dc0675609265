"""p-values against tables, exact sums and, where it is installed, scipy."""

import math

import numpy as np
import pytest

from saesteer.steering.ranking import pvalues


def test_t_of_one_and_two_degrees_of_freedom_in_closed_form() -> None:
    t = np.array([0.0, 1e-9, 0.3, 1.0, 4.0, 63.7, 1e6])
    one = 1 - 2 / math.pi * np.arctan(t)
    np.testing.assert_allclose(pvalues.t_two_sided(t, np.ones(7)), one, rtol=1e-9)
    # Of two: 1 - t / sqrt(2 + t^2), whose digits cancel for large t.
    two = 2 / (np.sqrt(2 + t**2) * (np.sqrt(2 + t**2) + t))
    np.testing.assert_allclose(pvalues.t_two_sided(-t, np.full(7, 2.0)), two, rtol=1e-10)


def test_t_without_degrees_of_freedom_says_nothing() -> None:
    assert pvalues.t_two_sided(np.array([5.0]), np.array([0.0])) == 1


def test_normal_and_chi_squared() -> None:
    assert pvalues.normal_two_sided(np.array([-1.959963984540054]))[0] == pytest.approx(0.05)
    assert pvalues.chi2_one(np.array([3.841458820694124]))[0] == pytest.approx(0.05)
    assert pvalues.normal_two_sided(np.array([0.0]))[0] == 1


def test_mcnemar_is_exact_for_few_pairs_and_chi_squared_for_many() -> None:
    for b, c in ((0, 0), (5, 0), (0, 5), (3, 9), (12, 12), (7, 17)):
        n, low = b + c, min(b, c)
        exact = min(1.0, 2 * sum(math.comb(n, i) for i in range(low + 1)) / 2**n)
        found = pvalues.mcnemar(np.array([float(b)]), np.array([float(c)]))
        assert found[0] == pytest.approx(exact)
    many = pvalues.mcnemar(np.array([40.0]), np.array([20.0]))
    assert many[0] == pytest.approx(math.erfc(math.sqrt((20**2 / 60) / 2)))


def test_benjamini_hochberg_by_hand() -> None:
    p = np.array([0.01, 0.5, 0.02, 0.03, 0.9])
    # p (5 / rank), then the running minimum from the largest down.
    np.testing.assert_allclose(
        pvalues.benjamini_hochberg(p), [0.05, 0.625, 0.05, 0.05, 0.9], rtol=1e-12
    )


def test_benjamini_hochberg_holds_its_rate() -> None:
    """Of the discoveries among 100 true and 900 null tests, at most about the rate is false."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(50):
        p = np.concatenate([rng.beta(0.05, 1, 100), rng.random(900)])
        found = pvalues.benjamini_hochberg(p) <= 0.1
        shares.append(found[100:].sum() / max(found.sum(), 1))
    assert 0.05 < np.mean(shares) < 0.12


def test_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    t = rng.standard_normal(400) * 10 ** rng.uniform(-3, 2, 400)
    df = 10 ** rng.uniform(-0.5, 4, 400)
    np.testing.assert_allclose(
        pvalues.t_two_sided(t, df), 2 * stats.t.sf(np.abs(t), df), rtol=1e-8, atol=1e-300
    )
    p = rng.random(200) ** 4
    np.testing.assert_allclose(
        pvalues.benjamini_hochberg(p), stats.false_discovery_control(p), rtol=1e-12
    )
    for b, c in ((2, 9), (30, 11)):
        found = pvalues.mcnemar(np.array([float(b)]), np.array([float(c)]))[0]
        if b + c < 25:
            assert found == pytest.approx(stats.binomtest(b, b + c).pvalue)
        else:
            assert found == pytest.approx(stats.chi2.sf((b - c) ** 2 / (b + c), 1))
