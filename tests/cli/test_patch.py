"""`saesteer patch` and `saesteer toy`: flags, files and one-line errors."""

import json
from pathlib import Path

import pytest

from .conftest import Cli, run_once


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys") / "hand"
    run_once("toy", "hand-built", "--scenes", 10, "-o", folder)
    return folder


def test_the_toy_is_written_and_patched(cli: Cli, hand: Path, tmp_path: Path) -> None:
    assert {path.name for path in hand.iterdir()} == {
        "model", "scenes.jsonl", "groups.yaml", "masks", "run.json"
    }  # fmt: skip
    words = ("patch", "--model", hand / "model", "--pairs", hand / "scenes.jsonl", "--site", "z",
             "--at", "last,object", "-q")  # fmt: skip
    done = cli(*words, "-o", tmp_path / "out")
    assert done.status == 0, done.err
    assert "z 1.1 at last" in done.out and "z 0.0 at object" in done.out
    assert "10 pairs in 10 groups, 12 nodes" in done.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.json", "report.html", "effects.safetensors", "run.json"
    }  # fmt: skip
    found = cli(*words, "--json").json()
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["cells"] == stored["cells"] and found["metric"] == "logit-diff"
    large = {cell["name"] for cell in found["cells"] if abs(cell["effect"]) > 1}
    assert large == {"z 1.1 at last", "z 0.0 at object"}


def test_shortcuts_layers_and_heads(cli: Cli, hand: Path) -> None:
    found = cli(
        "patch", "--model", hand / "model", "--pairs", hand / "scenes.jsonl", "--site", "z,q",
        "--layer", 1, "--head", "0,1", "--fast", "atp*", "--verify", 2, "--checks", 2, "--n", 8,
        "--metric", "logprob", "--direction", "denoise", "--json", "-q",
    ).json()  # fmt: skip
    assert len(found["cells"]) == 4 and found["agreement"]["nodes"] == 4
    assert found["settings"]["fast"] == "atp*" and found["settings"]["direction"] == "denoise"


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["patch"], 2, "--pairs is missing"),
        (["patch", "--pairs", "x:y"], 2, "--pairs must be a .jsonl file or one of boxes:N"),
        (["patch", "--pairs", "boxes", "--site", "w"], 2, "--site must be of resid_pre"),
        (["patch", "--pairs", "boxes", "--fast", "atp", "--metric", "rr"], 2,
         "--fast atp needs a metric with a gradient"),
        (["patch", "--pairs", "boxes", "--budget", "-1"], 2, "--budget must be above 0"),
        (["toy"], 2, "KIND must be one of hand-built, boxes, got"),
        (["toy", "lego"], 2, "KIND must be one of hand-built, boxes, got"),
        (["toy", "hand-built"], 2, "--out is missing"),
        (["toy", "hand-built", "more"], 2, "unexpected 'more'"),
    ],
)  # fmt: skip
def test_errors(cli: Cli, words: list[str], status: int, says: str) -> None:
    assert says in cli(*words, "-q").error(status)


def test_errors_name_flags(cli: Cli, hand: Path) -> None:
    words = ("patch", "--model", hand / "model", "--pairs", hand / "scenes.jsonl", "-q")
    assert "--head 3 is out of range" in cli(*words, "--site", "z", "--head", 3).error(2)
    assert "--at must be one of first, last" in cli(*words, "--at", "box").error(2)
    assert "--layer 2 is out of range" in cli(*words, "--layer", 2).error(2)
    assert "--at all needs runs of one length" not in cli(*words, "--at", "all", "--json").err
