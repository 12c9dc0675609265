"""What instruction vectors did, by set of blocks, beside their controls."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.reading_config import VectorConfig
from saesteer.mechanisms.statistics import (
    FEWEST_GROUPS,
    bootstrap_ratio,
    grouped,
)

Array = np.ndarray
CONTROLS = ("other instruction", "shuffled words", "random direction", "another query")


@dataclass(frozen=True, eq=False)
class VectorResult:
    """Effects f `[queries, sets]` of an instruction's states, in the metric's unit."""

    model: dict[str, Any]
    config: VectorConfig
    metric: str
    instruction: str
    """Of the first pair."""
    sets: tuple[tuple[int, ...], ...]
    """Blocks that are patched together."""
    effects: Array
    base: Array
    """m of the prompts without the instruction, `[queries]`."""
    full: Array
    """m of the whole prompts."""
    groups: tuple[str, ...]
    cells: tuple[tuple[int, ...], ...]
    """The sets that the controls were put in: all single blocks, and the pairs chosen."""
    controls: Mapping[str, Array]
    """f `[queries, cells]` by control."""
    tests: list[dict[str, Any]]
    """Of the pairs chosen on one half of the queries, on the other half."""
    doses: list[dict[str, float]]
    directions: Mapping[int, Tensor]
    """Block -> mean of IV minus the plain state, `[d_model]`."""
    dropped: tuple[str, ...]
    seconds: float

    def __repr__(self) -> str:
        best = max(self.summary, key=lambda row: row["effect"])
        share = "" if best["share"] is None else f" ({best['share']:.2f} of the instruction)"
        return (
            f"VectorResult({len(self.sets)} sets x {len(self.base)} queries at {self.config.at}, "
            f"best blocks {best['layers']} {best['effect']:+.3f} {self.metric}{share})"
        )

    @property
    def total(self) -> float:
        """What the instruction itself does: m(whole prompt) - m(without), the mean."""
        return float((self.full - self.base).mean())

    @property
    def tensors(self) -> dict[str, Array]:
        """Effects of single queries."""
        return {"effects": self.effects}

    @cached_property
    def summary(self) -> list[dict[str, Any]]:
        """A row for each set; intervals are None with fewer than eight groups. `specific` is f
        minus that of the other instruction, where that was measured."""
        sums, counts = grouped(self.effects, self.groups)
        low, high = bootstrap_ratio(sums, counts, seed=self.config.seed)
        enough = len(counts) >= FEWEST_GROUPS
        other = dict(zip(self.cells, self.controls[CONTROLS[0]].T, strict=True))
        return [
            {
                "layers": list(one),
                "effect": float(self.effects[:, i].mean()),
                "low": float(low[i]) if enough else None,
                "high": float(high[i]) if enough else None,
                "share": float(self.effects[:, i].mean()) / self.total if self.total else None,
                "specific": float((self.effects[:, i] - other[one]).mean())
                if one in other else None,
            }
            for i, one in enumerate(self.sets)
        ]  # fmt: skip

    def to_frame(self) -> Any:
        """The summary as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.summary)

    def plan(self, lm: Any, layer: int) -> Any:
        """A steering plan that adds the mean of IV - plain state after one block.

        Raises UsageError for a block that was not read.
        """
        from saesteer.steering.plans.directions import plan_from_directions

        if layer not in self.directions:
            read = ", ".join(map(str, self.directions))
            raise UsageError(f"`plan` {layer} is none of the blocks that were read: {read}")
        return plan_from_directions(
            lm, self.directions[layer][None], layer=layer, source=f"instruction vector {layer}"
        )

    def document(self) -> dict[str, Any]:
        """Everything but single queries, JSON-ready."""
        controls = {
            name: [{"layers": list(one), "effect": float(value)}
                   for one, value in zip(self.cells, table.mean(0), strict=True)]
            for name, table in self.controls.items()
        }  # fmt: skip
        return {
            "schema_version": 1,
            "model": self.model,
            "settings": asdict(self.config),
            "metric": self.metric,
            "instruction": self.instruction,
            "n_queries": len(self.base),
            "n_groups": len(set(self.groups)),
            "base": float(self.base.mean()),
            "full": float(self.full.mean()),
            "total": self.total,
            "sets": self.summary,
            "controls": controls,
            "superadditivity": self.tests,
            "doses": self.doses,
            "dropped": list(self.dropped),
            "seconds": self.seconds,
        }
