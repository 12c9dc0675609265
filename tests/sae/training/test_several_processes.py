"""Several processes that train together: the same steps, data and files as one, and one end.

The default suite runs two processes; `make test-scale` four, too, and kills.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
