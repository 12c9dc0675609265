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


def test_a_vector_becomes_a_plan_that_steers(
    cli: Cli, model: Path, sae: Path, tmp_path: Path
) -> None:
    """The whole road but for the grades: pairs of a task, a vector, its latents, two plans."""
    words = ("patch", "--model", model, "--pairs", "task:french", "--n", 8, "--vector", "-q")
    done = cli(*words, "--sets", 2, "-o", tmp_path / "iv")
    assert done.status == 0, done.err
    assert "the instruction in words moves" in done.out and "more than the sum" in done.out
    assert "next: saesteer steer --plan" in done.out
    names = {"report.json", "report.html", "vectors.safetensors", "run.json", "plan"}
    assert {path.name for path in (tmp_path / "iv").iterdir()} == names
    both = cli(*words, "--sae", sae, "--share", 0.5, "--most", 8, "-o", tmp_path / "latents")
    assert both.status == 0, both.err
    assert "the error alone" in both.out and "on held-out groups" in both.out
    for plan in ("iv/plan", "latents/plan", "latents/plan-vector"):
        steered = cli("steer", "--model", model, "--plan", tmp_path / plan, "-p", "name", "--json",
                      "--max-new-tokens", 2, "-q")  # fmt: skip
        assert steered.status == 0, steered.err
    compared = cli(
        "patch", "--model", model, "--pairs", "task:french", "--n", 8, "--sae", sae, "--at", "last",
        "--most", 4, "--compare", tmp_path / "latents" / "plan", "--json", "-q",
    ).json()  # fmt: skip
    assert {row["order"] for row in compared["curves"]} >= {"carry", "mark", "random", "plan"}


def test_attention_is_cut(cli: Cli, hand: Path, tmp_path: Path) -> None:
    done = cli("patch", "--model", hand / "model", "--pairs", hand / "scenes.jsonl", "--knock",
               "object:last,label:object", "-o", tmp_path / "cut", "-q")  # fmt: skip
    assert done.status == 0, done.err
    assert "cut 0 to 1 at object:last" in done.out and "cut 0 to 0 at label:object" in done.out


def test_a_grid_is_resumed(cli: Cli, hand: Path, tmp_path: Path) -> None:
    words = ("patch", "--model", hand / "model", "--pairs", hand / "scenes.jsonl", "-q", "--json")
    first = cli(*words, "-o", tmp_path / "out").json()
    assert not (tmp_path / "out" / "finished.jsonl").exists()
    assert "holds a whole result" in cli(*words, "-o", tmp_path / "out", "--resume").error(2)
    assert "--resume" in cli(*words, "-o", tmp_path / "out").error(2)
    new = cli(*words, "-o", tmp_path / "new", "--resume").json()
    assert new["cells"] == first["cells"]


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["patch"], 2, "--pairs is missing"),
        (["patch", "--pairs", "x:y"], 2, "--pairs must be a .jsonl file or one of boxes:N"),
        (["patch", "--pairs", "boxes", "--site", "w"], 2, "--site must be of resid_pre"),
        (["patch", "--pairs", "boxes", "--fast", "atp", "--metric", "rr"], 2,
         "--fast atp needs a metric with a gradient"),
        (["patch", "--pairs", "boxes", "--budget", "-1"], 2, "--budget must be above 0"),
        (["patch", "--pairs", "boxes", "--at", "thing"], 2, "--at must be of first, last, object"),
        (["patch", "--pairs", "boxes", "--resume"], 2, "--out is missing: the folder of the grid"),
        (["patch", "--pairs", "boxes", "--sets", 2], 2, "--sets belongs to --vector: leave it"),
        (["patch", "--pairs", "boxes", "--vector", "--site", "z"], 2,
         "--site belongs to patches of nodes, --sae, --vector with --sae"),
        (["patch", "--pairs", "boxes", "--knock", "object:last", "--vector"], 2,
         "--knock cuts attention and --vector patches states"),
        (["patch", "--pairs", "boxes", "--knock", "object"], 2, "--knock must be FROM:TO"),
        (["patch", "--pairs", "boxes", "--knock", "thing:last"], 2, "--at must be of first, last"),
        (["patch", "--pairs", "boxes", "--vector", "--at", "last,first"], 2,
         "--at takes one position with --vector"),
        (["patch", "--pairs", "boxes", "--vector", "--iv-from", "x"], 2, "--iv-from"),
        (["toy"], 2, "KIND must be one of hand-built, boxes, instructions, got"),
        (["toy", "lego"], 2, "KIND must be one of hand-built, boxes, instructions, got"),
        (["toy", "hand-built"], 2, "--out is missing"),
        (["toy", "hand-built", "more"], 2, "unexpected 'more'"),
    ],
)  # fmt: skip
def test_errors(cli: Cli, words: list[str], status: int, says: str) -> None:
    assert says in cli(*words, "-q").error(status)


def test_errors_name_flags(cli: Cli, hand: Path) -> None:
    words = ("patch", "--model", hand / "model", "--pairs", hand / "scenes.jsonl", "-q")
    assert "--head 3 is out of range" in cli(*words, "--site", "z", "--head", 3).error(2)
    assert "--at must be of first, last" in cli(*words, "--at", "box").error(2)
    assert "--layer 2 is out of range" in cli(*words, "--layer", 2).error(2)
    assert "--at all needs runs of one length" not in cli(*words, "--at", "all", "--json").err
