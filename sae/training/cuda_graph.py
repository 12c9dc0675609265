"""One training step as a CUDA graph: many small launches become one.

A step on a narrow SAE is a few dozen kernels of some tens of microseconds; launching them one by
one from Python takes longer than running them. Everything a step changes is changed in place and
everything the host decides stands in tensors, so that the recorded step can be replayed. It is
recorded again when its shapes change: another batch size, or another length of the dead list.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from saesteer.sae.training.sae_trainer import SAETrainer
    from saesteer.sae.training.topk import TopKPass

# Runs before recording, in which libraries choose their algorithms and Triton compiles.
_WARM_UPS = 3


class GraphedStep:
    """Records `forward` and `apply` of a trainer, and replays them on new rows."""

    def __init__(self, trainer: "SAETrainer") -> None:
        self.trainer = trainer
        self._key: object = None
        self._rows = torch.empty(0)
        self._passes: list[TopKPass] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def take(self, rows: Float[Tensor, "batch d_model"]) -> "list[TopKPass]":
        """Set the rows of the next `replay`; the passes returned hold its values after it."""
        key = (rows.shape, rows.dtype, self.trainer.dead_list_length())
        if key != self._key:
            self._record(rows)
            self._key = key
        self._rows.copy_(rows, non_blocking=True)
        return self._passes

    def replay(self) -> None:
        """Take the recorded step."""
        assert self._graph is not None, "replay follows take"
        self._graph.replay()

    def _record(self, rows: Tensor) -> None:
        trainer = self.trainer
        before = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
        self._rows = rows.clone()
        side = torch.cuda.Stream(trainer.device)
        side.wait_stream(torch.cuda.current_stream(trainer.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                trainer.apply(trainer.forward(self._rows))
        torch.cuda.current_stream(trainer.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # The harvest's thread goes on launching meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._passes = trainer.forward(self._rows)
            trainer.apply(self._passes)
        # Warming up was training: take it back.
        trainer.load_state_dict(before)
