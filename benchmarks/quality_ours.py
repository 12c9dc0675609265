"""Training runs of saesteer for `quality.py`, like those of `quality_rivals.py`.

It is called in the same way, as `python benchmarks/quality_ours.py JOB.json ...`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from our_trainer import make_trainer, placed
from quality_rivals import Export, Step, finish, group_sizes, train
from side_by_side import leave_folder
from torch import Tensor

from saesteer.sae.config import TrainConfig
from saesteer.sae.training.input_scale import InputScale

_SCALE_ROWS = 32_768


def saesteer(job: dict[str, Any], first: Tensor) -> tuple[Step, Export, str]:
    """The steps of `saesteer train`; it measures mean and scale of the first rows itself."""
    sizes = group_sizes(job["d_sae"])
    prefixes = tuple(sum(sizes[: at + 1]) for at in range(len(sizes)))
    steps, batch = job["steps"], job["batch"]
    config = TrainConfig(
        arch=job["arch"],
        d_sae=(job["d_sae"],),
        k=(job["k"],),
        prefixes=prefixes if job["arch"] == "matryoshka" else (),
        tokens=steps * batch,
        batch_tokens=batch,
        buffer_tokens=batch,
        lr=job["lr"],
        init_seed=(job["seed"],),
    )
    sample = torch.load(job["rows"], mmap=True)[:_SCALE_ROWS].float() * job["factor"]
    trainer, step = make_trainer(config, InputScale.of(sample), torch.device("cpu"))

    def export() -> dict[str, Tensor]:
        if trainer.architecture.calibrates:
            trainer.calibrate(placed(sample))
        found = trainer.architecture.canonical(
            trainer.parameters, trainer.read, trainer.write, trainer.buffers
        )
        threshold = found.pop("threshold", torch.zeros(1))[0]
        return {**found, "threshold": threshold, "input_bias": torch.tensor(False)}

    return step, export, f"lr {trainer.peak_lr:.3g}, Adam, AuxK 1/32"


def main(paths: Sequence[str]) -> None:
    leave_folder()
    for path in paths:
        job = json.loads(Path(path).read_text())
        finish(job, train(job, saesteer), "saesteer")


if __name__ == "__main__":
    main(sys.argv[1:])
