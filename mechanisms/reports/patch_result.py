"""What a grid of patches found: effects by node and position, with intervals over groups."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from saesteer.mechanisms.config import PatchConfig
from saesteer.mechanisms.patching.agreement import Agreement
from saesteer.mechanisms.patching.sites import Node
from saesteer.mechanisms.statistics import (
    FEWEST_GROUPS,
    bootstrap_ratio,
    grouped,
    sign_p_values,
)

Array = np.ndarray
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Cell:
    """One cell of a grid."""

    node: Node
    at: str
    """Name of the position."""


@dataclass(frozen=True, eq=False)
class PatchResult:
    """Effects of patches, in the metric's unit."""

    model: dict[str, Any]
    config: PatchConfig
    metric: str
    cells: tuple[Cell, ...]
    effects: Array
    """Exact effects `[pairs, cells]`; NaN where a shortcut was taken and not checked."""
    fast: Array | None
    """Estimated effects `[pairs, cells]`."""
    agreement: Agreement | None
    """How far estimates were from exact effects where both are known."""
    base: Array
    source: Array
    """The metric of the unpatched runs, `[pairs]`."""
    groups: tuple[str, ...]
    tokens: tuple[str, ...] = ()
    """Tokens of the first pair's base run, where every token was patched."""
    dropped: tuple[str, ...] = ()
    longer: int = 0
    seconds: float = 0.0

    def __repr__(self) -> str:
        how = self.config.fast or "exact"
        best = max(self.summary, key=lambda row: abs(row["effect"]), default=None)
        told = "" if best is None else f", largest {best['name']} {best['effect']:+.3f}"
        return (
            f"PatchResult({len(self.cells)} cells x {len(self.base)} pairs, {self.metric}, "
            f"{self.config.direction}, {how}{told})"
        )

    @property
    def n_groups(self) -> int:
        """Number of groups, the unit of resampling."""
        return len(set(self.groups))

    @cached_property
    def total(self) -> float:
        """m(source) - m(base), the mean over pairs: what all patches together would do."""
        return float((self.source - self.base).mean())

    @cached_property
    def summary(self) -> list[dict[str, Any]]:
        """A row for each cell: mean effect with its 95 % interval over groups, its share of the
        total as a ratio of means, and the sign test's p adjusted by Benjamini and Hochberg.

        `exact` says whether the effect was patched; with a shortcut the other rows are estimates.
        Intervals and p are None with fewer than eight groups.
        """
        from scipy.stats import false_discovery_control

        known = ~np.isnan(self.effects).any(axis=0)
        values = self.effects if self.fast is None else np.where(known, self.effects, self.fast)
        sums, counts = grouped(values, self.groups)
        low, high = bootstrap_ratio(sums, counts, seed=self.config.seed)
        gaps, _ = grouped((self.source - self.base)[:, None], self.groups)
        share_low, share_high = bootstrap_ratio(sums, gaps[:, 0], seed=self.config.seed)
        p = false_discovery_control(sign_p_values(sums)) if len(self.cells) else []
        enough = self.n_groups >= FEWEST_GROUPS
        rows = []
        for i, cell in enumerate(self.cells):
            mean = float(values[:, i].mean())
            rows.append(
                {
                    "name": f"{cell.node} at {cell.at}",
                    "site": cell.node.site,
                    "layer": cell.node.layer,
                    "head": cell.node.head,
                    "at": cell.at,
                    "effect": mean,
                    "low": float(low[i]) if enough else None,
                    "high": float(high[i]) if enough else None,
                    "share": mean / self.total + 0.0 if self.total else None,
                    "share_low": _finite(share_low[i]),
                    "share_high": _finite(share_high[i]),
                    "p_adjusted": float(p[i]) if enough else None,
                    "exact": bool(known[i]),
                    "fast": None if self.fast is None else float(self.fast[:, i].mean()),
                }
            )
        return rows

    def to_frame(self) -> Any:
        """The summary as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.summary)

    def warnings(self) -> list[str]:
        """What a reader should know before using the figures."""
        found = []
        if self.n_groups < FEWEST_GROUPS:
            found.append(
                f"{self.n_groups} groups are fewer than {FEWEST_GROUPS}: no intervals; give more "
                "pairs of other groups"
            )
        if self.agreement is not None and self.agreement.is_low:
            found.append(
                f"{self.config.fast} orders nodes unlike exact patches (Spearman "
                f"{self.agreement.spearman:.2f}): use ig, or patch exactly"
            )
        if self.longer:
            found.append(
                f"{self.longer} of {len(self.base)} answers have more than one token: scored by "
                "the first"
            )
        if self.dropped:
            found.append(f"{len(self.dropped)} pairs were left out, first {self.dropped[0]}")
        return found

    def document(self) -> dict[str, Any]:
        """Everything but the effects of single pairs, JSON-ready."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "settings": asdict(self.config),
            "metric": self.metric,
            "n_pairs": len(self.base),
            "n_groups": self.n_groups,
            "base": float(self.base.mean()),
            "source": float(self.source.mean()),
            "total": self.total,
            "agreement": None if self.agreement is None else asdict(self.agreement),
            "warnings": self.warnings(),
            "dropped": list(self.dropped),
            "tokens": list(self.tokens),
            "seconds": self.seconds,
            "cells": self.summary,
        }

    def maps(self) -> list[tuple[str, list[str], list[str], Array]]:
        """Pictures: (title, row names, column names, values `[rows, columns]`).

        Heads: blocks x heads, one for each position; other sites: blocks x positions.
        """
        found = []
        values = [row["effect"] for row in self.summary]
        for site in dict.fromkeys(cell.node.site for cell in self.cells):
            own = [(c, v) for c, v in zip(self.cells, values, strict=True) if c.node.site == site]
            layers = sorted({c.node.layer for c, _ in own})
            ats = list(dict.fromkeys(c.at for c, _ in own))
            if own[0][0].node.head is None:
                names = [self._column(at) for at in ats]
                table: dict[Any, float] = {(c.node.layer, c.at): v for c, v in own}
                found.append((site, *_table(table, layers, ats), names))
                continue
            heads = sorted({c.node.head for c, _ in own if c.node.head is not None})
            for at in ats:
                table = {(c.node.layer, c.node.head): v for c, v in own if c.at == at}
                names = [str(head) for head in heads]
                found.append((f"{site} at {at}", *_table(table, layers, heads), names))
        return [(title, rows, names, grid) for title, rows, grid, names in found]

    def _column(self, at: str) -> str:
        return self.tokens[int(at[6:])] if at.startswith("token:") and self.tokens else at


def _table(
    values: dict[Any, float], layers: Sequence[int], columns: Sequence[Any]
) -> tuple[list[str], Array]:
    grid = np.array([[values[layer, column] for column in columns] for layer in layers])
    return [str(layer) for layer in layers], grid


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
