"""Intervals and tests for rates: Wilson, bootstrap over contents, exact sign test, Holm."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saesteer.checkpoints.errors import UsageError

RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a rate: (low, high). With no trials it is (0, 1).

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if not 0 <= successes <= n:
        raise UsageError(f"successes must be in 0..{n} (n), got {successes}")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must lie between 0 and 1, got {confidence}")
    if n == 0:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / n
    centre = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # the ends are exact at 0 and n successes; rounding must not push them past the rate
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == n else (centre + spread) / scale
    return low, high


def bootstrap_mean(
    values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean of one value per content, with the percentile interval over resampled contents.

    Answers to one content under several seeds are not independent: average them first. Where all
    values are equal the interval has no width, which says little of other contents; prefer `wilson`
    for rates with one answer per content.
    """
    table = np.asarray(values, dtype=np.float64)
    if not table.size:
        return Interval(math.nan, math.nan, math.nan)
    means = _resampled_means(table, resamples, seed)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(table.mean()), float(low), float(high))


def paired_difference(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of ours minus theirs over the same contents, with a paired bootstrap interval.

    Raises UsageError when the two do not hold the same number of contents.
    """
    if len(ours) != len(theirs):
        raise UsageError(f"{len(ours)} contents against {len(theirs)}: pair them up")
    differences = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    return bootstrap_mean(differences.tolist(), resamples=resamples, seed=seed)


def _resampled_means(table: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(table), size=(resamples, len(table)))
    means: NDArray[np.float64] = table[draws].mean(axis=1)
    return means


def sign_test(ours: Sequence[float], theirs: Sequence[float]) -> tuple[int, int, float]:
    """(contents where ours is larger, where theirs is larger, exact two-sided p).

    Under the null hypothesis either is larger with probability 1/2; ties are left out. With one
    success or failure per content this is McNemar's exact test.
    """
    if len(ours) != len(theirs):
        raise UsageError(f"{len(ours)} contents against {len(theirs)}: pair them up")
    more = sum(a > b for a, b in zip(ours, theirs, strict=True))
    less = sum(a < b for a, b in zip(ours, theirs, strict=True))
    n = more + less
    tail = sum(math.comb(n, i) for i in range(min(more, less) + 1))
    return more, less, min(1.0, 2 * tail / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: they bound the chance of any false finding.

    Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for place, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = running
    return adjusted
