"""p-values and false discovery rates, for whole columns at once.

Written out here so that ranking needs no statistics package: the regularised incomplete beta
function by its continued fraction, and the tests that are built on it. float64 throughout.
"""

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

_ITERATIONS = 300
_CONVERGED = 1e-14


def _lgamma(x: Array) -> Array:
    found: Array = torch.lgamma(torch.from_numpy(np.asarray(x, dtype=np.float64))).numpy()
    return found


def erfc(x: Array) -> Array:
    """The complementary error function."""
    found: Array = torch.special.erfc(torch.from_numpy(np.asarray(x, dtype=np.float64))).numpy()
    return found


def normal_two_sided(z: Array) -> Array:
    """P(|Z| >= |z|) of a standard normal."""
    return erfc(np.abs(z) / np.sqrt(2.0))


def chi2_one(x: Array) -> Array:
    """P(X >= x) of a chi-squared variable with one degree of freedom."""
    return erfc(np.sqrt(np.maximum(x, 0.0) / 2.0))


def t_two_sided(t: Array, df: Array) -> Array:
    """P(|T| >= |t|) of Student's t: I_{df / (df + t^2)}(df / 2, 1 / 2); 1 where df is 0."""
    t, df = np.broadcast_arrays(np.asarray(t, np.float64), np.asarray(df, np.float64))
    usable = df > 0
    safe, square = np.where(usable, df, 1.0), np.square(t)
    found = incomplete_beta(
        safe / 2, np.full(safe.shape, 0.5), safe / (safe + square), square / (safe + square)
    )
    return np.where(usable, found, 1.0)


def incomplete_beta(a: Array, b: Array, x: Array, y: Array) -> Array:
    """I_x(a, b), elementwise, for x in [0, 1] and y = 1 - x, given apart to lose no digits."""
    turn = x > (a + 1) / (a + b + 2)
    p, q = np.where(turn, b, a), np.where(turn, a, b)
    u, v = np.where(turn, y, x), np.where(turn, x, y)
    with np.errstate(divide="ignore"):
        front = np.exp(_lgamma(p + q) - _lgamma(p) - _lgamma(q) + p * np.log(u) + q * np.log(v)) / p
    part = front / _beta_fraction(p, q, u)
    found: Array = np.clip(np.where(turn, 1 - part, part), 0.0, 1.0)
    return found


def _beta_fraction(a: Array, b: Array, x: Array) -> Array:
    """The continued fraction of the incomplete beta function, by Lentz's method."""
    tiny = 1e-300
    value = np.ones_like(x)
    c, d = np.ones_like(x), np.zeros_like(x)
    for step in range(1, _ITERATIONS):
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 + term * d
        d = 1 / np.where(np.abs(d) < tiny, tiny, d)
        c = 1 + term / c
        c = np.where(np.abs(c) < tiny, tiny, c)
        change = c * d
        value = value * change
        if np.all(np.abs(change - 1) < _CONVERGED):
            break
    return value


def mcnemar(on_off: Array, off_on: Array) -> Array:
    """p of McNemar's test: exact binomial below 25 discordant pairs, chi-squared from there on."""
    exact = _binomial_table(25)
    total = on_off + off_on
    small = total < 25
    places = np.where(small, total, 0).astype(np.int64)
    fewer = np.where(small, np.minimum(on_off, off_on), 0).astype(np.int64)
    statistic = np.square(on_off - off_on) / np.maximum(total, 1)
    found: Array = np.where(small, exact[places, fewer], chi2_one(statistic))
    return found


def _binomial_table(below: int) -> Array:
    """[n, k]: two-sided p of at most k (or at least n - k) heads in n tosses of a fair coin."""
    table = np.ones((below, below))
    row = np.ones(1)
    for n in range(1, below):
        row = np.convolve(row, [1.0, 1.0])
        table[n, : n + 1] = np.minimum(1.0, 2 * np.cumsum(row) / 2.0**n)
    return table


def benjamini_hochberg(p: Array) -> Array:
    """Adjusted p-values: the smallest false discovery rate at which each test is a discovery."""
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty_like(p)
    q[order] = np.minimum(1.0, np.minimum.accumulate(scaled[::-1])[::-1])
    return q
