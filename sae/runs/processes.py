"""The processes of a harvest under torchrun: who they are, and the few numbers they exchange."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from jaxtyping import Shaped
from torch import Tensor

from saesteer.checkpoints.errors import UserError

# Loading a model and sampling replies may take hours; a process that dies is noticed at once.
_LONGEST_WAIT = timedelta(hours=12)


@dataclass(frozen=True)
class Processes:
    """This process among `world` of them. With one process every exchange is a copy."""

    rank: int = 0
    world: int = 1
    timeout: int = 600
    """Seconds to wait for the others in an exchange."""

    def gather(self, values: Shaped[Tensor, "..."]) -> list[Shaped[Tensor, "..."]]:
        """The tensors of all processes, which must be of one shape, by rank.

        Raises UserError when another process has ended or does not answer in time.
        """
        if self.world == 1:
            return [values]
        import torch.distributed as dist

        gathered = [torch.empty_like(values) for _ in range(self.world)]
        try:
            dist.all_gather(gathered, values.contiguous())
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
            dist.monitored_barrier(timeout=_LONGEST_WAIT)
        except RuntimeError as error:
            raise self._lost() from error

    def same(self, what: str, value: str) -> None:
        """Raise UserError when the processes differ in `value`; `what` names it in the error."""
        import hashlib

        digest = hashlib.sha256(value.encode()).digest()[:7]
        numbers = self.gather(torch.tensor([int.from_bytes(digest, "big")]))
        if len({int(number) for number in numbers}) > 1:
            raise UserError(f"the processes of torchrun see different {what}: give all the same")

    def _lost(self) -> UserError:
        return UserError(
            f"process {self.rank} of {self.world} lost another one (it ended, or did not answer "
            f"within {self.timeout} s): what is in `out` stays good; find its error above and run "
            "the same command with `resume`"
        )


ALONE = Processes()


def join_processes(timeout: int) -> Processes:
    """The processes that torchrun started together, connected over gloo; alone without torchrun."""
    if not is_one_of_many():
        return ALONE
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    return Processes(dist.get_rank(), dist.get_world_size(), timeout)


def is_first() -> bool:
    """Whether this process reports for all of them: rank 0 of torchrun, or the only one."""
    return not is_one_of_many() or int(os.environ["RANK"]) == 0


def is_one_of_many() -> bool:
    """Whether torchrun started this process together with others."""
    # Schedulers set WORLD_SIZE for purposes of their own; torchrun sets both.
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
