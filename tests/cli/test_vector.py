"""`saesteer vector`: the grid, the plan and errors."""

from pathlib import Path

from .conftest import Cli


def test_vectors_and_a_plan(cli: Cli, model: Path, tmp_path: Path) -> None:
    words = ("vector", "--model", model, "--pairs", "contrast:animals", "--n", 3, "--layer", "0,2",
             "--best", 1, "-q")  # fmt: skip
    done = cli(*words, "--plan", 2, "-o", tmp_path / "out")
    assert done.status == 0, done.err
    assert "other instruction" in done.out and "next:" in done.out and "0, 2" in done.out
    assert (tmp_path / "out" / "plan" / "plan.yaml").is_file()
    assert (tmp_path / "out" / "effects.safetensors").is_file()
    found = cli(*words, "--sets", 1, "--json").json()
    assert [row["layers"] for row in found["sets"]] == [[0], [2]] and not found["superadditivity"]


def test_errors(cli: Cli, model: Path) -> None:
    assert "--pairs is missing" in cli("vector", "-q").error(2)
    words = ("vector", "--model", model, "--pairs", "contrast:animals", "-q")
    assert "--at must be one of query-first" in cli(*words, "--at", "query").error(2)
    assert "--sets must be one of 1, 2, 3" in cli(*words, "--sets", 4).error(2)
    assert "--sets 2 needs a later token" in cli(*words, "--at", "last", "--n", 2).error(2)
    assert "--out is missing" in cli(*words, "--plan", 2).error(2)
    said = cli(*words[:3], "--pairs", "boxes:3", "--n", 2, "-q").error(1)
    assert "positions instruction and query" in said
