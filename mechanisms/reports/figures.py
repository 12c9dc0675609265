"""One figure with its interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saesteer.mechanisms.statistics import bootstrap_ratio, grouped

Array = np.ndarray


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % interval over groups of pairs, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        ends = "" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f}{ends}"


def share_of(above: Array, below: Array | None, groups: Sequence[str], seed: int) -> Figure:
    """Mean of `above` `[rows]`, or the ratio of means above / below, with its interval."""
    sums, counts = grouped(above[:, None], groups)
    value = float(above.mean())
    if below is not None:
        counts = grouped(below[:, None], groups)[0][:, 0]
        value = value / float(below.mean()) if below.mean() else float("nan")
    low, high = bootstrap_ratio(sums, counts, seed=seed)
    if not np.isfinite(low[0]):
        return Figure(value)
    return Figure(value, float(low[0]), float(high[0]))
