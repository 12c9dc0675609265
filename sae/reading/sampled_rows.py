"""Rows with their active latents, kept within a bound: which latents fire together, and on what."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse import csr_array

MOST_ENTRIES = 2**24
"""Firings that are kept: 64 MB. With 32 active latents a token those of 500,000 tokens."""


class SampledRows:
    """Every row's active latents, or every second's, fourth's, ..., so that they fit the bound."""

    def __init__(self, d_sae: int, most: int = MOST_ENTRIES) -> None:
        self.d_sae, self.most = d_sae, most
        self.stride = 1
        """Each `stride`-th row is kept."""
        self._seen = 0
        self._entries = 0
        self._parts: list[dict[str, NDArray[Any]]] = []

    def add(
        self,
        row: Int[Tensor, " entries"],
        latent: Int[Tensor, " entries"],
        token_ids: Int[Tensor, " rows"],
        held_out: Bool[Tensor, " rows"],
    ) -> None:
        """Add rows with the (row, latent) pairs that are active, sorted by row."""
        counts = np.bincount(row.numpy(force=True), minlength=len(token_ids))
        part: dict[str, NDArray[Any]] = {
            "number": self._seen + np.arange(len(token_ids)),
            "tokens": token_ids.numpy(force=True).astype(np.int32),
            "held": held_out.numpy(force=True),
            "count": counts,
            "latent": latent.numpy(force=True).astype(np.int32),
        }
        self._seen += len(token_ids)
        self._parts.append(self._thinned(part))
        self._entries += len(self._parts[-1]["latent"])
        while self._entries > self.most:
            self.stride *= 2
            self._parts = [self._thinned(part) for part in self._parts]
            self._entries = sum(len(part["latent"]) for part in self._parts)

    def _thinned(self, part: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        keep = part["number"] % self.stride == 0
        if keep.all():
            return part
        rows = {name: part[name][keep] for name in ("number", "tokens", "held", "count")}
        return {**rows, "latent": part["latent"][np.repeat(keep, part["count"])]}

    def _joined(self, name: str) -> NDArray[Any]:
        return np.concatenate([part[name] for part in self._parts]) if self._parts else np.empty(0)

    @property
    def rows(self) -> int:
        """How many rows are kept."""
        return sum(len(part["number"]) for part in self._parts)

    def matrix(self) -> "csr_array":
        """The kept rows `[rows, d_sae]`: 1 where a latent fires."""
        from scipy.sparse import csr_array

        ends = np.concatenate([[0], np.cumsum(self._joined("count"), dtype=np.int64)])
        latents = self._joined("latent").astype(np.int32)
        ones = np.ones(len(latents), dtype=np.int32)
        return csr_array((ones, latents, ends), shape=(self.rows, self.d_sae))

    def tokens(self) -> NDArray[np.int32]:
        """The token of each kept row."""
        return self._joined("tokens").astype(np.int32)

    def held_out(self) -> NDArray[np.bool_]:
        """Whether each kept row lies in a context that is held out."""
        return self._joined("held").astype(bool)
