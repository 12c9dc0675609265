"""The result of a ranking: scores and statistics of every latent, filters, and the best ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.shown import Shown
from saesteer.sae.model.hooks import HookPoint
from saesteer.steering.ranking.causal import CausalTrial
from saesteer.steering.ranking.chance import Shuffled
from saesteer.steering.ranking.config import RankConfig
from saesteer.steering.ranking.detection_scores import NEUTRAL
from saesteer.steering.ranking.selection import best_first, masked_out
from saesteer.steering.ranking.stability import Stability, jaccard
from saesteer.steering.tasks.task import Task

STABLE_K = 15
"""The k of Jaccard@k: the number of latents in the paper's headline setting."""


@dataclass(frozen=True, eq=False, repr=False)
class Ranking(Shown):
    """Scores of every latent for one task, each `[d_sae]` float64.

    `mu` and `sigma` are over the positive samples where the latent is active, `highest` is the
    largest activation seen there. `by_variant` holds the sensitivity for each wording alone, in the
    order of `task.select_variants`; it is empty when replies were read.
    """

    task: Task
    config: RankConfig
    point: HookPoint
    score: Float[Tensor, " d_sae"]
    rate_positive: Float[Tensor, " d_sae"]
    rate_negative: Float[Tensor, " d_sae"]
    mean_difference: Float[Tensor, " d_sae"]
    mu: Float[Tensor, " d_sae"]
    sigma: Float[Tensor, " d_sae"]
    highest: Float[Tensor, " d_sae"]
    positives: int
    negatives: int
    by_variant: Float[Tensor, "variants d_sae"]
    columns: Mapping[str, Tensor]
    """Every score that was computed, by name; NaN where a latent was not tried."""
    p: Float[Tensor, " d_sae"]
    """p-value of the test `significance_of(by)`."""
    q: Float[Tensor, " d_sae"]
    """The same, adjusted for all latents at once (Benjamini-Hochberg)."""
    filters: Mapping[str, Tensor]
    """Masks `[d_sae]` of the latents that `dense`, `template` and `fdr` remove, or would."""
    control_rate: Float[Tensor, " d_sae"]
    """Share of plain texts' tokens where the latent is on."""
    template_rate: Float[Tensor, " d_sae"]
    """The same at the template, position 0 and attention sinks."""
    duplicate_of: Mapping[int, int]
    """Among the best latents: those with nearly the direction of a better one, and that one."""
    stability: Stability
    shuffled: Shuffled | None = None
    """The chance baseline; None when it was not asked for."""
    trials: tuple[CausalTrial, ...] = ()
    """The trials of `by="causal"`."""
    replies_used: tuple[int, int] | None = None
    """Number of instructed replies that are used, and of all of them."""
    excluded: dict[str, int] = field(default_factory=lambda: {"sinks": 0})
    """Positions that would have been read and were left out, by reason."""

    def _facts(self) -> dict[str, Any]:
        best = best_first(self.score, self.mu)[:5].tolist()
        return {
            "task": repr(self.task.name),
            "by": self.config.resolved_by,
            "read": self.config.read,
            "layer": self.point.layer,
            "d_sae": len(self.score),
            "best": {latent: float(f"{float(self.score[latent]):.3g}") for latent in best},
        }

    def to_frame(self) -> Any:
        """Every latent as a row of a pandas DataFrame, the best first, with `latent` as the index.

        Columns: `score`, `rate_positive`, `rate_negative`, `mean_difference`, `mu`, `sigma`, `p`,
        `q`, and every further score that was computed. Needs pandas.
        """
        import pandas

        order = best_first(self.score, self.mu)
        own = {
            name: getattr(self, name)[order].numpy(force=True)
            for name in ("score", "rate_positive", "rate_negative", "mean_difference", "mu",
                         "sigma", "p", "q")
        }  # fmt: skip
        more = {name: values[order].numpy(force=True) for name, values in self.columns.items()}
        index = pandas.Index(order.tolist(), name="latent")
        return pandas.DataFrame({**more, **own}, index=index)

    def top(self, k: int) -> list[int]:
        """The best k latents that no filter in `config.drop` removes: by score, mu, then number.

        Raises UserError when none scores above neutral (0; 1/2 for auroc).
        """
        neutral = NEUTRAL.get(self.config.resolved_by, 0.0)
        dropped = masked_out(self.filters, self.config.drop)
        score = self.score if dropped is None else self.score.masked_fill(dropped, -torch.inf)
        skipped = self.duplicate_of if "duplicate" in self.config.drop else {}
        order = best_first(score, self.mu)[: k + len(skipped)].tolist()
        ids = [i for i in order if score[i] > neutral and i not in skipped][:k]
        if not ids and bool((self.score > neutral).any()):
            raise UserError(
                f"`drop` {','.join(self.config.drop)} leaves no latent of "
                f"{int((self.score > neutral).sum())} that score above {neutral:g}: drop less, "
                "or raise `max_fdr`"
            )
        if not ids and self.trials:
            plain = next(trial for trial in self.trials if trial.latent is None)
            raise UserError(
                f"no latent of {len({t.latent for t in self.trials}) - 1} on the shortlist makes "
                f"more answers pass than the unsteered {plain.successes} of {plain.n}: try other "
                "`doses`, a longer `shortlist`, or an SAE that saw the behaviour"
            )
        if not ids:
            raise UserError(
                f"no latent tells {self.task.name} apart at layer {self.point.layer}: the SAE may "
                "never have seen the behaviour (train with `replies`), or try another `read`"
            )
        return ids

    def flags(self, latent: int) -> dict[str, str]:
        """The filters that remove a latent, or would, with the reason."""
        reasons = {
            "dense": f"on at {self.control_rate[latent]:.0%} of plain text's tokens",
            "template": f"on at {self.template_rate[latent]:.0%} of the template's tokens and "
            f"{self.control_rate[latent]:.1%} of plain text's",
            "fdr": f"q {self.q[latent]:.2g} is above {self.config.max_fdr:g}",
        }
        found = {name: why for name, why in reasons.items() if bool(self.filters[name][latent])}
        if latent in self.duplicate_of:
            found["duplicate"] = f"nearly the direction of {self.duplicate_of[latent]}"
        return found

    def dropped(self) -> dict[str, int]:
        """How many latents with a score above neutral each filter removes, or would."""
        scored = self.score > NEUTRAL.get(self.config.resolved_by, 0.0)
        counts = {name: int((mask & scored).sum()) for name, mask in self.filters.items()}
        return {**counts, "duplicate": len(self.duplicate_of)}

    def overlap(self) -> dict[str, float]:
        """For every score, the Jaccard index of its best `STABLE_K` latents with those by `by`."""

        def best(name: str, column: Tensor) -> set[int]:
            order = best_first(column, self.mu)[:STABLE_K].tolist()
            return {i for i in order if column[i] > NEUTRAL.get(name, 0.0)}

        own = best(self.config.resolved_by, self.score)
        return {name: jaccard(best(name, column), own) for name, column in self.columns.items()}

    def explain(self, latent: int) -> dict[str, Any]:
        """Everything known about one latent, JSON-ready."""
        row: dict[str, Any] = {
            "id": latent,
            "score": float(self.score[latent]),
            "rate_positive": float(self.rate_positive[latent]),
            "rate_negative": float(self.rate_negative[latent]),
            "mean_difference": float(self.mean_difference[latent]),
            "mu": float(self.mu[latent]),
            "sigma": float(self.sigma[latent]),
            "max": float(self.highest[latent]),
        }
        if len(self.by_variant):
            column = self.by_variant[:, latent]
            row["variant_min"] = float(column.min())
            row["variant_std"] = float(column.std(correction=0))
        row["p"], row["q"] = float(self.p[latent]), float(self.q[latent])
        row["control_rate"] = float(self.control_rate[latent])
        row["template_rate"] = float(self.template_rate[latent])
        row["scores"] = {name: float(column[latent]) for name, column in self.columns.items()}
        row["stability"] = self.stability.of(latent)
        if self.shuffled is not None:
            row["shuffled"] = self.shuffled.of(latent)
        row["filters"] = self.flags(latent)
        if self.trials:
            row["trials"] = [
                {"dose": t.dose, "successes": t.successes, "degenerate": t.degenerate, "n": t.n}
                for t in self.trials
                if t.latent == latent
            ]
        return row
