"""`saesteer probe` and `toy instructions`: classifiers, checkpoints, moves and errors."""

from pathlib import Path

import pytest

from .conftest import Cli, run_once


@pytest.fixture(scope="module")
def symbols(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys") / "symbols"
    run_once("toy", "instructions", "--steps", 4, "--every", 2, "--scenes", 24, "-o", folder)
    return folder


def test_checkpoints_are_clustered(cli: Cli, symbols: Path, tmp_path: Path) -> None:
    done = cli("probe", "--models", symbols / "steps", "--cluster", "--n-init", 1, "--at",
               "instruction,query", "-o", tmp_path / "out", "-q")  # fmt: skip
    assert done.status == 0, done.err
    assert "within" in done.out and "accuracy of 00004: train" in done.out
    assert "Unseen instances" in (tmp_path / "out" / "report.html").read_text()


def test_states_are_moved(cli: Cli, symbols: Path) -> None:
    states = ("--model", symbols / "steps" / "00004", "--states", symbols / "states.jsonl")
    found = cli("probe", *states, "--move", "--at", "query", "--draws", 1, "--json", "-q").json()
    assert len(found["rows"]) == 5 and found["rows"][0]["at"] == "query"


def test_tasks_are_told_apart(cli: Cli, model: Path) -> None:
    done = cli("probe", "--model", model, "--tasks", "french,question", "--contents", 1, "--at",
               "last", "--folds", 2, "--shuffles", 1, "-q")  # fmt: skip
    assert done.status == 0, done.err
    assert "bag of words" in done.out and done.out.splitlines()[1].startswith("last")


def test_errors(cli: Cli, symbols: Path) -> None:
    assert "either --states FILE or --tasks" in cli("probe", "-q").error(2)
    assert "not both" in cli("probe", "--cluster", "--move", "-q").error(2)
    assert "--models is for --cluster" in cli("probe", "--models", "x", "-q").error(2)
    empty = cli("probe", "--models", symbols, "--states", symbols / "states.jsonl", "--cluster",
                "-q")  # fmt: skip
    assert "holds no folder with a model" in empty.error(2)
    words = ("probe", "--states", symbols / "states.jsonl", "-q")
    assert "--folds must be at least 2" in cli(*words, "--folds", 1).error(2)
    assert "--site must be one of resid_post" in cli(*words, "--site", "q").error(2)
