"""A shuffle buffer: takes activations in the order of the text and returns them shuffled."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError


class ShuffleBuffer:
    """A preallocated block of rows that exchanges random ones for new ones.

    Once `capacity` rows are in, every `batch_rows` new rows take the places of as many random old
    rows, which leave as one batch: O(1) copies per row, and the memory never grows. What a batch
    holds depends on the seed and on how many rows came before, not on how they were cut.

    Args:
        capacity: rows held; memory is `capacity * width` elements of `dtype`.
        width: elements per row.
        batch_rows: rows per batch.
        seed: of the random choice.
    """

    def __init__(
        self, capacity: int, width: int, batch_rows: int, dtype: torch.dtype, seed: int
    ) -> None:
        if capacity < batch_rows:
            raise UsageError(
                f"`buffer_tokens` must be at least `batch_tokens` ({batch_rows}), got {capacity}"
            )
        self.rows = torch.empty(capacity, width, dtype=dtype)
        self.filled = 0
        self.batch_rows = batch_rows
        self._incoming = torch.empty(batch_rows, width, dtype=dtype)
        self._staged = 0
        self._rng = torch.Generator().manual_seed(seed)

    @property
    def full(self) -> bool:
        """Whether the buffer holds `capacity` rows, so that new rows push out old ones."""
        return self.filled == len(self.rows)

    def __len__(self) -> int:
        """Rows held."""
        return self.filled + self._staged

    def put(self, rows: Float[Tensor, "rows width"]) -> list[Float[Tensor, "batch width"]]:
        """Take rows in; return the batches that leave, none until the buffer is full."""
        batches = []
        while len(rows):
            if not self.full:
                taken = min(len(rows), len(self.rows) - self.filled)
                self.rows[self.filled : self.filled + taken] = rows[:taken]
                self.filled += taken
            else:
                taken = min(len(rows), self.batch_rows - self._staged)
                self._incoming[self._staged : self._staged + taken] = rows[:taken]
                self._staged += taken
                if self._staged == self.batch_rows:
                    batches.append(self._exchange())
            rows = rows[taken:]
        return batches

    def _exchange(self) -> Float[Tensor, "batch width"]:
        # Distinct slots: two new rows in the same slot would lose one of them.
        slots = torch.randperm(len(self.rows), generator=self._rng)[: self._staged]
        leaving = self.rows[slots]
        self.rows[slots] = self._incoming[: self._staged]
        self._staged = 0
        return leaving

    def take(self) -> Float[Tensor, "batch width"] | None:
        """Take out a random batch of what is held when no more rows come; None when it is empty.

        All batches are full, except for one when the rows that came in do not make whole batches.
        """
        if self._staged:
            return self._exchange()
        if not self.filled:
            return None
        count = min(self.batch_rows, self.filled)
        slots = torch.randperm(self.filled, generator=self._rng)[:count]
        leaving = self.rows[slots]
        # Rows from the end fill the gaps, so that the whole buffer is never copied.
        rest = self.filled - count
        at_end = torch.ones(count, dtype=torch.bool)
        at_end[slots[slots >= rest] - rest] = False
        self.rows[slots[slots < rest]] = self.rows[rest : self.filled][at_end]
        self.filled = rest
        return leaving

    def state_dict(self) -> dict[str, Any]:
        """Contents and random state, as tensors that share memory with the buffer."""
        return {
            "rows": self.rows[: self.filled],
            "incoming": self._incoming[: self._staged],
            "rng": self._rng.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.filled, self._staged = len(state["rows"]), len(state["incoming"])
        self.rows[: self.filled] = state["rows"]
        self._incoming[: self._staged] = state["incoming"]
        self._rng.set_state(state["rng"])
