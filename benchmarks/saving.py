"""How long training waits while its state is saved, measured inside the process.

    python benchmarks/saving.py [--tokens N]

Trains one SAE of the demo's size from random activations: with default settings, with a state every
few steps in the background, and with the same states written while training waits. Each run
prints its saves, the share of its time blocked in saving (copying, waiting, and the last state at
the end), and its speed.
"""

import argparse
import os
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from saesteer.checkpoints.disk import folder_bytes
from saesteer.checkpoints.shard_writer import ShardWriter
from saesteer.checkpoints.state_saver import StateSaver
from saesteer.sae import TrainConfig, train

D_MODEL = 576
ROWS = 65_536


class WaitingSaver(StateSaver):
    """Saves as a run without a background thread would."""

    def save(self, tensors: Any, meta: Any, **options: Any) -> None:
        self.save_now(tensors, meta, **options)


def write_activations(folder: Path) -> Path:
    """Write shards of random activations; returns their folder."""
    writer = ShardWriter(
        folder,
        layers=[0],
        sites=["resid_post"],
        d_model=D_MODEL,
        dtype=torch.bfloat16,
        shard_tokens=16_384,
        facts={"model": "random"},
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(0, ROWS, 8192):
        rows = torch.randn(8192, D_MODEL, generator=generator)
        writer.add({(0, "resid_post"): rows}, torch.arange(8192))
    writer.close()
    return folder


def measure(name: str, folder: Path, activations: Path, config: TrainConfig, saver: Any) -> None:
    """Train once with a kind of saver and print its line."""
    from saesteer.sae.training import run as training

    made: list[StateSaver] = []

    def make(*arguments: Any, **options: Any) -> StateSaver:
        made.append(saver(*arguments, **options))
        return made[-1]

    before = training.StateSaver
    training.StateSaver = make  # type: ignore[assignment, misc]
    try:
        started = time.monotonic()
        train(folder, config, activations=activations, device="cpu")
        seconds = time.monotonic() - started
    finally:
        training.StateSaver = before  # type: ignore[misc]
    blocked = made[0].blocked_seconds
    print(
        f"{name:34s} {made[0].saved:5d} {blocked:9.2f} s {100 * blocked / seconds:8.2f} % "
        f"{config.tokens / seconds:12,.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=204_800)
    args = parser.parse_args()
    default = TrainConfig(d_sae=(4608,), tokens=args.tokens)
    often = replace(default, checkpoint_every=10 * default.batch_tokens)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        activations = write_activations(place / "acts")
        train(place / "warm", replace(default, tokens=8192), activations=activations, device="cpu")
        print(
            f"d_model {D_MODEL}, d_sae 4608, k 32, {args.tokens:,} tokens, "
            f"torch {torch.__version__}, threads {torch.get_num_threads()}, "
            f"{platform.machine()}, {os.cpu_count()} cores"
        )
        print(f"{'':34s} saves    blocked    share       tokens/s")
        measure("default settings", place / "default", activations, default, StateSaver)
        measure("a state every 10 steps", place / "often", activations, often, StateSaver)
        measure("the same, training waits", place / "waits", activations, often, WaitingSaver)
        size = folder_bytes(place / "often" / "state") / 1e6
        print(f"states in the folder at the end: {size:.0f} MB")


if __name__ == "__main__":
    main()
