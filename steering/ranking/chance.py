"""A chance baseline for rankings: the same scores with shuffled labels.

Each shuffle permutes, within each content, which of its texts count as plain and which as
instructed, so a latent that depends only on the content scores as before. A real score should
exceed the best score that any latent reaches with shuffled labels.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from saesteer.steering.ranking.detection_scores import (
    Array,
    Detection,
    Ints,
    Texts,
    detect,
    significance_of,
)
from saesteer.steering.ranking.stability import jaccard, top_places


@dataclass(frozen=True)
class Figures:
    """The figures by which a ranking is compared with those of shuffled labels."""

    best: float
    """The highest score."""
    last: float
    """The score of the k-th best latent."""
    best_auroc: float
    discoveries: int
    """Latents found at the largest false discovery rate, by the test that goes with the score."""
    overlap: float
    """Jaccard index of its top k with that of the real labels."""


@dataclass(frozen=True, eq=False)
class Shuffled:
    """A detection score with the real labels and with shuffled ones."""

    by: str
    k: int
    real: Figures
    per_shuffle: tuple[Figures, ...]
    """One for each shuffle."""
    latents: Ints
    """Numbers of the latents that are ever on, in order."""
    scores: Array
    """Their scores with the real labels."""
    aurocs: Array
    """Their AUROC likewise. AUROC is scale-free; by a score that is not, such as a mean difference,
    the best latent by chance is one with large values."""

    def summary(self) -> dict[str, Any]:
        """JSON-ready: for each figure the real one, and mean and highest of the shuffles."""
        rows = {}
        for name in ("best", "last", "best_auroc", "discoveries", "overlap"):
            column = [float(getattr(one, name)) for one in self.per_shuffle]
            rows[name] = {
                "real": float(getattr(self.real, name)),
                "mean": float(np.mean(column)),
                "highest": max(column),
            }
        return {
            "by": self.by,
            "test": significance_of(self.by),
            "k": self.k,
            "shuffles": len(self.per_shuffle),
            **rows,
        }

    def of(self, latent: int) -> dict[str, float]:
        """For one latent: `score`, `reached`, `p` and `auroc_p`; empty where it is never active.

        `reached` is the share of shuffles whose best latent has at least its score; `p` is that as
        a p-value corrected for all latents (max-T: Westfall and Young, 1993); `auroc_p` is the same
        p-value for its AUROC.
        """
        place = int(np.searchsorted(self.latents, latent))
        if place == len(self.latents) or self.latents[place] != latent:
            return {}
        score, auroc = float(self.scores[place]), float(self.aurocs[place])
        reached = sum(one.best >= score for one in self.per_shuffle)
        by_auroc = sum(one.best_auroc >= auroc for one in self.per_shuffle)
        total = len(self.per_shuffle)
        return {
            "score": score,
            "reached": reached / total,
            "p": (1 + reached) / (1 + total),
            "auroc_p": (1 + by_auroc) / (1 + total),
        }


def shuffled(
    by: str, texts: Texts, k: int, *, shuffles: int, seed: int = 0, max_fdr: float = 0.05
) -> Shuffled | None:
    """Score the texts `shuffles` times with shuffled labels. None where no latent is ever on."""
    small, latents = texts.compact()
    if not len(latents):
        return None
    generator = np.random.default_rng(seed)

    def measure(one: Texts, real_top: set[int] | None) -> tuple[Figures, Detection, set[int]]:
        test = significance_of(by)
        found = detect(one, [by, test, "auroc"])
        score = found.scores[by]
        top = top_places(score, k, by)
        figures = Figures(
            best=float(score.max()),
            last=float(np.sort(score)[-min(k, len(score))]),
            best_auroc=float(found.scores["auroc"].max()),
            discoveries=_discoveries(found.p[test], texts.d_sae, max_fdr),
            overlap=1.0 if real_top is None else jaccard(top, real_top),
        )
        return figures, found, top

    real, found, top = measure(small, None)
    per_shuffle = tuple(measure(relabelled(small, generator), top)[0] for _ in range(shuffles))
    return Shuffled(by, k, real, per_shuffle, latents, found.scores[by], found.scores["auroc"])


def relabelled(texts: Texts, generator: np.random.Generator) -> Texts:
    """The same texts with their labels (kind, wording, success) permuted within each content."""
    draw = generator.random(len(texts.content))
    given = np.argsort(texts.content, kind="stable")
    drawn = np.lexsort((draw, texts.content))
    source = np.empty(len(given), np.int64)
    source[given] = drawn
    return replace(
        texts,
        positive=texts.positive[source],
        variant=texts.variant[source],
        success=texts.success[source],
    )


def _discoveries(p: Array, total: int, max_fdr: float) -> int:
    """Tests that Benjamini and Hochberg keep, of `total`; those that are not given have p = 1."""
    ranked = np.sort(p)
    kept = np.flatnonzero(ranked <= max_fdr * np.arange(1, len(ranked) + 1) / total)
    return int(kept[-1]) + 1 if len(kept) else 0
