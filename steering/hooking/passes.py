"""A call of the model and its forward passes: their rows, and the positions of their tokens."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.sae.text.prompts import EncodedPrompt


@dataclass(eq=False)
class Call:
    """One batch of prompts: a call of `generate`, or a row given to the model directly."""

    number: int
    prompt_lengths: list[int]
    """P of each row, in real tokens."""
    prompts: list[EncodedPrompt | None]
    real: Bool[Tensor, "rows width"]
    """Which columns of the prompt hold tokens and not padding."""
    ids: Int[Tensor, "rows width"] | None
    generating: bool
    first_pass: int = 0
    """Number of the first forward pass that belongs to the call, from 1."""
    _ends: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of prompts."""
        return len(self.prompt_lengths)

    @property
    def width(self) -> int:
        """Columns that the rows began with, padding included."""
        return self.real.shape[1]

    @cached_property
    def lengths(self) -> list[int]:
        """Real tokens that each row began with: the position of the first column after them."""
        found: list[int] = self.real.sum(dim=1).tolist()
        return found

    def factor(self, batch: int) -> int:
        """How many rows of a pass belong to each prompt: beams, returned sequences."""
        if batch % self.rows:
            raise UserError(
                f"a forward pass has {batch} rows and the call began with {self.rows} prompts: "
                "steering cannot tell which row belongs to which prompt"
            )
        return batch // self.rows

    def positions_after(
        self, batch: int, start: int, count: int, device: torch.device
    ) -> Int[Tensor, "batch count"]:
        """Positions of `count` columns from the `start`-th after the prompts on."""
        key = batch, device
        if key not in self._ends:
            with torch.inference_mode(False):
                ends = torch.tensor(self.lengths, dtype=torch.int64, device=device)
                self._ends[key] = ends.repeat_interleave(self.factor(batch))[:, None]
        steps = torch.arange(start, start + count, device=device)
        return self._ends[key] + steps


@dataclass(eq=False)
class PassTokens:
    """The tokens of one forward pass."""

    call: Call
    batch: int
    length: int
    columns: int
    """Width of the rows so far, earlier tokens and padding included."""
    device: torch.device
    ids: Int[Tensor, "batch seq"] | None
    """Token ids, where the pass was given ids and not embeddings."""
    real_columns: Bool[Tensor, "batch columns"] | None
    """Which columns hold tokens; None after the prompts of `generate`, where all do."""

    @property
    def after(self) -> int | None:
        """How many columns after the prompts the pass begins, the same in all of its rows.

        None when the pass holds a part of the prompts, or is not one of `generate` with a cache.
        """
        if self.real_columns is not None:
            return None
        return self.columns - self.length - self.call.width

    @cached_property
    def p(self) -> Int[Tensor, "batch seq"]:
        """Position of each token among the real tokens of its row."""
        after = self.after
        if after is not None:
            return self.call.positions_after(self.batch, after, self.length, self.device)
        assert self.real_columns is not None
        return (self.real_columns.cumsum(dim=1) - 1)[:, self.columns - self.length :]

    @cached_property
    def real(self) -> Bool[Tensor, "batch seq"]:
        """False for padding, whose `p` means nothing."""
        if self.real_columns is None:
            return torch.ones((self.batch, self.length), dtype=torch.bool, device=self.device)
        return self.real_columns[:, self.columns - self.length :]


def grown(buffer: Tensor, batch: int, width: int, fill: bool | float) -> Tensor:
    """`buffer` `[rows, columns]` of at least `batch` rows and `width` columns.

    Rows are repeated for beams and returned sequences; new columns hold `fill`.
    """
    if len(buffer) < batch:
        buffer = buffer.repeat_interleave(batch // len(buffer), dim=0)
    if buffer.shape[1] < width:
        more = buffer.new_full((len(buffer), width - buffer.shape[1]), fill)
        buffer = torch.cat([buffer, more], dim=1)
    return buffer
