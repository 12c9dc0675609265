"""`saesteer circuit`: flags, files and one-line errors."""

import json
from pathlib import Path

import pytest

from .conftest import Cli, run_once


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys") / "hand"
    run_once("toy", "hand-built", "--scenes", 16, "-o", folder)
    return folder


def test_the_circuit_of_the_toy(cli: Cli, hand: Path, tmp_path: Path) -> None:
    words = ("circuit", "--model", hand / "model", "--pairs", hand / "scenes.jsonl", "--groups",
             hand / "groups.yaml", "--draws", 2, "--random", 2, "-q")  # fmt: skip
    done = cli(*words, "--mask", "last", "--desiderata", hand / "masks" / "position.jsonl",
               "-o", tmp_path / "C")  # fmt: skip
    assert done.status == 0, done.err
    assert "fetcher  last     1.1" in done.out and "mover    object   0.0" in done.out
    assert "faithfulness 1.00" in done.out and "mask for answer at last: heads 1.1" in done.out
    assert "mask for position at last: heads none" in done.out
    found = json.loads((tmp_path / "C" / "circuit.json").read_text())
    assert [group["heads"] for group in found["groups"]] == [[[1, 1]], [[0, 0]]]
    printed = cli(*words, "--top", "1,1", "--ablate", "resample", "--json").json()
    assert printed["circuit"]["groups"][0]["heads"] == [[1, 1]]
    assert printed["settings"]["top"] == [1, 1] and printed["test"]["ablate"] == "resample"


def test_errors(cli: Cli, hand: Path) -> None:
    pairs = ("--pairs", hand / "scenes.jsonl", "-q")
    assert "--pairs is missing" in cli("circuit").error(2)
    assert "--groups is missing" in cli("circuit", *pairs).error(2)
    groups = (*pairs, "--groups", hand / "groups.yaml", "--model", "nowhere")
    assert "--mask must be of first, last, " in cli("circuit", *groups, "--mask", "box").error(2)
    assert "--fdr must lie between" in cli("circuit", *pairs, "--fdr", 2).error(2)
    assert "--keep must be above 0" in cli("circuit", *pairs, "--keep", 0).error(2)
