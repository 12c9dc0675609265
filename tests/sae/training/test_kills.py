"""A run killed at random instants and resumed ends in the bits of one that was left in peace.

Training from shards and live by one process and by two, and a harvest by two. The default suite
kills twice each, with the same pauses at every run; the slow one twenty times, by a new seed. A
failure names its seed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints.shard_writer import ShardWriter

SUITE = Path(__file__).with_name("kill_suite.py")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills") / "acts"
    writer = ShardWriter(
        folder, layers=[1], sites=["resid_post"], d_model=32, dtype=torch.float32,
        shard_tokens=700, facts={"model": "made-up"},
    )  # fmt: skip
    rows = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    for part in rows.split(256):
        writer.add({(1, "resid_post"): part}, torch.arange(256))
    writer.close()
    return folder


def kill_suite(
    folder: Path, mode: str, source: Path, *options: object, seed: int
) -> dict[str, Any]:
    seed = int(os.environ.get("KILL_SEED", seed))
    done = subprocess.run(
        [sys.executable, "-P", str(SUITE), str(folder), mode, str(source), "--seed", str(seed),
         *map(str, options)],
        capture_output=True, text=True,
        # Forked children must not inherit a pool of threads.
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"KILL_SEED={seed}\n{done.stdout}\n{done.stderr[-3000:]}"
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(report)
    return report


@pytest.mark.parametrize("mode", ["shards", "live", "gloo"])
def test_two_kills(
    mode: str, shards: Path, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    source = shards if mode == "shards" else tiny_model_dir("llama")
    report = kill_suite(tmp_path, mode, source, "--kills", 2, "--share", 0.3, seed=1)
    assert report["kills"] == 2 and report["things_compared"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shards", "live", "gloo", "shards-of-two", "live-of-two"])
def test_twenty_kills(
    mode: str, shards: Path, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    source = shards if mode.startswith("shards") else tiny_model_dir("llama")
    seed = int.from_bytes(os.urandom(3), "big")
    report = kill_suite(tmp_path, mode, source, "--kills", 20, seed=seed)
    assert report["kills"] >= 20
    # Kills fell before the first state, and at many different places after it.
    assert len(set(report["saved_at_kills"])) > 5
