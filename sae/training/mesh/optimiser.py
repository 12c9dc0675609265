"""Adam shared out: each process moves the rows that are its own, and keeps moments of them alone.

Processes that have the same latents add their gradients up, each for its own rows; when they have
moved them, the rows are gathered again. Where products are in bfloat16, so are the matrices that
are gathered, and float32 weights exist of own rows only. Parameters without a row for each latent
are few numbers: everyone moves all of them, along the same sum.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.sae.config import TrainConfig
from saesteer.sae.training.architecture import Architecture, Parameters, Pass
from saesteer.sae.training.mesh.mesh import Mesh
from saesteer.sae.training.optimiser import Optimiser


class SharedOptimiser(Optimiser):
    """The optimiser of one process among several.

    `parameters` are those that this process moves; `whole` has all the rows of its latents.
    """

    def __init__(
        self,
        architecture: Architecture,
        parameters: Parameters,
        config: TrainConfig,
        device: torch.device,
        mesh: Mesh,
    ) -> None:
        """`parameters`: all rows of this process's latents; they are taken over."""
        self.mesh = mesh
        self._whole = dict(parameters)
        shared = architecture.of_no_latent
        moved = {
            name: p if name in shared else p[mesh.own_rows(len(p))]
            for name, p in parameters.items()
        }
        super().__init__(architecture, moved, config, device)

    def _make_copies(self) -> Parameters:
        copies = super()._make_copies()
        for name in copies:
            # The float32 rows of others are not kept.
            self.parameters[name] = self.parameters[name].clone()
            self._whole[name] = self._whole[name].bfloat16()
            copies[name] = self._own(name, self._whole[name])
        return copies

    def _own(self, name: str, rows: Tensor) -> Tensor:
        """The rows that this process moves, of all rows of its latents."""
        if name in self.architecture.of_no_latent:
            return rows
        return rows[self.mesh.own_rows(len(rows))]

    @property
    def whole(self) -> Parameters:
        return self._whole

    @property
    def in_products(self) -> Parameters:
        return self._whole

    def _row_by_row(self, passes: list[Pass]) -> bool:
        return self.mesh.row_parts == 1 and super()._row_by_row(passes)

    def move(self, passes: list[Pass]) -> Int[Tensor, " d_sae"]:
        counts = super().move(passes)
        self._gather()
        return counts

    def _gather(self) -> None:
        """Bring all rows of this process's latents up to date."""
        for name, moved in self.parameters.items():
            if name not in self.architecture.of_no_latent:
                self.mesh.gather_rows(self._whole[name], self.copies.get(name, moved))

    def _of_all(
        self, grads: dict[str, Tensor], counts: Tensor, loss: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        mesh = self.mesh
        summed = {}
        for name in list(grads):
            grad = grads.pop(name)  # one at a time: they are large
            shared = name in self.architecture.of_no_latent
            summed[name] = mesh.rows(grad) if shared else mesh.scatter_sums(grad)
        return summed, mesh.rows(counts), mesh.all(loss)

    def _norm(self, grads: dict[str, Tensor]) -> Float[Tensor, ""]:
        squares = torch.stack([torch.linalg.vector_norm(g).square() for g in grads.values()])
        # What everyone has counts once.
        once = [name in self.architecture.of_no_latent and not self.mesh.first for name in grads]
        kept = squares.masked_fill(torch.tensor(once, device=squares.device), 0)
        return self.mesh.all(kept.sum()).sqrt()

    def gathered(self) -> dict[str, Tensor]:
        """The state as one process has it, on the first process; nothing on others."""
        return {
            name: whole
            for name, tensor in self.state_dict().items()
            if (whole := self._on_first(name, tensor)) is not None
        }

    def gathered_parameters(self) -> Parameters:
        """The parameters as one process has them, on the first process; nothing on others."""
        return {
            name: whole
            for name, tensor in self.parameters.items()
            if (whole := self._on_first(name, tensor)) is not None
        }

    def _on_first(self, name: str, tensor: Tensor) -> Tensor | None:
        by = name.rpartition(".")[2] not in self.architecture.of_no_latent
        return self.mesh.on_first(tensor, by_rows=by, by_latents=by)

    def in_float32(self) -> Parameters:
        found = {}
        for name, moved in self.parameters.items():
            found[name] = self._whole[name]
            if name in self.copies:
                if name in self.architecture.of_no_latent:
                    found[name] = moved
                else:
                    found[name] = moved.new_empty(self._whole[name].shape)
                    self.mesh.gather_rows(found[name], moved)
                    if self.mesh.row_parts == 1:
                        found[name] = moved
        return found

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take this process's part of a whole state."""
        own = self.mesh.own_latents
        for name, tensor in self.state_dict().items():
            kind = name.rpartition(".")[2]
            saved = state[name]
            if kind not in self.architecture.of_no_latent:
                saved = self._own(kind, saved[own(len(saved))])
            tensor.copy_(saved)
        self.refresh_copies()
        self._gather()

    def set_parameter(self, name: str, values: Tensor) -> None:
        if name not in self.architecture.of_no_latent:
            values = self._own(name, values[self.mesh.own_latents(len(values))])
        super().set_parameter(name, values)
        self._gather()
