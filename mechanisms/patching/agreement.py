"""How far a gradient shortcut is from exact patches, measured on some of its nodes."""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
LOW_SPEARMAN = 0.7
"""Below it, a shortcut orders nodes too differently to choose any by it."""


@dataclass(frozen=True)
class Agreement:
    """Exact effects against estimated ones, over the nodes that were patched exactly."""

    nodes: int
    pearson: float
    spearman: float
    sign: float
    """Share of nodes whose sign is right, of those with an exact effect other than 0."""
    recall: dict[int, float]
    """K -> share of the exact top K (by size, of the nodes patched) in the estimated top K."""

    @property
    def is_low(self) -> bool:
        """Whether the shortcut should not be used to choose nodes."""
        return not self.spearman >= LOW_SPEARMAN

    def __str__(self) -> str:
        recall = ", ".join(f"recall@{k} {share:.2f}" for k, share in self.recall.items())
        return (
            f"Pearson {self.pearson:.2f}, Spearman {self.spearman:.2f}, sign {self.sign:.2f}, "
            f"{recall} on {self.nodes} nodes"
        )


def agreement(exact: Array, fast: Array) -> Agreement:
    """Compare mean effects `[nodes]` of the nodes that have both. NaN for constant values."""
    from scipy.stats import rankdata

    def correlation(a: Array, b: Array) -> float:
        if a.std() == 0 or b.std() == 0:
            return float("nan")
        return float(np.corrcoef(a, b)[0, 1])

    moved = exact != 0
    signs = np.sign(exact[moved]) == np.sign(fast[moved])
    recall = {}
    for k in (10, 50):
        if k < len(exact):
            best = [set(np.argsort(-np.abs(one), kind="stable")[:k]) for one in (exact, fast)]
            recall[k] = len(best[0] & best[1]) / k
    return Agreement(
        len(exact),
        correlation(exact, fast),
        correlation(rankdata(exact), rankdata(fast)),
        float(signs.mean()) if moved.any() else float("nan"),
        recall,
    )


def nodes_to_check(fast: Array, largest: int, more: int, seed: int) -> list[int]:
    """The `largest` estimates by size, and `more` of the rest, drawn over quantiles of size."""
    order = np.argsort(-np.abs(fast), kind="stable")
    rest = order[largest:]
    drawn = np.random.default_rng(seed)
    parts = np.array_split(rest, min(more, len(rest))) if more and len(rest) else []
    return sorted([*order[:largest].tolist(), *(int(drawn.choice(part)) for part in parts)])
