"""Several processes that train together: the same steps, data and files as one, and one end.

The default suite runs two processes; `make test-scale` four, too, and kills.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints.run_state import load_state

from ..training_runs import write_shards

SUITE = Path(__file__).with_name("mesh_suite.py")

# Sums in another order, in float64, through Adam's division by a root.
ROUNDING = 1e-11
# In float32 an FVU's sums alone differ in the seventh digit.
ROUNDING_OF_FVU = 1e-4


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("mesh") / "acts")


def suite(*words: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-P", str(SUITE), *map(str, words)],
        capture_output=True,
        text=True,
        # Forked children must not inherit a pool of threads.
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check_steps(found: dict[str, float], meshes: int) -> None:
    assert len(found) == 13 * meshes
    assert {name: value for name, value in found.items() if not value < ROUNDING} == {}


def test_two_processes_take_the_steps_of_one() -> None:
    """Every architecture, with rows shared out and with latents shared out, in float64."""
    check_steps(suite("steps"), 2)


def check_run(found: dict[str, Any], data: int, shards: int) -> None:
    mesh = found["mesh"]
    assert (mesh["data"], mesh["latent_shards"]) == (data, shards)
    assert mesh["bytes_sent_per_step"] > 0
    assert found["same bytes when resumed"]
    for run in (found, found["on one process"]):
        assert run["same data"] and run["same steps"] and run["same excluded"]
        one, many = run["fvu"]
        assert many == pytest.approx(one, rel=ROUNDING_OF_FVU)
        # Rounding may move a latent of the held-out rows over the threshold, one of 400.
        assert run["heldout"][1] == pytest.approx(run["heldout"][0], rel=0.01)


def test_a_run_of_two_has_the_data_of_one_and_goes_on_with_one(shards: Path) -> None:
    check_run(suite("runs", "--source", shards)["2 processes, 1 shards"], 2, 1)


@pytest.mark.slow
def test_live(tiny_model_dir: Callable[..., Path]) -> None:
    found = suite("live", "--model", tiny_model_dir("llama"))
    one, two = found["steps"]
    assert one == two
    assert found["fvu"][1] == pytest.approx(found["fvu"][0], rel=ROUNDING_OF_FVU)
    assert found["rows"][0] == found["rows"][1]


@pytest.mark.slow
def test_four_processes_take_the_steps_of_one() -> None:
    check_steps(suite("steps", "--more"), 5)


@pytest.mark.slow
def test_runs_of_two_and_four(shards: Path) -> None:
    found = suite("runs", "--source", shards, "--more")
    assert len(found) == 5
    for label, run in found.items():
        world, parts = int(label.split()[0]), int(label.split()[2])
        check_run(run, world // parts, parts)


@pytest.fixture(scope="module")
def ends(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    make: Callable[..., Path] = request.getfixturevalue("tiny_model_dir")
    acts = write_shards(tmp_path_factory.mktemp("ends") / "acts")
    return suite("ends", "--source", acts, "--model", make("llama"))


SILENT = "SaidElsewhere"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "names", "words"),
    [
        ("killed", ["LostProcess"], "process 1 of 2 ended without a word"),
        ("first killed", ["LostProcess"], "process 0 of 2 ended without a word"),
        ("not a number", ["NonFiniteError", SILENT], "is not finite at step 40 in process 1"),
        ("full disk", ["UserError", SILENT], "process 0 of 2: cannot write the state: no space"),
        ("unreadable", ["UserError", SILENT], "process 1 of 2: shard 2 is damaged"),
        ("stopped", ["Interrupted", SILENT], "stopped at step 4"),
        ("not to be shared", ["UsageError", SILENT], "`d_sae` must be a multiple of the 2 proc"),
        ("text ends", ["UserError", SILENT], "the corpus ended after"),
        ("in use", ["UserError", SILENT], "is being written by"),
    ],
)
def test_all_end_and_one_says_why(
    how: str, names: list[str], words: str, ends: dict[str, Any]
) -> None:
    said = [one for one in ends[how]["said"] if one[0] != "NoneType"]
    assert sorted(kind for kind, _ in said) == sorted(names)
    (message,) = [text for kind, text in said if kind != SILENT]
    assert words in message and "\n" not in message
    # What was held is given back: no lock and no half-written file is left.
    assert not ends[how].get("leftovers") or "killed" in how


@pytest.mark.slow
@pytest.mark.parametrize("how", ["not a number", "stopped", "text ends"])
def test_what_all_know_of_leaves_a_state(how: str, ends: dict[str, Any]) -> None:
    """As in one process: the step before the one that failed."""
    assert ends[how]["step"] >= (40 if how != "text ends" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full disk", "not to be shared", "in use"])
def test_nothing_half_written(how: str, ends: dict[str, Any]) -> None:
    assert ends[how].get("step", 0) == 0


# --- torchrun itself ---


def start(out: Path, shards: Path, restarts: int) -> "subprocess.Popen[str]":
    """`train` by two processes that torchrun starts, and starts again."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--max-restarts", str(restarts), "-m", "saesteer.cli", "train"]
    flags = ["--activations", shards, "--layer", 1, "--d-sae", 48, "--k", 4, "--tokens", "64k"]
    flags += ["--batch-tokens", 32, "--buffer-tokens", 512, "--checkpoint-every", 64]
    return subprocess.Popen(
        [sys.executable, "-P", *launcher, *map(str, flags), "--resume", "-o", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(words[1]) == pid and words[0] != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


@pytest.mark.slow
def test_torchrun_restarts_what_was_killed(shards: Path, tmp_path: Path) -> None:
    """One of two processes is killed ten times at random instants: the bytes of a quiet run."""
    quiet = start(tmp_path / "quiet", shards, 0)
    began = time.monotonic()
    _, told = quiet.communicate(timeout=1200)
    seconds = time.monotonic() - began
    assert quiet.returncode == 0, told[-2000:]
    kills = int(os.environ.get("KILLS", 10))
    seed = int(os.environ.get("KILL_SEED", int.from_bytes(os.urandom(3), "big")))
    rng = random.Random(seed)
    run = start(tmp_path / "killed", shards, kills)
    known: list[int] = []
    for _ in range(kills):
        while len(workers := children(run.pid)) < 2 or set(workers) & set(known):
            assert run.poll() is None, f"seed {seed}: {run.communicate()[1][-2000:]}"
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.8 * seconds))
        if run.poll() is not None:  # too late: it has ended
            break
        known = workers
        os.kill(rng.choice(workers), signal.SIGKILL)
    _, told = run.communicate(timeout=1200)
    assert run.returncode == 0, f"seed {seed}: {told[-2000:]}"
    assert "ended without a word" in told
    for name in ("sae_weights.safetensors", "cfg.json"):
        one, other = ((tmp_path / which / name).read_bytes() for which in ("quiet", "killed"))
        assert one == other, f"seed {seed}: {name}"
    states = [load_state(tmp_path / which)[0] for which in ("quiet", "killed")]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0]), f"seed {seed}"


@pytest.mark.slow
def test_ctrl_c_on_the_launcher(shards: Path, tmp_path: Path) -> None:
    run = start(tmp_path / "stopped", shards, 0)
    while not (tmp_path / "stopped" / "state" / "latest.json").exists():
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, told = run.communicate(timeout=120)
    (line,) = [one for one in told.splitlines() if one.startswith("error:")]
    assert "stopped at step" in line and "--resume" in line
    assert load_state(tmp_path / "stopped")[1]["step"] > 0
