"""Intervals for whole grids at once: bootstrap over groups, and sign tests over groups."""

from collections.abc import Sequence

import numpy as np

from saesteer.steering.evaluation.intervals import sign_test

Array = np.ndarray
FEWEST_GROUPS = 8
"""With fewer groups a bootstrap says little of other groups: no interval is given."""
RESAMPLES = 2_000


def grouped(values: Array, groups: Sequence[str]) -> tuple[Array, Array]:
    """Sums `[groups, cells]` of `values` `[n, cells]`, and how many rows each group has."""
    names = list(dict.fromkeys(groups))
    place = np.array([names.index(group) for group in groups])
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, place, values)
    return sums, np.bincount(place, minlength=len(names)).astype(float)


def bootstrap_ratio(
    sums: Array, weights: Array, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[Array, Array]:
    """95 % percentile intervals (low, high) of Σ sums / Σ weights over resampled groups.

    `sums` is `[groups, cells]`; `weights` is `[groups]`: row counts for a mean of rows, sums of a
    denominator for a ratio of means. NaN where there are fewer than `FEWEST_GROUPS` groups, or
    where the denominator changes its sign among the resamples.
    """
    n = len(weights)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    below = drawn @ weights
    if n < FEWEST_GROUPS or below.min() <= 0 <= below.max():
        nothing = np.full(sums.shape[1], np.nan)
        return nothing, nothing.copy()
    low, high = np.percentile((drawn @ sums) / below[:, None], [2.5, 97.5], axis=0)
    return low, high


def sign_p_values(sums: Array) -> list[float]:
    """Exact two-sided p that a group's effect is as often positive as negative, by cell."""
    nothing = [0.0] * len(sums)
    return [sign_test(column.tolist(), nothing)[2] for column in sums.T]


def permutation_test(ours: Array, theirs: Array, *, seed: int = 0, draws: int = RESAMPLES) -> float:
    """Two-sided p of the difference of means, by permuting which values are whose.

    The drawn permutations and the one that was seen count alike, so p is at least 1 / (draws + 1).
    """
    values = np.concatenate([ours, theirs])
    seen = abs(float(np.mean(ours) - np.mean(theirs)))
    drawn = np.random.default_rng(seed)
    order = drawn.permuted(np.tile(np.arange(len(values)), (draws, 1)), axis=1)
    mixed = values[order]
    gaps = np.abs(mixed[:, : len(ours)].mean(1) - mixed[:, len(ours) :].mean(1))
    return float(((gaps >= seen - 1e-12).sum() + 1) / (draws + 1))


def halves(groups: Sequence[str], *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Rows of two halves of the groups, drawn at random: to choose on, and to test on."""
    names = sorted(set(groups))
    np.random.default_rng(seed).shuffle(names)
    first = set(names[: len(names) // 2])
    return (
        [i for i, group in enumerate(groups) if group in first],
        [i for i, group in enumerate(groups) if group not in first],
    )
