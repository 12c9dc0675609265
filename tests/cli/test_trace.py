"""`saesteer trace`: one prompt, two tasks, files and errors."""

import json
from pathlib import Path

import pytest

from .conftest import Cli, run_once


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys") / "hand"
    run_once("toy", "hand-built", "--scenes", 10, "-o", folder)
    return folder


def test_a_prompt_is_traced(cli: Cli, hand: Path, tmp_path: Path) -> None:
    words = ("trace", "--model", hand / "model", "-p", "boxes F apple , G pear . F", "-q")
    done = cli(*words, "--answer", " apple", "--wrong", " pear", "-o", tmp_path / "out")
    assert done.status == 0, done.err
    assert "apple@2 > (1.1) F@7" in done.out and "explain 1.00" in done.out
    assert "not what would happen" in done.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.json", "report.html", "run.json"
    }  # fmt: skip
    found = cli(*words, "--json").json()
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["answer"] == stored["answer"] == "apple" and found["wrong"] is None


def test_two_tasks_are_compared(cli: Cli, hand: Path) -> None:
    done = cli("trace", "--model", hand / "model", "--pairs", hand / "scenes.jsonl", "--at",
               "object", "--n", 9, "-q")  # fmt: skip
    assert done.status == 0, done.err
    assert done.out.splitlines()[1].split()[0] == "1.1" and "mass read at object" in done.out


def test_errors(cli: Cli, hand: Path) -> None:
    assert "give either --prompt TEXT or --pairs FILE" in cli("trace", "-q").error(2)
    words = ("trace", "--model", hand / "model", "-p", "boxes F apple . F", "-q")
    assert "--tau must be at least 0" in cli(*words, "--tau", 2).error(2)
    assert "--wrong without --answer" in cli(*words, "--wrong", " pear").error(2)
    pairs = ("--pairs", hand / "scenes.jsonl")
    assert "no position 'instruction'" in cli(*words[:3], *pairs, "-q").error(1)
