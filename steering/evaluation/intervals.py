"""Intervals and tests for rates: Wilson, bootstrap over contents, exact sign test, Holm."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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


def rate_text(rate: Mapping[str, Any]) -> str:
    """A rate in a document, with its interval: 0.50 [0.35, 0.65]."""
    return str(Interval(rate["value"], rate["low"], rate["high"]))


def difference_text(test: Mapping[str, Any]) -> str:
    """The difference of a paired test in a document, with its interval: +0.20 [+0.05, +0.35]."""
    return f"{test['difference']:+.2f} [{test['low']:+.2f}, {test['high']:+.2f}]"


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
    from scipy.stats import binomtest

    found = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


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
    value = float(table.mean())
    if table.min() == table.max():
        return Interval(value, value, value)
    from scipy.stats import bootstrap

    found = bootstrap(
        (table,),
        np.mean,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high))


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


def sign_test(ours: Sequence[float], theirs: Sequence[float]) -> tuple[int, int, float]:
    """(contents where ours is larger, where theirs is larger, exact two-sided p).

    Under the null hypothesis either is larger with probability 1/2; ties are left out. With one
    success or failure per content this is McNemar's exact test.
    """
    if len(ours) != len(theirs):
        raise UsageError(f"{len(ours)} contents against {len(theirs)}: pair them up")
    more = sum(a > b for a, b in zip(ours, theirs, strict=True))
    less = sum(a < b for a, b in zip(ours, theirs, strict=True))
    if not more + less:
        return 0, 0, 1.0
    from scipy.stats import binomtest

    return more, less, float(binomtest(more, more + less).pvalue)


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
