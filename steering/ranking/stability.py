"""Stability of a ranking: the same score on parts of the texts, compared with each other."""

from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from saesteer.steering.ranking.detection_scores import NEUTRAL, Array, Bools, Ints, Texts, detect
from saesteer.steering.tasks.task import Task

FOLDS = 4
"""Number of parts that the contents are divided into."""


@dataclass(frozen=True)
class Agreement:
    """Similarity of the rankings on some parts, over all pairs of parts."""

    parts: tuple[str, ...]
    jaccard: float
    """Mean of |A and B| / |A or B| over the pairs' top k sets."""
    jaccard_lowest: float
    spearman: float
    """Mean rank correlation of the scores, over latents that are on in any text."""
    spearman_lowest: float
    jaccard_pairs: tuple[tuple[float, ...], ...] = ()
    """The Jaccard index of every two parts, `[parts, parts]`."""
    spearman_pairs: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Stability:
    """Agreement of a detection score over wordings, languages and contents."""

    by: str
    k: int
    agreement: dict[str, Agreement]
    """By `variants`, `languages` and `contents`, except where there are fewer than two parts."""
    latents: Ints
    """Numbers of the latents that are ever on, in order."""
    parts: dict[str, tuple[tuple[str, ...], Array]]
    """Under the same names: the parts and their scores `[parts, len(latents)]`."""

    def summary(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "by": self.by,
            "k": self.k,
            **{name: asdict(found) for name, found in self.agreement.items()},
        }

    def of(self, latent: int) -> dict[str, dict[str, float]]:
        """For one latent, by kind of part: lowest and highest score, and share of top k sets."""
        place = int(np.searchsorted(self.latents, latent))
        if place == len(self.latents) or self.latents[place] != latent:
            return {}
        return {
            name: {
                "lowest": float(scores[:, place].min()),
                "highest": float(scores[:, place].max()),
                "in_top": sum(place in top_places(row, self.k, self.by) for row in scores)
                / len(scores),
            }
            for name, (_, scores) in self.parts.items()
        }


def stability(by: str, texts: Texts, task: Task, k: int) -> Stability:
    """Score parts of the texts by `by` and compare them.

    The part of a wording or a language has its instructed texts and all plain ones; a part of the
    contents has all texts of a quarter of the contents.
    """
    small, latents = texts.compact()
    variants = task.select_variants
    used = sorted({int(v) for v in small.variant[small.positive]})
    languages = sorted({variants[v].lang for v in used})
    plain = ~small.positive
    chosen: dict[str, list[tuple[str, Bools]]] = {
        "variants": [(variants[v].text, plain | (small.variant == v)) for v in used],
        "languages": [
            (
                lang,
                plain | np.isin(small.variant, [v for v in used if variants[v].lang == lang]),
            )
            for lang in languages
        ],
        "contents": [
            (f"contents {fold + 1} of {FOLDS}", small.content % FOLDS == fold)
            for fold in range(FOLDS)
        ],
    }
    agreement: dict[str, Agreement] = {}
    scored: dict[str, tuple[tuple[str, ...], Array]] = {}
    for name, groups in chosen.items():
        usable = [(what, mask) for what, mask in groups if _has_both(small, mask)]
        if len(usable) < 2 or not len(latents):
            continue
        rows = np.stack([detect(small.select(mask), [by]).scores[by] for _, mask in usable])
        scored[name] = tuple(what for what, _ in usable), rows
        agreement[name] = compare(scored[name][0], rows, k, by)
    return Stability(by, k, agreement, latents, scored)


def _has_both(texts: Texts, mask: Bools) -> bool:
    kinds = texts.positive[mask]
    return bool(kinds.any()) and not bool(kinds.all())


def compare(parts: tuple[str, ...], scores: Array, k: int, by: str) -> Agreement:
    """Jaccard at k and Spearman over all pairs of rows of a score."""
    from scipy.stats import rankdata

    tops = [top_places(row, k, by) for row in scores]
    alike = [[jaccard(one, other) for other in tops] for one in tops]
    with np.errstate(invalid="ignore"):  # a score that does not vary correlates with nothing
        rho = np.nan_to_num(np.corrcoef(rankdata(scores, axis=1)))
    pairs = list(combinations(range(len(scores)), 2))
    found = [alike[i][j] for i, j in pairs], [float(rho[i, j]) for i, j in pairs]
    return Agreement(
        parts,
        float(np.mean(found[0])),
        min(found[0]),
        float(np.mean(found[1])),
        min(found[1]),
        tuple(map(tuple, alike)),
        tuple(map(tuple, rho.tolist())),
    )


def jaccard(one: set[int], other: set[int]) -> float:
    """|A and B| / |A or B|; 0 where both are empty."""
    return len(one & other) / max(len(one | other), 1)


def top_places(scores: Array, k: int, by: str) -> set[int]:
    """Places of the k best, ties by number; none that is no better than neutral."""
    best = np.argsort(-scores, kind="stable")[:k]
    return set(best[scores[best] > NEUTRAL.get(by, 0.0)].tolist())
