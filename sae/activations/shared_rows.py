"""A shuffle buffer that several processes hold together.

It does what `ShuffleBuffer` does, with the same rows in the same order: all processes draw the same
random slots. Slot s lies in process s mod world. A row is read by one process, moves to the one
that holds its slot, and leaves for those that train on it: each row that a process trains on comes
in once, whatever the number of processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import LostProcess
from saesteer.sae.activations.shuffle_buffer import ShuffleBuffer
from saesteer.sae.runs.processes import Processes


@dataclass
class Sharing:
    """Who reads, and who trains on what."""

    processes: Processes
    """With a group for the thread that reads."""
    row_parts: int
    """How many parts a batch has."""
    latent_parts: int
    """How many processes train on the same part: ranks that follow each other."""
    pass_rows: int
    """Rows of a batch that are one pass of the trainer: each is cut into parts by itself."""
    sent_bytes: int = 0
    """Sent to other processes so far."""

    def part_of(self, batch_rows: int) -> Int[Tensor, " batch"]:
        """The part that each row of a batch belongs to."""
        at = torch.arange(batch_rows)
        first = at // self.pass_rows * self.pass_rows
        rows = (batch_rows - first).clamp(max=self.pass_rows)
        return (at - first) * self.row_parts // rows

    def move(
        self, rows: Float[Tensor, "own width"], source: Int[Tensor, " n"], to: Int[Tensor, " n"]
    ) -> Float[Tensor, "arrived width"]:
        """Move n rows from process `source[i]` to process `to[i]`.

        `rows` are those of this process, in order; so are those that arrive.
        """
        import torch.distributed as dist

        me, world = self.processes.rank, self.processes.world
        leaving, arriving = to[source == me], source[to == me]
        assert len(rows) == len(leaving), "every row is some process's own"
        sent = rows[leaving.argsort(stable=True)].contiguous()
        got = rows.new_empty((len(arriving), rows.shape[1]))
        try:
            dist.all_to_all_single(
                got,
                sent,
                torch.bincount(arriving, minlength=world).tolist(),
                torch.bincount(leaving, minlength=world).tolist(),
                group=self.processes.group,
            )
        except RuntimeError as error:
            raise LostProcess(f"process {me} of {world} lost another one") from error
        away = int((leaving != me).sum())
        self.sent_bytes += away * rows.shape[1] * rows.element_size()
        result = torch.empty_like(got)
        result[arriving.argsort(stable=True)] = got
        return result

    def to_trainers(
        self, rows: Float[Tensor, "own width"], holder: Int[Tensor, " batch"]
    ) -> Float[Tensor, "part width"]:
        """This process's part of a batch whose row i lies in process `holder[i]`."""
        copies = self.latent_parts
        first = self.part_of(len(holder)) * copies
        to = torch.cat([first + copy for copy in range(copies)])
        return self.move(rows.repeat(copies, 1), holder.repeat(copies), to)

    def all_on_first(
        self, rows: Float[Tensor, "own width"], holder: Int[Tensor, " n"]
    ) -> Float[Tensor, "n width"]:
        """On the first process all n rows, on others none."""
        return self.move(rows, holder, torch.zeros_like(holder))

    def everywhere(
        self, rows: Float[Tensor, "own width"], holder: Int[Tensor, " n"]
    ) -> Float[Tensor, "n width"]:
        """All n rows on every process."""
        world = self.processes.world
        to = torch.arange(world).repeat_interleave(len(holder))
        return self.move(rows.repeat(world, 1), holder.repeat(world), to)


class SharedBuffer:
    """`ShuffleBuffer`, held by several processes.

    `put` and `take` return this process's part of each batch. All processes call both with rows
    from the same places of the stream.
    """

    def __init__(
        self,
        capacity: int,
        width: int,
        batch_rows: int,
        dtype: torch.dtype,
        seed: int,
        sharing: Sharing,
    ) -> None:
        self.sharing = sharing
        self.capacity = capacity
        self.batch_rows = batch_rows
        self.filled = 0
        world = sharing.processes.world
        self.rows = torch.empty(-(-capacity // world), width, dtype=dtype)
        """Slots of this process: its row i is slot i * world + rank."""
        self._incoming: list[Tensor] = []
        self._readers = torch.empty(0, dtype=torch.int64)
        self._rng = torch.Generator().manual_seed(seed)

    @property
    def full(self) -> bool:
        """Whether the buffer holds `capacity` rows, so that new rows push out old ones."""
        return self.filled == self.capacity

    def __len__(self) -> int:
        """Rows held by all processes."""
        return self.filled + len(self._readers)

    def put(
        self, rows: Float[Tensor, "own width"], readers: Int[Tensor, " n"]
    ) -> list[Float[Tensor, "part width"]]:
        """Take n rows in, of which process `readers[i]` has read row i; return the batches that
        leave."""
        batches = []
        me = self.sharing.processes.rank
        while len(readers):
            if not self.full:
                taken = min(len(readers), self.capacity - self.filled)
            else:
                taken = min(len(readers), self.batch_rows - len(self._readers))
            here, readers = readers[:taken], readers[taken:]
            own = int((here == me).sum())
            coming, rows = rows[:own].to(self.rows.dtype), rows[own:]
            if not self.full:
                slots = torch.arange(self.filled, self.filled + taken)
                self._store(slots, self.sharing.move(coming, here, self._holder(slots)))
                self.filled += taken
                continue
            self._incoming.append(coming)
            self._readers = torch.cat([self._readers, here])
            if len(self._readers) == self.batch_rows:
                batches.append(self._exchange())
        return batches

    def take(self) -> Float[Tensor, "part width"] | None:
        """This process's part of a random batch of what is held; None when it is empty."""
        assert not len(self._readers), "whole batches come in"
        if not self.filled:
            return None
        count = min(self.batch_rows, self.filled)
        slots = torch.randperm(self.filled, generator=self._rng)[:count]
        leaving = self.sharing.to_trainers(self._own(slots), self._holder(slots))
        rest = self.filled - count
        at_end = torch.ones(count, dtype=torch.bool)
        at_end[slots[slots >= rest] - rest] = False
        gaps, fillers = slots[slots < rest], rest + at_end.nonzero()[:, 0]
        moved = self.sharing.move(self._own(fillers), self._holder(fillers), self._holder(gaps))
        self._store(gaps, moved)
        self.filled = rest
        return leaving

    def first(self, count: int) -> Float[Tensor, "count width"]:
        """The rows of the first slots, on every process."""
        slots = torch.arange(min(count, self.filled))
        return self.sharing.everywhere(self._own(slots), self._holder(slots))

    def _exchange(self) -> Float[Tensor, "part width"]:
        slots = torch.randperm(self.capacity, generator=self._rng)[: self.batch_rows]
        holder = self._holder(slots)
        leaving = self.sharing.to_trainers(self._own(slots), holder)
        self._store(slots, self.sharing.move(torch.cat(self._incoming), self._readers, holder))
        self._incoming, self._readers = [], self._readers[:0]
        return leaving

    def _holder(self, slots: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        return slots % self.sharing.processes.world

    def _own(self, slots: Int[Tensor, " n"]) -> Float[Tensor, "own width"]:
        """Rows of the slots that lie in this process, in their order."""
        own = slots[self._holder(slots) == self.sharing.processes.rank]
        return self.rows[own // self.sharing.processes.world]

    def _store(self, slots: Int[Tensor, " n"], rows: Float[Tensor, "own width"]) -> None:
        own = slots[self._holder(slots) == self.sharing.processes.rank]
        self.rows[own // self.sharing.processes.world] = rows

    def state_dict(self) -> dict[str, Any]:
        """On the first process what `ShuffleBuffer.state_dict` has, on others no rows."""
        slots = torch.arange(self.filled)
        coming = torch.cat([self.rows[:0], *self._incoming])
        return {
            "rows": self.sharing.all_on_first(self._own(slots), self._holder(slots)),
            "incoming": self.sharing.all_on_first(coming, self._readers),
            "rng": self._rng.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a `state_dict` was taken, of any number of processes."""
        rank, world = self.sharing.processes.rank, self.sharing.processes.world
        self.filled = len(state["rows"])
        own = state["rows"][rank::world]
        self.rows[: len(own)] = own
        self._readers = torch.arange(len(state["incoming"])) % world
        self._incoming = [state["incoming"][rank::world].to(self.rows.dtype)]
        self._rng.set_state(state["rng"])


AnyBuffer = ShuffleBuffer | SharedBuffer
