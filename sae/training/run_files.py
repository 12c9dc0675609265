"""The logs and records of each SAE that a training run writes next to its state."""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.files import (
    append_jsonl,
    plain,
    read_json,
    write_json,
    write_text,
    writing,
)
from saesteer.checkpoints.provenance import git_revision, machine, versions
from saesteer.sae.config import TrainConfig
from saesteer.sae.reports.curves import SECONDS_BETWEEN_PAGES, read_curves, training_page
from saesteer.sae.runs.trackers import SafeTracker
from saesteer.sae.training.sae_trainer import SAETrainer, Variant

HELD_OUT = ("fvu_heldout", "l0_heldout")
"""What is said of an SAE besides its settings, where there were rows to measure it on."""


class RunFiles:
    """The folders of a run's SAEs: the run's own for one, folders in it for several."""

    def __init__(
        self,
        folder: Path,
        variants: Sequence[Variant],
        config: TrainConfig,
        facts: dict[str, Any],
    ) -> None:
        self.folder = folder
        self.variants = variants
        self.config = config
        self.facts = facts
        self._page_written = time.monotonic()
        self.tracker: SafeTracker | None = None
        """Where the log goes besides the folder."""

    def place_of(self, variant: Variant) -> Path:
        """The folder of an SAE."""
        return self.folder if len(self.variants) == 1 else self.folder / variant.folder

    def metrics_of(self, variant: Variant) -> Path:
        """The log of an SAE; created if missing."""
        path = self.place_of(variant) / "metrics.jsonl"
        path.touch()
        return path

    def logs(self) -> list[Path]:
        """The logs of all SAEs."""
        return [self.metrics_of(variant) for variant in self.variants]

    def cut_logs(self, sizes: Sequence[int]) -> None:
        """Take lines back that were written after a state: they will be written again."""
        for path, size in zip(self.logs(), sizes, strict=True):
            with path.open("r+b") as file:
                file.truncate(min(size, file.seek(0, os.SEEK_END)))

    def make_folders(self) -> None:
        """Create the folder of every SAE. Raises UserError where that fails."""
        for variant in self.variants:
            with writing(self.place_of(variant)):
                self.place_of(variant).mkdir(exist_ok=True)

    def begin(self) -> None:
        """Write empty logs and first records.

        The record shows that saesteer made the folder, so that `force` may replace a run that was
        stopped before its end.
        """
        for variant in self.variants:
            self.metrics_of(variant).write_text("")
            first_record = {
                "schema_version": 1,
                "verb": "train",
                "complete": False,
                "config": asdict(self.config),
                "model": self.facts["model"],
                "data": self.facts["data"],
            }
            write_json(self.place_of(variant) / "run.json", first_record)

    def reopen(self) -> None:
        """Records of a run that goes on do not call it complete any more."""
        for variant in self.variants:
            path = self.place_of(variant) / "run.json"
            if path.exists():
                write_json(path, {**read_json(path), "complete": False})

    def log(self, variant: Variant, row: dict[str, Any]) -> None:
        """Add a line to the log of an SAE."""
        append_jsonl(self.place_of(variant) / "metrics.jsonl", row)
        if self.tracker is not None:
            prefix = f"{variant.folder}/" if len(self.variants) > 1 else ""
            self.tracker.log(row, int(row["step"]), prefix)
        if time.monotonic() - self._page_written > SECONDS_BETWEEN_PAGES:
            self.write_page()

    def write_page(self) -> None:
        """Write the curves as `training.html`. A page that cannot be written stops no training."""
        with contextlib.suppress(UserError):
            page = training_page(read_curves([self.folder]), f"Training: {self.folder.name}")
            write_text(self.folder / "training.html", page)
        self._page_written = time.monotonic()

    def finish(
        self,
        trainers: Sequence[SAETrainer],
        hashes: Sequence[str],
        last: Sequence[dict[str, Any]],
        run: dict[str, Any],
    ) -> list[dict[str, Any]]:
        """Write the final `run.json` of each SAE; returns them, with their folders.

        Args:
            hashes: SHA-256 of the weights of each SAE.
            last: the last log line of each SAE.
            run: facts that all SAEs share: rows left out, seconds.
        """
        results = []
        for trainer, row, sha256 in zip(trainers, last, hashes, strict=True):
            folder = self.place_of(trainer.variant)
            layer, site = trainer.variant.reads[0]
            record = {
                "schema_version": 1,
                "verb": "train",
                "complete": True,
                "sae": {
                    "layer": layer,
                    "site": site,
                    "d_model": trainer.d_in,
                    "d_sae": trainer.variant.d_sae,
                    **_other_places(trainer.variant),
                    **trainer.architecture.settings,
                    "init_seed": trainer.variant.init_seed,
                    "peak_lr": trainer.peak_lr,
                    "sha256": sha256,
                    **{name: row[name] for name in HELD_OUT if name in row},
                    **_threshold(trainer),
                },
                "config": plain(asdict(self.config)),
                "recipe": self.facts["recipe"],
                "model": self.facts["model"],
                "data": self.facts["data"],
                "final": {name: value for name, value in row.items() if name != "warnings"},
                **({"warnings": row["warnings"]} if "warnings" in row else {}),
                **run,
                "versions": versions(),
                "git_revision": git_revision(),
                "machine": machine(),
            }
            write_json(folder / "run.json", record)
            results.append({"folder": str(folder), **record})
        self.write_page()
        return results


def _other_places(variant: Variant) -> dict[str, Any]:
    """Of a transcoder what it writes, of a crosscoder all that it reads."""
    if variant.writes != variant.reads:
        to_layer, to_site = variant.writes[0]
        return {"to_layer": to_layer, "to_site": to_site}
    if len(variant.reads) > 1:
        return {"places": [list(place) for place in variant.reads]}
    return {}


def _threshold(trainer: SAETrainer) -> dict[str, float]:
    """The one threshold of an SAE that infers by one, in the units of its file."""
    if "threshold" not in trainer.architecture.canonical_buffers:
        return {}
    return {"threshold": float(trainer.buffers["threshold"][0]) / trainer.write[0].factor}
