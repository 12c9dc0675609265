"""Rates of success with their intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from saesteer.steering.evaluation.intervals import bootstrap_mean, wilson


@dataclass(frozen=True)
class Rate:
    """Successes out of n with their 95 % interval.

    Wilson's interval where every content was answered once; a bootstrap over contents where each
    was answered with several seeds, because those answers are not independent.
    """

    value: float
    low: float
    high: float
    successes: int
    n: int

    @staticmethod
    def of(hits: Sequence[bool], seeds: int = 1) -> "Rate":
        """The rate of hits, given seed by seed, each seed in the order of the contents."""
        successes, n = sum(hits), len(hits)
        # A bootstrap of equal values has no width: then Wilson's interval over contents is used.
        low, high = wilson(successes // seeds, n // seeds)
        if seeds > 1 and 0 < successes < n:
            interval = bootstrap_mean(per_content(hits, seeds))
            low, high = interval.low, interval.high
        return Rate(successes / n if n else 0.0, low, high, successes, n)

    @property
    def triple(self) -> list[float]:
        """`[rate, low, high]`, as reports have it."""
        return [self.value, self.low, self.high]

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def per_content(hits: Sequence[bool], seeds: int) -> list[float]:
    """The share of seeds that hit, for each content, of hits given seed by seed."""
    contents = len(hits) // seeds
    return [fmean(hits[place::contents]) for place in range(contents)]
