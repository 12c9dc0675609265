"""Batches to train on, from a model that runs or from shards on disk."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import NonFiniteError, UserError
from saesteer.checkpoints.places import Place
from saesteer.checkpoints.shards import ShardReader
from saesteer.sae.activations.joint_shards import JointShards
from saesteer.sae.activations.reader import ActivationStream
from saesteer.sae.activations.shuffle_buffer import ShuffleBuffer
from saesteer.sae.activations.sinks import NotFinite, SinkFilter

_CHUNK_ROWS = 8192


@runtime_checkable
class ActivationSource(Protocol):
    """Rows of activations in a seeded order; those of several hook points lie side by side."""

    places: list[Place]

    def next_rows(self) -> Float[Tensor, "rows width"] | None:
        """The next rows, or None when there are no more."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, JSON-ready."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        ...

    def held_out(self) -> "ActivationSource | None":
        """A source of rows, each once, that this one has not given and, where rows are held back,
        never will; None where there are none."""
        ...

    @property
    def excluded(self) -> dict[str, int]:
        """Rows left out so far, by reason."""
        ...


class LiveSource:
    """Activations straight from the model."""

    def __init__(self, stream: ActivationStream) -> None:
        self.stream = stream
        self.places = [point.key for point in stream.points]

    def next_rows(self) -> Float[Tensor, "rows width"] | None:
        batch = self.stream.next_batch()
        if batch is None:
            return None
        return torch.cat([batch.activations[place] for place in self.places], dim=1)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)

    def has_read(self, state: dict[str, Any], identities: Any) -> bool:
        """See `ActivationStream.has_read`."""
        return self.stream.has_read(state, identities)

    def held_out(self) -> "LiveSource | None":
        stream = self.stream.held_out()
        return None if stream is None else LiveSource(stream)

    @property
    def excluded(self) -> dict[str, int]:
        return self.stream.excluded


class ShardSource:
    """Activations from shards: every epoch in a new order of shards and of rows within each.

    Orders are drawn from (seed, epoch, shard), so a position is three numbers: epoch, shard, row.
    The last `held_back` rows, in the order in which they were harvested, are in no epoch.
    Raises UserError from `next_rows` when every row is a sink, NonFiniteError for NaN or infinity.
    """

    def __init__(
        self,
        reader: ShardReader | JointShards,
        places: Sequence[Place],
        max_norm_ratio: float,
        seed: int,
        held_back: int = 0,
    ) -> None:
        """`held_back`: fewer than all rows."""
        self.reader = reader
        self.places = list(places)
        self.seed = seed
        self.held_back = held_back
        self._only_held_back = self._one_epoch = False
        self.sinks = SinkFilter(max_norm_ratio)
        self.epoch = self.shard = self.row = self.kept = 0
        self._excluded = {"sinks": 0}

    @property
    def rows_at_once(self) -> int:
        """The most rows that `next_rows` reads; those that a run does not need are lost to it."""
        return min(_CHUNK_ROWS, max(self.reader.shard_tokens, default=0))

    def _parts(self) -> list[tuple[int, slice]]:
        """The rows of each shard that are read; shards without any are left out."""
        first_held_back = self.reader.tokens - self.held_back
        parts, before = [], 0
        for index, tokens in enumerate(self.reader.shard_tokens):
            cut = min(max(first_held_back - before, 0), tokens)
            rows = slice(cut, tokens) if self._only_held_back else slice(0, cut)
            if rows.start < rows.stop:
                parts.append((index, rows))
            before += tokens
        return parts

    def next_rows(self) -> Float[Tensor, "rows width"] | None:
        parts = self._parts()
        if self.shard == len(parts):
            if self._one_epoch:
                return None
            if self.kept == 0:
                raise UserError("`activations` holds no rows to train on: every row is a sink")
            self.epoch, self.shard, self.row = self.epoch + 1, 0, 0
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(parts))
        index, rows = parts[order[self.shard]]
        tokens = rows.stop - rows.start
        mixed = np.random.default_rng([self.seed, self.epoch, index]).permutation(tokens)
        chosen = rows.start + torch.from_numpy(mixed[self.row : self.row + _CHUNK_ROWS])
        if self.row == 0:
            for later in order[self.shard + 1 : self.shard + 2].tolist():
                self.reader.read_ahead(parts[later][0], self.places)
        kept = self._kept_rows(index, chosen)
        self.row += len(chosen)
        if self.row >= tokens:
            self.shard, self.row = self.shard + 1, 0
        self._excluded["sinks"] += len(chosen) - len(kept)
        self.kept += len(kept)
        return kept

    def _kept_rows(self, index: int, chosen: Int[Tensor, " some"]) -> Float[Tensor, "rows width"]:
        """Rows of a shard, side by side, without the sinks among them."""
        rows = {place: self.reader.shard(index, *place)[0][chosen] for place in self.places}
        try:
            keep = self.sinks.keep(rows)
        except NotFinite as error:
            layer, site = error.place
            raise NonFiniteError(
                f"`activations` {self.reader.folder} holds NaN or infinity in shard {index} of "
                f"layer {layer} {site}: harvest again"
            ) from None
        return torch.cat([values[keep] for values in rows.values()], dim=1)

    def held_out(self) -> "ActivationSource | None":
        """The rows that are held back, or those that are left of the first epoch."""
        if self.epoch and not self.held_back:
            return None
        other = ShardSource(self.reader, self.places, self.sinks.max_norm_ratio, self.seed)
        other.load_state_dict(self.state_dict())
        other._one_epoch = True
        if self.held_back:
            other._only_held_back = True
            other.epoch = other.shard = other.row = 0
        return other

    def state_dict(self) -> dict[str, Any]:
        return {
            **({"held_back": self.held_back} if self.held_back else {}),
            "epoch": self.epoch,
            "shard": self.shard,
            "row": self.row,
            "kept": self.kept,
            "sinks": self.sinks.state_dict(),
            "excluded": dict(self._excluded),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # States of earlier versions held nothing back, and go on like that.
        self.held_back = state.get("held_back", 0)
        self.epoch, self.shard, self.row = state["epoch"], state["shard"], state["row"]
        self.kept = state["kept"]
        self.sinks.load_state_dict(state["sinks"])
        self._excluded = dict(state["excluded"])

    @property
    def excluded(self) -> dict[str, int]:
        return self._excluded


class BatchStream:
    """Exactly `tokens` rows of a source, shuffled by a buffer, in batches of equal size.

    `tokens` and `buffer_tokens` are cut down to whole batches, so that every batch is full. `width`
    is that of a row, with the places of the source side by side.
    """

    def __init__(
        self,
        source: ActivationSource,
        width: int,
        *,
        tokens: int,
        batch_tokens: int,
        buffer_tokens: int,
        dtype: torch.dtype,
        seed: int,
        filling: Callable[[int, int], None] = lambda filled, total: None,
    ) -> None:
        self.source = source
        self.total = tokens // batch_tokens * batch_tokens
        held = min(buffer_tokens, max(tokens // 2, batch_tokens)) // batch_tokens * batch_tokens
        self.buffer_tokens = held
        self._options = (held, width, batch_tokens, dtype, seed)
        self.drawn = 0
        self._pending: list[Tensor] = []
        self._filling = filling

    @cached_property
    def buffer(self) -> ShuffleBuffer:
        """The shuffle buffer, which takes its memory when it is first used."""
        return ShuffleBuffer(*self._options)

    def fill(self) -> Float[Tensor, "rows width"]:
        """Fill the buffer and return its rows, as a sample on which the data can be measured."""
        self._filling(0, len(self.buffer.rows))
        while not self.buffer.full and self.drawn < self.total:
            self._pending += self.buffer.put(self._draw())
            self._filling(len(self.buffer), len(self.buffer.rows))
        return self.buffer.rows[: self.buffer.filled]

    def next_batch(self) -> Float[Tensor, "batch width"] | None:
        """The next shuffled batch; None after the last.

        Raises UserError when the source ends before `tokens` rows.
        """
        while not self._pending:
            if self.drawn == self.total:
                return self.buffer.take()
            self._pending += self.buffer.put(self._draw())
        return self._pending.pop(0)

    def _draw(self) -> Float[Tensor, "rows width"]:
        rows = self.source.next_rows()
        if rows is None:
            raise UserError(
                f"the corpus ended after {self.drawn} of {self.total} `tokens`: give more `data`, "
                "more `epochs` or fewer `tokens`"
            )
        rows = rows[: self.total - self.drawn]
        self.drawn += len(rows)
        return rows

    def rows_after(self, count: int) -> Float[Tensor, "rows width"]:
        """Up to `count` rows that follow those of the last batch; fewer where the source ends."""
        assert self.drawn == self.total, "the batches come first"
        parts, missing = [self.buffer.rows[:0]], count
        while missing > 0 and (rows := self.source.next_rows()) is not None:
            parts.append(rows[:missing].to(self.buffer.rows.dtype).cpu())
            missing -= len(parts[-1])
        return torch.cat(parts)

    def state_dict(self, ahead: Sequence[Tensor] = ()) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values from which `load_state_dict` continues bit for bit.

        `ahead` are batches that were taken out and not used yet: they will come first again.
        """
        pending = torch.cat([self.buffer.rows[:0], *ahead, *self._pending])
        tensors = {**self.buffer.state_dict(), "pending": pending}
        return tensors, {"drawn": self.drawn, "source": self.source.state_dict()}

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; batches that were ahead come first."""
        self.buffer.load_state_dict(tensors)
        self._pending = list(tensors["pending"].split(self.buffer.batch_rows))
        self._pending = [batch for batch in self._pending if len(batch)]
        self.drawn = meta["drawn"]
        self.source.load_state_dict(meta["source"])
