"""Sums by document, and the figures with their intervals that are made from them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from saesteer.sae.measuring.figures import Sums

# Fewer documents than this say little about their spread: contexts are resampled instead.
_FEW_DOCUMENTS = 10


class Tally:
    """Sums of columns by document and context; ratios and intervals are made from them."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = tuple(columns)
        self._sums: dict[tuple[int, int], NDArray[np.float64]] = {}
        self._contexts = 0

    @property
    def documents(self) -> int:
        """How many documents have a row."""
        return len({document for document, _ in self._sums})

    def add(
        self,
        owners: Int[Tensor, "contexts positions"],
        scored: Bool[Tensor, "contexts positions"],
        values: Mapping[str, Float[Tensor, "contexts positions"]],
    ) -> None:
        """Add the values at the scored positions of some contexts to the documents they are of."""
        numbers = self._contexts + torch.arange(len(owners))[:, None].expand_as(owners)
        self._contexts += len(owners)
        keys, inverse = torch.stack([owners[scored], numbers[scored]], dim=1).unique(
            dim=0, return_inverse=True
        )
        table = torch.stack([values[name][scored].double() for name in self.columns], dim=1)
        sums = torch.zeros(len(keys), len(self.columns), dtype=torch.float64)
        sums.index_add_(0, inverse, table)
        for (document, number), row in zip(keys.tolist(), sums.numpy(), strict=True):
            self._sums[document, number] = row

    def table(self) -> NDArray[np.float64]:
        """The sums of each unit that is resampled (document or context), `[units, columns]`."""
        if self.documents < _FEW_DOCUMENTS:
            return np.stack(list(self._sums.values()))
        units: dict[int, NDArray[np.float64]] = {}
        for (document, _), row in self._sums.items():
            units[document] = units.get(document, np.zeros(len(self.columns))) + row
        return np.stack(list(units.values()))

    def summary(
        self, figures: Callable[[Sums], Sums], resamples: int, seed: int
    ) -> dict[str, dict[str, Any]]:
        """Every figure as {"value", "low", "high"}: a 95 % bootstrap interval over the units."""
        table = self.table()
        draws = np.random.default_rng(seed).integers(len(table), size=(resamples, len(table)))
        resampled = np.stack([table[draw].sum(axis=0) for draw in draws])
        values = figures(self._named(table.sum(axis=0)[None]))
        spread = figures(self._named(resampled))
        return {
            name: {
                "value": float(value[0]),
                "low": float(np.percentile(spread[name], 2.5)),
                "high": float(np.percentile(spread[name], 97.5)),
            }
            for name, value in values.items()
        }

    def _named(self, sums: NDArray[np.float64]) -> Sums:
        return dict(zip(self.columns, sums.T, strict=True))
