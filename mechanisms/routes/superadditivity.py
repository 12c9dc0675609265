"""Do two blocks together do more than the sum of each? Tested on queries that chose nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from saesteer.mechanisms.statistics import FEWEST_GROUPS, bootstrap_ratio, grouped
from saesteer.steering.evaluation.intervals import holm


def interaction_tests(
    effects: np.ndarray,
    sets: Sequence[tuple[int, ...]],
    chosen: Sequence[int],
    rows: Sequence[int] | np.ndarray,
    groups: Sequence[str],
    names: Sequence[tuple[int, ...]],
    seed: int,
) -> list[dict[str, Any]]:
    """I = f(a, b) - f(a) - f(b) of chosen pairs over some rows of `effects` `[queries, sets]`.

    An exact one-sided sign test over groups that I > 0 as often as not (ties left out), adjusted by
    Holm over the pairs, and the mean with its bootstrap interval over groups.
    """
    from scipy.stats import binomtest

    if not len(chosen) or not len(rows):
        return []
    place = {one: i for i, one in enumerate(sets)}
    found = np.stack(
        [
            effects[rows, i] - sum(effects[rows, place[(single,)]] for single in sets[i])
            for i in chosen
        ],
        axis=1,
    )
    sums, counts = grouped(found, groups)
    low, high = bootstrap_ratio(sums, counts, seed=seed)
    above, below = (sums > 0).sum(0), (sums < 0).sum(0)
    p = [
        float(binomtest(int(a), int(a + b), alternative="greater").pvalue) if a + b else 1.0
        for a, b in zip(above, below, strict=True)
    ]
    enough = len(counts) >= FEWEST_GROUPS
    return [
        {
            "layers": list(names[i]),
            "effect": float(effects[rows, i].mean()),
            "interaction": float(found[:, column].mean()),
            "low": float(low[column]) if enough else None,
            "high": float(high[column]) if enough else None,
            "above": int(above[column]),
            "below": int(below[column]),
            "p_adjusted": adjusted,
        }
        for column, (i, adjusted) in enumerate(zip(chosen, holm(p), strict=True))
    ]
