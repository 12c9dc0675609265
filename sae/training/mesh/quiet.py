"""What stands in the place of files and states in processes that write none."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from saesteer.checkpoints.state_saver import StateSaver
from saesteer.sae.training.run_files import RunFiles
from saesteer.sae.training.sae_trainer import SAETrainer, Variant


class NoFiles(RunFiles):
    """Writes nothing: the first process does."""

    def logs(self) -> list[Path]:
        return []

    def cut_logs(self, sizes: Sequence[int]) -> None:
        pass

    def make_folders(self) -> None:
        pass

    def begin(self) -> None:
        pass

    def reopen(self) -> None:
        pass

    def log(self, variant: Variant, row: dict[str, Any]) -> None:
        pass

    def finish(
        self,
        trainers: Sequence[SAETrainer],
        hashes: Sequence[str],
        last: Sequence[dict[str, Any]],
        run: dict[str, Any],
    ) -> list[dict[str, Any]]:
        return []


class NoStates(StateSaver):
    """Saves nothing: the first process does."""

    def ready(self) -> bool:
        return True

    def save(
        self,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        *,
        score: float | None = None,
        first: Sequence[Path] = (),
    ) -> None:
        pass

    save_now = save
