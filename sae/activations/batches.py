"""Batches to train on, from a model that runs or from shards on disk."""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import NonFiniteError, UserError
from saesteer.checkpoints.places import Place
from saesteer.checkpoints.shards import ShardReader
from saesteer.sae.activations.joint_shards import JointShards
from saesteer.sae.activations.reader import ActivationStream
from saesteer.sae.activations.shared_rows import SharedBuffer, Sharing
from saesteer.sae.activations.shuffle_buffer import ShuffleBuffer
from saesteer.sae.activations.sinks import NotFinite, SinkFilter, norms_of
from saesteer.sae.runs.processes import ALONE, Processes

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


@runtime_checkable
class SharedSource(ActivationSource, Protocol):
    """A source that several processes read together: `next_rows` gives each those it has read."""

    @property
    def readers(self) -> Int[Tensor, " all_rows"]:
        """Which process read each of the last rows, in the order of the rows of all."""
        ...

    @property
    def cuts(self) -> list[int]:
        """Where among the last rows of all those of one process's `next_rows` would have ended."""
        ...


class LiveSource:
    """Activations straight from the model."""

    def __init__(self, stream: ActivationStream) -> None:
        self.stream = stream
        self.places = [point.key for point in stream.points]
        self.readers = torch.empty(0, dtype=torch.int64)
        self.cuts: list[int] = []

    def next_rows(self) -> Float[Tensor, "rows width"] | None:
        batch = self.stream.next_batch()
        if batch is None:
            return None
        # Context i was read by process i mod world.
        contexts = torch.arange(len(batch.kept)) % self.stream.processes.world
        self.readers = contexts.repeat_interleave(batch.kept.long())
        ends = batch.kept.long().cumsum(0)[self.stream.config.batch_size - 1 :]
        self.cuts = ends[:: self.stream.config.batch_size].tolist()
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
        processes: Processes = ALONE,
    ) -> None:
        """`held_back`: fewer than all rows. Of several processes each reads every world-th row."""
        self.reader = reader
        self.places = list(places)
        self.seed = seed
        self.held_back = held_back
        self._only_held_back = self._one_epoch = False
        self.sinks = SinkFilter(max_norm_ratio)
        self.epoch = self.shard = self.row = self.kept = 0
        self._excluded = {"sinks": 0}
        self.processes = processes
        self.readers = torch.empty(0, dtype=torch.int64)

    @property
    def cuts(self) -> list[int]:
        """Several processes read together what one reads at once."""
        return [len(self.readers)]

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
        self._excluded["sinks"] += len(chosen) - len(self.readers)
        self.kept += len(self.readers)
        return kept

    def _kept_rows(self, index: int, chosen: Int[Tensor, " some"]) -> Float[Tensor, "rows width"]:
        """Rows of a shard, side by side, without the sinks among them."""
        rank, world = self.processes.rank, self.processes.world
        own = chosen[rank::world]

        def read() -> dict[Place, Tensor]:
            return {place: self.reader.shard(index, *place)[0][own] for place in self.places}

        rows = self.processes.together(read)
        try:
            keep = self._keep(rows, len(chosen))
        except NotFinite as error:
            layer, site = error.place
            raise NonFiniteError(
                f"`activations` {self.reader.folder} holds NaN or infinity in shard {index} of "
                f"layer {layer} {site}: harvest again"
            ) from None
        self.readers = (torch.arange(len(chosen)) % world)[keep]
        return torch.cat([values[keep[rank::world]] for values in rows.values()], dim=1)

    def _keep(self, own: dict[Place, Tensor], count: int) -> Bool[Tensor, " count"]:
        """Which of the rows that all processes have read are no sinks; each judges them all."""
        if self.processes.world == 1:
            return self.sinks.keep(own)
        most = -(-count // self.processes.world)
        norms = [
            self.processes.interleave(row.cpu(), most, torch.nan)[:count] for row in norms_of(own)
        ]
        text = torch.ones(1, count, dtype=torch.bool)
        return self.sinks.keep_contexts(torch.stack(norms)[:, None], text, list(own))[0]

    def held_out(self) -> "ActivationSource | None":
        """The rows that are held back, or those that are left of the first epoch."""
        if self.epoch and not self.held_back:
            return None
        other = ShardSource(
            self.reader,
            self.places,
            self.sinks.max_norm_ratio,
            self.seed,
            processes=self.processes,
        )
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
    is that of a row, with the places of the source side by side. Several processes hold the buffer
    together, and each gets its part of every batch; see `shared_rows`.
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
        sharing: Sharing | None = None,
    ) -> None:
        self.source = source
        self.total = tokens // batch_tokens * batch_tokens
        held = min(buffer_tokens, max(tokens // 2, batch_tokens)) // batch_tokens * batch_tokens
        self.buffer_tokens = held
        self._options = (held, width, batch_tokens, dtype, seed)
        self.drawn = 0
        self._pending: list[Tensor] = []
        self._filling = filling
        self._sharing = sharing

    @cached_property
    def buffer(self) -> ShuffleBuffer | SharedBuffer:
        """The shuffle buffer, which takes its memory when it is first used."""
        if self._sharing is None:
            return ShuffleBuffer(*self._options)
        return SharedBuffer(*self._options, self._sharing)

    def fill(self, count: int | None = None) -> Float[Tensor, "rows width"]:
        """Fill the buffer and return its rows, or the first `count`, as a sample on which the data
        can be measured."""
        self._filling(0, self.buffer_tokens)
        if isinstance(self.buffer, SharedBuffer):
            return self._fill_shared(self.buffer, self.buffer_tokens if count is None else count)
        while not self.buffer.full and self.drawn < self.total:
            self._pending += self.buffer.put(self._draw())
            self._filling(len(self.buffer), self.buffer_tokens)
        return self.buffer.rows[: self.buffer.filled][:count]

    def _fill_shared(self, buffer: SharedBuffer, count: int) -> Float[Tensor, "rows width"]:
        """The sample that one process would measure: rows that it would not have drawn yet go into
        the buffer after it."""
        assert isinstance(self.source, SharedSource)
        later: list[tuple[Tensor, Tensor]] = []
        me = self._sharing.processes.rank if self._sharing is not None else 0
        while not buffer.full and self.drawn < self.total:
            rows, readers = self._draw_shared()
            sizes = [end - start for start, end in pairwise([0, *self.source.cuts])]
            for size in [*sizes, len(readers)]:
                own = int((readers[:size] == me).sum())
                if buffer.full:
                    later.append((rows[:own], readers[:size]))
                else:
                    self._pending += buffer.put(rows[:own], readers[:size])
                rows, readers = rows[own:], readers[size:]
            self._filling(len(buffer), self.buffer_tokens)
        sample = buffer.first(count)
        for rows, readers in later:
            self._pending += buffer.put(rows, readers)
        return sample

    def next_batch(self) -> Float[Tensor, "batch width"] | None:
        """The next shuffled batch; None after the last.

        Raises UserError when the source ends before `tokens` rows.
        """
        while not self._pending:
            if self.drawn == self.total:
                return self.buffer.take()
            self._pending += self._put()
        return self._pending.pop(0)

    def _put(self) -> list[Tensor]:
        """Draw rows, put them into the buffer; the batches that leave it."""
        if isinstance(self.buffer, SharedBuffer):
            rows, readers = self._draw_shared()
            return self.buffer.put(rows, readers)
        return self.buffer.put(self._draw())

    def _draw(self) -> Float[Tensor, "rows width"]:
        rows = self._next_rows()[: self.total - self.drawn]
        self.drawn += len(rows)
        return rows

    def _draw_shared(self) -> tuple[Float[Tensor, "own width"], Int[Tensor, " rows"]]:
        """This process's rows among the next of all, and who has each of those."""
        assert self._sharing is not None and isinstance(self.source, SharedSource)
        rows = self._next_rows()
        readers = self.source.readers[: self.total - self.drawn]
        self.drawn += len(readers)
        return rows[: int((readers == self._sharing.processes.rank).sum())], readers

    def _next_rows(self) -> Float[Tensor, "rows width"]:
        rows = self.source.next_rows()
        if rows is None:
            raise UserError(
                f"the corpus ended after {self.drawn} of {self.total} `tokens`: give more `data`, "
                "more `epochs` or fewer `tokens`"
            )
        return rows

    def everywhere(
        self, source: ActivationSource, rows: Float[Tensor, "own width"]
    ) -> Float[Tensor, "rows width"]:
        """The rows that a source has just given to all processes, in order, on each of them."""
        rows = rows.cpu()
        if self._sharing is None:
            return rows
        assert isinstance(source, SharedSource)
        return self._sharing.everywhere(rows, source.readers)

    @property
    def sent_bytes(self) -> int:
        """Bytes of rows that this process has sent to others."""
        return 0 if self._sharing is None else self._sharing.sent_bytes

    def rows_after(self, count: int) -> Float[Tensor, "rows width"]:
        """Up to `count` rows that follow those of the last batch; fewer where the source ends."""
        assert self.drawn == self.total, "the batches come first"
        parts, missing = [self.buffer.rows[:0]], count
        while missing > 0 and (rows := self.source.next_rows()) is not None:
            rows = self.everywhere(self.source, rows.to(self.buffer.rows.dtype))
            parts.append(rows[:missing])
            missing -= len(parts[-1])
        return torch.cat(parts)

    def state_dict(self, ahead: Sequence[Tensor] = ()) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values from which `load_state_dict` continues bit for bit. Of several
        processes the first has the tensors as one process would have them.

        `ahead` are batches that were taken out and not used yet: they will come first again.
        """
        waiting = [*ahead, *self._pending]
        if self._sharing is not None:
            waiting = [self._whole_batch(part) for part in waiting]
        pending = torch.cat([self.buffer.rows[:0], *waiting])
        tensors = {**self.buffer.state_dict(), "pending": pending}
        return tensors, {"drawn": self.drawn, "source": self.source.state_dict()}

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; batches that were ahead come first."""
        self.buffer.load_state_dict(tensors)
        self._pending = list(tensors["pending"].split(self.buffer.batch_rows))
        self._pending = [batch for batch in self._pending if len(batch)]
        if (sharing := self._sharing) is not None:
            part = sharing.processes.rank // sharing.latent_parts
            mine = sharing.part_of(self.buffer.batch_rows) == part
            self._pending = [batch[mine] for batch in self._pending]
        self.drawn = meta["drawn"]
        self.source.load_state_dict(meta["source"])

    def _whole_batch(self, part: Tensor) -> Float[Tensor, "batch width"]:
        """On the first process a batch of which each has a part; on others no rows."""
        sharing = self._sharing
        assert sharing is not None
        # Of the processes that have the same part the first sends it.
        holder = sharing.part_of(self.buffer.batch_rows) * sharing.latent_parts
        own = part[: len(part) if sharing.processes.rank % sharing.latent_parts == 0 else 0]
        return sharing.all_on_first(own, holder)
