"""What latents do over all rows: how often each fires, and how many fire at once."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
DENSE = (0.1, 0.01)
"""A latent that fires on a larger share of the rows counts as dense."""
_BINS_PER_DECADE = 2


class LatentTally:
    """Counts of firings of each latent, and of rows by the number of their active latents."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.rows_by_l0 = torch.zeros(d_sae + 1, dtype=torch.int64, device=device)

    @property
    def rows(self) -> int:
        """How many rows were counted."""
        return int(self.rows_by_l0.sum())

    def add(self, latents: Float[Tensor, "rows d_sae"]) -> None:
        """Count the latents of some rows. A latent fires where it is not 0."""
        active = latents != 0
        self.fired += active.sum(dim=0)
        self.rows_by_l0 += active.sum(dim=1).bincount(minlength=len(self.rows_by_l0))

    def summary(self) -> dict[str, Any]:
        """L0's quantiles, dead and dense latents, and a histogram of log10 of the firing rates.

        The histogram's bins are half a decade wide, each with its lower edge; latents that never
        fire are in none of them.
        """
        density = self.fired.double() / max(1, self.rows)
        alive = density[density > 0].log10().cpu()
        lowest = -int(torch.tensor(float(max(10, self.rows))).log10().ceil())
        edges = torch.arange(lowest * _BINS_PER_DECADE, 1, dtype=torch.float64) / _BINS_PER_DECADE
        # A density of 1 belongs to the last bin, which begins at -0.5.
        bins = (torch.bucketize(alive, edges, right=True) - 1).clamp(max=len(edges) - 2)
        counts = bins.bincount(minlength=len(edges) - 1)
        return {
            "dead_fraction": 1 - float((self.fired > 0).double().mean()),
            "dead_latents": int((self.fired == 0).sum()),
            "dense_latents": {f"above_{limit:g}": int((density > limit).sum()) for limit in DENSE},
            "density_histogram": {
                "log10_from": edges[:-1].tolist(),
                "latents": counts.tolist(),
            },
            "l0_quantiles": {f"p{100 * q:02.0f}": self.l0_quantile(q) for q in QUANTILES},
        }

    def l0_quantile(self, share: float) -> int:
        """The smallest L0 that a `share` of the rows does not exceed."""
        below = self.rows_by_l0.cumsum(0).cpu()
        return int((below >= share * self.rows).nonzero()[0, 0]) if self.rows else 0
