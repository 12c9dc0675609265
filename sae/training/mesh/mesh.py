"""The processes of a training run as a rectangle: rows of a batch by latents.

The rectangle and its groups are torch's (`init_device_mesh`), and so are the exchanges: gloo on
CPUs, nccl between GPUs. Ranks count along the latents first, so that a shard group, whose
exchanges wait for each other within a step, lies within a machine.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from saesteer.checkpoints.errors import LostProcess
from saesteer.sae.runs.processes import Processes
from saesteer.sae.training.mesh.across import Across

# From torch 2.13 on the calls have other names.
_reduce_scatter: Callable[..., Any] = getattr(
    dist, "reduce_scatter_single", dist.reduce_scatter_tensor
)
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Mesh(Across):
    """This process in the rectangle, and its exchanges. `None` stands for a run of one process.

    All processes make it, and all make every exchange, in the same order.
    """

    def __init__(self, processes: Processes, latent_parts: int, device: torch.device) -> None:
        self.processes = processes
        """Exchanges of small numbers between hosts, by the thread that trains."""
        self.reading = processes.apart()
        """The same for the thread that reads."""
        self.latent_parts = latent_parts
        self.row_parts = processes.world // latent_parts
        self.row_part, self.latent_part = divmod(processes.rank, latent_parts)
        shape = (self.row_parts, latent_parts)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "latents"))
        self.device = device
        self._rows, self._latents = mesh.get_group("data"), mesh.get_group("latents")
        self.sent_bytes = 0
        """Sent to other processes so far in exchanges of this object, by the formulas of ring
        algorithms, without the few numbers that hosts exchange."""

    @property
    def first(self) -> bool:
        """Whether this process writes files for all."""
        return self.processes.first

    @property
    def shape(self) -> dict[str, int]:
        """For records: how many processes share rows out, and latents."""
        return {"data": self.row_parts, "latent_shards": self.latent_parts}

    # --- sums over parts of a batch ---

    def rows(self, values: Tensor) -> Tensor:
        return self._sum(values, self._rows, self.row_parts)

    def latents(self, values: Tensor) -> Tensor:
        return self._sum(values, self._latents, self.latent_parts)

    def all(self, values: Tensor) -> Tensor:
        return self._sum(values, None, self.processes.world)

    def least(self, values: Tensor) -> Tensor:
        made = values.clone()
        self._do(lambda: dist.all_reduce(made, op=dist.ReduceOp.MIN))
        return made

    def of_latent_parts(self, values: Tensor) -> list[Tensor]:
        return self._gather(values, self._latents, self.latent_parts)

    def of_all(self, values: Tensor) -> list[Tensor]:
        return self._gather(values, None, self.processes.world)

    def _sum(self, values: Tensor, group: Any, size: int) -> Tensor:
        if size == 1:
            return values
        made = values.contiguous().clone()
        self._do(lambda: dist.all_reduce(made, group=group))
        self.sent_bytes += 2 * (size - 1) * _bytes(made) // size
        return made

    def _gather(self, values: Tensor, group: Any, size: int) -> list[Tensor]:
        if size == 1:
            return [values]
        values = values.contiguous()
        parts = [torch.empty_like(values) for _ in range(size)]
        self._do(lambda: dist.all_gather(parts, values, group=group))
        self.sent_bytes += (size - 1) * _bytes(values)
        return parts

    # --- rows of parameters, shared out among the processes that have the same latents ---

    def own_rows(self, count: int) -> slice:
        """Which of `count` rows of a parameter this process moves."""
        size = count // self.row_parts
        return slice(self.row_part * size, (self.row_part + 1) * size)

    def scatter_sums(self, values: Tensor) -> Tensor:
        """The sums over the processes of a column, of the rows that this one moves."""
        if self.row_parts == 1:
            return values
        values = values.contiguous()
        made = values.new_empty((len(values) // self.row_parts, *values.shape[1:]))
        self.sent_bytes += (self.row_parts - 1) * _bytes(made)
        if values.is_cuda:
            self._do(lambda: _reduce_scatter(made, values, group=self._rows))
            return made
        # gloo sums everything everywhere, which sends twice as much; sums in the order of ranks.
        parts = torch.empty_like(values)
        self._do(lambda: dist.all_to_all_single(parts, values, group=self._rows))
        pieces = parts.unflatten(0, (self.row_parts, len(made)))
        torch.sum(pieces, dim=0, out=made)
        return made

    def gather_rows(self, whole: Tensor, own: Tensor) -> None:
        """Fill `whole` with the rows that each process of a column has moved."""
        if self.row_parts == 1:
            return
        own = own.contiguous().clone()  # it may be a part of `whole`
        self._do(lambda: _all_gather(whole, own, group=self._rows))
        self.sent_bytes += (self.row_parts - 1) * _bytes(own)

    # --- whole tensors, for files ---

    def on_first(self, own: Tensor, *, by_rows: bool, by_latents: bool) -> Tensor | None:
        """On the first process, the rows of all in order, on the CPU; None on others.

        `own` are those of this process: of its part of the latents (`by_latents`), and in it of its
        part of the rows (`by_rows`). What is in neither is the same everywhere.
        """
        world = self.processes.world
        if not (by_rows and self.row_parts > 1) and not (by_latents and self.latent_parts > 1):
            return own.detach().to("cpu", copy=True) if self.first else None
        own = own.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(world)] if self.first else None
        self._do(lambda: dist.gather(own, parts, dst=0))
        if parts is None:
            return None
        rows = range(self.row_parts) if by_rows else (0,)
        latents = range(self.latent_parts) if by_latents else (0,)
        return torch.cat(
            [parts[row * self.latent_parts + part].cpu() for part in latents for row in rows]
        )

    # --- agreement ---

    def flags(self, *own: bool) -> list[list[bool]]:
        """For each flag what every process says, by rank."""
        said = self.processes.gather(torch.tensor(own, dtype=torch.uint8))
        return [[bool(one) for one in column] for column in torch.stack(said, dim=1)]

    def any(self, own: bool) -> bool:
        """Whether any process says so."""
        return any(self.flags(own)[0])

    def _do(self, exchange: Callable[[], Any]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise LostProcess(
                f"process {self.processes.rank} of {self.processes.world} lost another one"
            ) from error


def _bytes(values: Tensor) -> int:
    return values.numel() * values.element_size()
