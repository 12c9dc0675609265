"""What instruction vectors do: effects by set of layers, with controls, and the plan they make."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.config import VectorConfig
from saesteer.mechanisms.statistics import (
    FEWEST_GROUPS,
    bootstrap_ratio,
    grouped,
    halves,
    sign_p_values,
)
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.plans.directions import plan_from_directions
from saesteer.steering.plans.plan import Plan, TaskIdentity

Array = np.ndarray
SCHEMA_VERSION = 1


class LayerSet(NamedTuple):
    """Layers that get an instruction's state at once."""

    layers: tuple[int, ...]
    dose: float | None = None
    """How much of the difference of states is added; None puts the state in place of the other."""

    @property
    def name(self) -> str:
        """Layers with a plus between them, and the dose."""
        told = "+".join(map(str, self.layers))
        return told if self.dose is None else f"{told} x{self.dose:g}"


def best_pairs(
    sets: Sequence[LayerSet],
    effects: Array,
    groups: Sequence[str],
    *,
    seed: int = 0,
    count: int = 10,
) -> list[LayerSet]:
    """The pairs of layers with the largest mean f on the first half of the groups, at the last
    dose: what is chosen there may be tested on the other half."""
    first, rest = halves(groups, seed=seed)
    dose = sets[-1].dose if sets else None
    own = [i for i, one in enumerate(sets) if len(one.layers) == 2 and one.dose == dose]
    if not own or not first or not rest:
        return []
    mean = effects[np.ix_(first, own)].mean(axis=0)
    return [sets[own[int(i)]] for i in np.argsort(-mean, kind="stable")[:count]]


@dataclass(frozen=True, eq=False)
class VectorResult:
    """Effects f of instruction vectors, in the metric's unit."""

    model: dict[str, Any]
    config: VectorConfig
    metric: str
    layers: tuple[int, ...]
    sets: tuple[LayerSet, ...]
    effects: Array
    """f `[pairs, sets]`: the metric with the vectors minus that of the prompt alone."""
    base: Array
    full: Array
    """The metric without and with the instruction in words, `[pairs]`."""
    groups: tuple[str, ...]
    compared: tuple[LayerSet, ...]
    """The sets that controls were made for."""
    controls: dict[str, Array]
    """f `[pairs, compared]` of other states, by control."""
    vectors: Float[Tensor, "layers d_model"]
    """Mean over pairs of the instruction's state minus the one in its place, in float64."""
    spread: Float[Tensor, " layers"]
    """Standard deviation along `vectors` of the states without instruction."""
    dropped: tuple[str, ...] = ()
    seconds: float = 0.0

    def __repr__(self) -> str:
        best = max(self.summary, key=lambda row: row["effect"])
        return (
            f"VectorResult({len(self.sets)} sets x {len(self.base)} pairs, {self.metric}, "
            f"instruction {self.whole:+.3f}, best {best['set']} {best['effect']:+.3f})"
        )

    @cached_property
    def whole(self) -> float:
        """f_full: what the instruction in words does, mean over pairs."""
        return float((self.full - self.base).mean())

    @property
    def best(self) -> int:
        """The single layer with the largest f, at the largest dose."""
        rows = [row for row in self.summary if len(row["layers"]) == 1]
        return int(max(rows, key=lambda row: row["effect"])["layers"][0])

    @cached_property
    def summary(self) -> list[dict[str, Any]]:
        """A row for each set: mean f and its share of f_full (a ratio of means), with 95 %
        intervals over groups, the mean of each control, and f minus the other instruction's."""
        rows = []
        effect, share = self._intervals(self.effects), self._intervals(self.effects, share=True)
        at = {one: i for i, one in enumerate(self.compared)}
        for i, one in enumerate(self.sets):
            row: dict[str, Any] = {
                "set": one.name,
                "layers": list(one.layers),
                "dose": one.dose,
                "effect": float(self.effects[:, i].mean()),
                "low": effect[0][i],
                "high": effect[1][i],
                "share": float(self.effects[:, i].mean() / self.whole),
                "share_low": share[0][i],
                "share_high": share[1][i],
                "controls": {
                    name: float(values[:, at[one]].mean()) if one in at else None
                    for name, values in self.controls.items()
                },
            }
            if one in at and "other" in self.controls:
                own = (self.effects[:, i] - self.controls["other"][:, at[one]])[:, None]
                ends = self._intervals(own)
                row["over_other"] = [float(own.mean()), ends[0][0], ends[1][0]]
            rows.append(row)
        return rows

    def _intervals(self, values: Array, *, share: bool = False) -> tuple[list[Any], list[Any]]:
        sums, counts = grouped(values, self.groups)
        if share:
            counts = grouped((self.full - self.base)[:, None], self.groups)[0][:, 0]
        low, high = bootstrap_ratio(sums, counts, seed=self.config.seed)
        return [_finite(x) for x in low], [_finite(x) for x in high]

    @cached_property
    def superadditivity(self) -> list[dict[str, Any]]:
        """I = f({l1, l2}) - f({l1}) - f({l2}) of the ten best pairs of layers.

        They are chosen by f on one half of the groups and tested on the other: an exact sign test
        of I against 0, with Holm's correction, and the mean I with its interval. With doses, for
        each dose: replacing a state is not adding one, and to first order a linear code adds up.
        """
        from saesteer.steering.evaluation.intervals import holm

        chosen = best_pairs(self.sets, self.effects, self.groups, seed=self.config.seed)
        if not chosen:
            return []
        place = {one: i for i, one in enumerate(self.sets)}
        chosen = [one._replace(dose=dose) for dose in dict.fromkeys(s.dose for s in self.sets)
                  for one in chosen]  # fmt: skip
        _, rest = halves(self.groups, seed=self.config.seed)
        found = []
        for one in chosen:
            parts = [self.effects[:, place[LayerSet((layer,), one.dose)]] for layer in one.layers]
            found.append(self.effects[:, place[one]] - sum(parts))
        values = np.array(found).T[rest]
        sums, counts = grouped(values, [self.groups[i] for i in rest])
        low, high = bootstrap_ratio(sums, counts, seed=self.config.seed)
        return [
            {
                "set": one.name,
                "interaction": float(values[:, i].mean()),
                "low": _finite(low[i]),
                "high": _finite(high[i]),
                "p_holm": p,
                "positive": int((sums[:, i] > 0).sum()),
                "groups": len(sums),
            }
            for i, (one, p) in enumerate(zip(chosen, holm(sign_p_values(sums)), strict=True))
        ]

    def to_frame(self) -> Any:
        """A pandas table of `summary`."""
        import pandas

        return pandas.DataFrame(
            [{**row, **row["controls"]} for row in self.summary]
        ).drop(columns="controls")  # fmt: skip

    def plan(
        self,
        lm: LanguageModel,
        layer: int | None = None,
        *,
        scope: str = "generation",
        task: TaskIdentity | None = None,
    ) -> Plan:
        """A steering plan that adds the mean vector of a layer, by default of the best one.

        Raises UsageError for a layer whose vector was not made.
        """
        chosen = self.best if layer is None else layer % lm.n_layers
        if chosen not in self.layers:
            told = ", ".join(map(str, self.layers))
            raise UsageError(f"`plan` {layer} is no layer that was patched: choose of {told}")
        at = self.layers.index(chosen)
        return plan_from_directions(
            lm, self.vectors[at][None], layer=chosen, source="instruction vector",
            sigma=[float(self.spread[at])], scope=scope, task=task,
        )  # fmt: skip

    def warnings(self) -> list[str]:
        """What a reader should know before using the figures."""
        found = []
        count = len(set(self.groups))
        if count < FEWEST_GROUPS:
            found.append(f"{count} groups are fewer than {FEWEST_GROUPS}: no intervals")
        if self.whole <= 0:
            found.append(
                f"the instruction in words lowers {self.metric} by {-self.whole:.3g}: shares of it "
                "mean little"
            )
        if self.dropped:
            found.append(f"{len(self.dropped)} pairs were left out, first {self.dropped[0]}")
        return found

    def document(self) -> dict[str, Any]:
        """Everything but single pairs and the vectors, JSON-ready."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "settings": asdict(self.config),
            "metric": self.metric,
            "n_pairs": len(self.base),
            "n_groups": len(set(self.groups)),
            "base": float(self.base.mean()),
            "full": float(self.full.mean()),
            "whole": self.whole,
            "best_layer": self.best,
            "sets": self.summary,
            "superadditivity": self.superadditivity,
            "warnings": self.warnings(),
            "seconds": self.seconds,
        }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
