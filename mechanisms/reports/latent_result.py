"""What latents carry: effects of single ones and of sets, the error beside them, and the plan."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from saesteer.mechanisms.config import LatentConfig
from saesteer.mechanisms.reports.figures import Figure, share_of
from saesteer.mechanisms.statistics import FEWEST_GROUPS, bootstrap_ratio, grouped
from saesteer.sae.model.language_model import LanguageModel

Array = np.ndarray
SCHEMA_VERSION = 1
HIGH_FVU = 0.5


@dataclass(frozen=True, eq=False)
class Curve:
    """Effects of the first k of an order."""

    name: str
    """`carry`, `mark`, `random`, `directions`, or the name of an order from elsewhere."""
    sizes: tuple[int, ...]
    effects: Array
    """`[rows, sizes]`"""


@dataclass(frozen=True, eq=False)
class LatentResult:
    """Effects of latents in the metric's unit; rows are pairs of runs."""

    model: dict[str, Any]
    sae: dict[str, Any]
    config: LatentConfig
    metric: str
    groups: tuple[str, ...]
    held_out: tuple[int, ...]
    """Rows that had no part in choosing latents."""
    site: Array
    latents: Array
    error: Array
    """Effect `[rows]` of the whole site, of all latents, and of the SAE's error alone."""
    ids: tuple[int, ...]
    """Latents that were patched one by one."""
    effects: Array
    fast: Array
    changes: Array
    """Exact effect, estimate, and change of activation, `[rows, ids]`."""
    marks: Array
    """Paired t of every latent's change, `[d_sae]`."""
    carried: tuple[int, ...]
    marked: tuple[int, ...]
    """Latents that change, by effect and by |t|, best first."""
    chosen: tuple[int, ...]
    """The fewest latents that bring `config.share` of the site's effect."""
    chosen_changes: Array
    """Their changes of activation, `[rows, chosen]`."""
    reached: bool
    """Whether they bring that much; else they are those that bring most."""
    together: Array
    """Their effect together, `[rows]`."""
    curves: tuple[Curve, ...]
    unexplained: tuple[float | None, float | None]
    """FVU of the SAE on the base runs' states and on the source runs'."""
    seconds: float = 0.0

    def __repr__(self) -> str:
        kept = self.shares["held out"]
        return (
            f"LatentResult({len(self.groups)} runs, {self.metric}, site {self.site.mean():+.3f}; "
            f"{len(self.chosen)} latents carry {kept} of it on held-out groups, all latents "
            f"{self.shares['latents']}, the error {self.shares['error']})"
        )

    @cached_property
    def shares(self) -> dict[str, Figure]:
        """Shares of the site's effect, as ratios of means with 95 % intervals over groups: of all
        latents, of the error, of the chosen ones, and of these on the held-out groups."""
        rest = list(self.held_out)
        groups = [self.groups[i] for i in rest]
        seed = self.config.seed
        return {
            "latents": share_of(self.latents, self.site, self.groups, seed),
            "error": share_of(self.error, self.site, self.groups, seed),
            "chosen": share_of(self.together, self.site, self.groups, seed),
            "held out": share_of(self.together[rest], self.site[rest], groups, seed),
        }

    @cached_property
    def summary(self) -> list[dict[str, Any]]:
        """A row for each latent that was patched, the largest effect first: mean effect with its
        interval, the estimate, the mean change of activation, t, and both ranks."""
        sums, counts = grouped(self.effects, self.groups)
        low, high = bootstrap_ratio(sums, counts, seed=self.config.seed)
        by_effect = {latent: rank for rank, latent in enumerate(self.carried, 1)}
        by_mark = {latent: rank for rank, latent in enumerate(self.marked, 1)}
        rows = [
            {
                "latent": latent,
                "effect": float(self.effects[:, i].mean()),
                "low": float(low[i]) if np.isfinite(low[i]) else None,
                "high": float(high[i]) if np.isfinite(high[i]) else None,
                "fast": float(self.fast[:, i].mean()),
                "change": float(self.changes[:, i].mean()),
                "t": float(self.marks[latent]),
                "carries": by_effect[latent],
                "marks": by_mark[latent],
                "chosen": latent in self.chosen,
            }
            for i, latent in enumerate(self.ids)
        ]
        return sorted(rows, key=lambda row: -abs(row["effect"]))

    @cached_property
    def overlap(self) -> dict[str, float]:
        """How far latents that carry are latents that mark: share of the first 10 and of the first
        50 in common, and Spearman of |effect| and |t| over the latents that were patched."""
        from scipy.stats import spearmanr

        found = {}
        for k in (10, 50):
            size = min(k, len(self.carried))
            both = set(self.carried[:size]) & set(self.marked[:size])
            found[f"first {k}"] = len(both) / size
        sizes = np.abs(self.effects.mean(axis=0)), np.abs(self.marks[list(self.ids)])
        if len(self.ids) > 2 and all(values.std() > 0 for values in sizes):
            found["spearman"] = float(spearmanr(*sizes).statistic)
        return found

    def curve_table(self) -> list[dict[str, Any]]:
        """Share of the site's effect by order and size, all groups and held-out ones."""
        rest, rows = list(self.held_out), []
        for curve in self.curves:
            for i, size in enumerate(curve.sizes):
                rows.append(
                    {
                        "order": curve.name,
                        "k": size,
                        "share": float(curve.effects[:, i].mean() / self.site.mean()),
                        "held_out": float(curve.effects[rest, i].mean() / self.site[rest].mean()),
                    }
                )
        return rows

    def to_frame(self) -> Any:
        """A pandas table of `summary`."""
        import pandas

        return pandas.DataFrame(self.summary)

    def plan(
        self,
        lm: LanguageModel,
        sae: Any,
        *,
        scope: str = "generation",
        task: Any = None,
    ) -> Any:
        """A steering plan that adds the chosen latents by their mean change (`mu`; its standard
        deviation over pairs is `sigma`)."""
        from saesteer.steering.plans.from_sae import make_plan
        from saesteer.steering.plans.plan import PlannedLatent

        latents = [
            PlannedLatent(
                id=latent, mu=float(changes.mean()), sigma=float(changes.std()),
                score=next((r["effect"] for r in self.summary if r["latent"] == latent), None),
            )
            for latent, changes in zip(self.chosen, self.chosen_changes.T, strict=True)
        ]  # fmt: skip
        return make_plan(
            lm, sae, latents, layer=self.sae["layer"], site=self.sae["site"], scope=scope, task=task
        )

    def warnings(self) -> list[str]:
        """What a reader should know before using the figures."""
        found = []
        count = len(set(self.groups))
        if count < FEWEST_GROUPS:
            found.append(f"{count} groups are fewer than {FEWEST_GROUPS}: no intervals")
        site = share_of(self.site, None, self.groups, self.config.seed)
        if site.low is not None and site.high is not None and site.low <= 0 <= site.high:
            found.append(
                f"the whole site moves {self.metric} by {site}: shares of an effect around 0 mean "
                "little; take another site or position"
            )
        if not self.reached:
            found.append(
                f"no number of latents up to {self.config.most} brings {self.config.share:.0%} of "
                f"the site's effect: the {len(self.chosen)} chosen bring most, "
                f"{self.shares['chosen']}; the error alone brings {self.shares['error']}"
            )
        high = [x for x in self.unexplained if x is not None and x > HIGH_FVU]
        if high:
            found.append(
                f"the SAE leaves {max(high):.2f} of these states' variance unexplained (FVU): what "
                "it misses is in the error"
            )
        return found

    def document(self) -> dict[str, Any]:
        """Everything but single pairs, JSON-ready."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "sae": self.sae,
            "settings": asdict(self.config),
            "metric": self.metric,
            "n_pairs": len(self.groups),
            "n_groups": len(set(self.groups)),
            "n_held_out": len(self.held_out),
            "site": float(self.site.mean()),
            "latents": float(self.latents.mean()),
            "error": float(self.error.mean()),
            "shares": {name: asdict(figure) for name, figure in self.shares.items()},
            "fvu": {"base": self.unexplained[0], "source": self.unexplained[1]},
            "chosen": list(self.chosen),
            "reached": self.reached,
            "overlap": self.overlap,
            "patched": self.summary,
            "curves": self.curve_table(),
            "warnings": self.warnings(),
            "seconds": self.seconds,
        }


def order_of(ids: Sequence[int]) -> str:
    """Latents with commas between them, shortened."""
    told = ", ".join(map(str, ids[:12]))
    return told + (f" and {len(ids) - 12} more" if len(ids) > 12 else "")
