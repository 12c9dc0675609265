"""The processes of one run under torchrun: who they are, and the few numbers they exchange."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from saesteer.checkpoints.errors import LostProcess, SaidElsewhere, UserError, reason_of

# Loading a model and sampling replies may take hours; a process that dies is noticed at once.
_LONGEST_WAIT = timedelta(hours=12)
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Processes:
    """This process among `world` of them. With one process every exchange is a copy."""

    rank: int = 0
    world: int = 1
    timeout: int = 600
    """Seconds to wait for the others in an exchange."""
    group: Any = field(default=None, repr=False, compare=False)
    """Of `torch.distributed`, over gloo; threads that exchange at the same time need one each."""
    store: Any = field(default=None, repr=False, compare=False)
    """Where processes leave a word for each other; see `saesteer.sae.runs.endings`."""

    @property
    def first(self) -> bool:
        """Whether this process writes and reports for all of them."""
        return self.rank == 0

    def apart(self) -> "Processes":
        """The same processes with a group of their own, for another thread. All call it."""
        if self.world == 1:
            return self
        import torch.distributed as dist

        # torch's annotations leave `timeout` untyped in some versions.
        made: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
        return replace(self, group=made)

    def gather(self, values: Shaped[Tensor, "..."]) -> list[Shaped[Tensor, "..."]]:
        """The tensors of all processes, which must be of one shape, by rank.

        Raises UserError when another process has ended or does not answer in time.
        """
        if self.world == 1:
            return [values]
        import torch.distributed as dist

        gathered = [torch.empty_like(values) for _ in range(self.world)]
        try:
            dist.all_gather(gathered, values.contiguous(), group=self.group)
        except RuntimeError as error:
            raise self._lost() from error
        return gathered

    def interleave(
        self, own: Shaped[Tensor, " rows"], size: int, fill: int | float
    ) -> Shaped[Tensor, " all_rows"]:
        """The values of all processes' rows in global order: rank r has rows r, r + world, ...

        `size` is the most that a process can have; what is missing at the end is `fill`.
        """
        if self.world == 1:
            return own
        padded = own.new_full((size,), fill)
        padded[: len(own)] = own
        return torch.stack(self.gather(padded), dim=1).flatten()

    def wait_for_first(self) -> None:
        """Wait until every process has called this, however long the first one works before."""
        if self.world == 1:
            return
        import torch.distributed as dist

        try:
            dist.monitored_barrier(group=self.group, timeout=_LONGEST_WAIT)
        except RuntimeError as error:
            raise self._lost() from error

    def same(self, what: str, value: str) -> None:
        """Raise UserError when the processes differ in `value`; `what` names it in the error."""
        import hashlib

        digest = hashlib.sha256(value.encode()).digest()[:7]
        numbers = self.gather(torch.tensor([int.from_bytes(digest, "big")]))
        if len({int(number) for number in numbers}) > 1:
            raise UserError(f"the processes of torchrun see different {what}: give all the same")

    def together(self, work: Callable[[], _Made]) -> _Made:
        """What `work` makes, once it has been done by all processes.

        Where it fails in some, those raise what it failed with, and all others SaidElsewhere: so
        that all leave at the same place.
        """
        if self.world == 1:
            return work()
        made: Any = None
        failure: Exception | None = None
        try:
            made = work()
        except Exception as error:
            failure = error
        failed = [bool(flag) for flag in self.gather(torch.tensor([failure is not None]))]
        if failure is not None:
            raise failure
        if any(failed):
            raise SaidElsewhere(f"process {failed.index(True)} of {self.world} failed")
        result: _Made = made
        return result

    def _lost(self) -> UserError:
        return LostProcess(
            f"process {self.rank} of {self.world} lost another one (it ended, or did not answer "
            f"within {self.timeout} s): what is in `out` stays good; find its error above and run "
            "the same command with `resume`"
        )


ALONE = Processes()


def join_processes(timeout: int) -> Processes:
    """The processes that torchrun started together, connected over gloo (and over nccl between
    GPUs); alone without torchrun."""
    if not is_one_of_many():
        return ALONE
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    waits = timedelta(seconds=timeout)
    if not dist.is_initialized():
        # gloo for the hosts' tensors and nccl for those of GPUs, which each process has one of.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        try:
            store, rank, world = next(iter(rendezvous("env://", timeout=waits)))
            _STORES.append(store)
            dist.init_process_group(
                backend,
                store=PrefixStore("saesteer", store),
                rank=rank,
                world_size=world,
                timeout=waits,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"the processes of torchrun did not find each other within {timeout} s "
                f"({reason_of(error)}): are all started, and does MASTER_ADDR name a machine that "
                "all reach?"
            ) from error
    store = None
    if _STORES:
        # Runs of one process come one after the other: each has words of its own.
        _RUNS.append(len(_RUNS))
        store = PrefixStore(f"run-{len(_RUNS)}", _STORES[0])
    return Processes(dist.get_rank(), dist.get_world_size(), timeout, store=store).apart()


_STORES: list[Any] = []
_RUNS: list[int] = []


def is_first() -> bool:
    """Whether this process reports for all of them: rank 0 of torchrun, or the only one."""
    return not is_one_of_many() or int(os.environ["RANK"]) == 0


def started_processes() -> int:
    """How many processes torchrun started together; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if is_one_of_many() else 1


def is_one_of_many() -> bool:
    """Whether torchrun started this process together with others."""
    # Schedulers set WORLD_SIZE for purposes of their own; torchrun sets both.
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
