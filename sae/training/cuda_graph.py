"""One training step as a CUDA graph: many small launches become one.

A step on a narrow SAE is a few dozen kernels of some tens of microseconds; launching them one by
one from Python takes longer than running them. A step changes everything in place, and what the
host decides is in tensors, so that the recorded step can be replayed. It is
recorded again when its shapes change: another batch size, or another length of the dead list.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from saesteer.checkpoints.places import Place
from saesteer.sae.training.architecture import Pass

# Steps before recording, in which libraries choose their algorithms and Triton compiles.
_WARM_UPS = 3


@runtime_checkable
class Recordable(Protocol):
    """What a trainer must offer for its steps to be recorded; see `SAETrainer`."""

    device: torch.device

    def losses(self, rows: Mapping[Place, Tensor]) -> list[Pass]: ...

    def apply(self, passes: list[Pass]) -> None: ...

    def shape_key(self) -> object: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class GraphedStep:
    """Records `losses` and `apply` of a trainer, and replays them on new rows."""

    def __init__(self, trainer: Recordable) -> None:
        self.trainer = trainer
        self._key: object = None
        self._rows: dict[Place, Tensor] = {}
        self._passes: list[Pass] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def take(self, rows: Mapping[Place, Tensor]) -> list[Pass]:
        """Set the rows of the next `replay`; the passes returned hold its values after it."""
        shapes = tuple((place, part.shape, part.dtype) for place, part in rows.items())
        key = (shapes, self.trainer.shape_key())
        if key != self._key:
            self._record(rows)
            self._key = key
        for place, part in rows.items():
            self._rows[place].copy_(part, non_blocking=True)
        return self._passes

    def replay(self) -> None:
        """Take the recorded step."""
        assert self._graph is not None, "replay follows take"
        self._graph.replay()

    def _record(self, rows: Mapping[Place, Tensor]) -> None:
        trainer = self.trainer
        before = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
        self._rows = {place: part.clone() for place, part in rows.items()}
        side = torch.cuda.Stream(trainer.device)
        side.wait_stream(torch.cuda.current_stream(trainer.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                trainer.apply(trainer.losses(self._rows))
        torch.cuda.current_stream(trainer.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # The thread that harvests launches its own kernels during the recording.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._passes = trainer.losses(self._rows)
            trainer.apply(self._passes)
        # The warm-up steps have trained: restore the state before them.
        trainer.load_state_dict(before)
