"""A run that an earlier version stopped goes on with today's code and ends in the same SAEs."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saesteer.checkpoints.run_state import load_state
from saesteer.sae.verbs.train import train

from ..training_runs import CONFIG, metrics_of, whole_numbers, write_shards

OLD = Path(__file__).with_name("old_state")
CONFIG_THEN = replace(CONFIG, buffer_tokens=256)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the old run, resumed."""
    folder = tmp_path_factory.mktemp("old")
    shards = write_shards(folder / "shards", shard_tokens=256, make_rows=whole_numbers)
    shutil.copytree(OLD / "run", folder / "run")
    assert load_state(folder / "run")[1]["step"] == 16
    train(folder / "run", CONFIG_THEN, activations=shards, device="cpu", resume=True)
    assert load_state(folder / "run")[1]["step"] == 32
    return folder / "run"


@pytest.mark.parametrize("layer", [1, 5])
def test_the_run_ends_as_it_did_then(layer: int, finished: Path) -> None:
    found = load_file(finished / f"layer-{layer}_dsae-48_k-4_seed-0" / "sae_weights.safetensors")
    expected = load_file(OLD / "final" / f"layer-{layer}.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # CPUs differ in the last bits of a sum. Without numba the largest difference is 1e-7 of the
        # largest weight; a few hundred times that is still far below one step's change.
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_log_goes_on_where_it_stopped(finished: Path) -> None:
    for run in sorted(OLD.glob("run/layer-*")):
        before, after = metrics_of(run), metrics_of(finished / run.name)
        assert after[: len(before)] == before and before[-1]["step"] == 16
        assert [row["step"] for row in after] == list(range(1, 33))
