"""`saesteer find` on a tiny model."""

import json
from pathlib import Path

import pytest

from saesteer.steering import load_plan

from .conftest import Cli

pytest.importorskip("optuna", reason="the search needs Optuna")

SMALL = (
    "--budget-minutes", 0.001, "--train-contents", 4, "--dev-contents", 2, "--n", 2,
    "--batch-size", 12, "--dtype", "float32", "-q",
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESTEER_CACHE", str(tmp_path / "cache"))


def test_the_tables_and_the_files(
    cli: Cli, model: Path, sae: Path, task: Path, tmp_path: Path
) -> None:
    out = tmp_path / "found"
    outcome = cli(
        "find", "--model", model, "--task", task, "--sae", sae, "--when", *SMALL, "-o", out
    )
    assert outcome.status == 0, outcome.err
    for said in ("settings tried on development contents", "unsteered", "steered_latents",
                 "on unrelated questions", "latents of both phases keep"):  # fmt: skip
        assert said in outcome.out
    assert {path.name for path in out.iterdir()} == {
        "plan.yaml", "plan.safetensors", "find.json", "find.html", "run.json", "latents"
    }  # fmt: skip
    document = json.loads((out / "find.json").read_text())
    assert {"unsteered", "prompted", "mean_difference", "steered"} <= set(document["arms"])
    assert document["within_budget"] is not bool(document["over_budget"])
    for problem in document["over_budget"]:
        assert problem in outcome.out and f"over budget: {problem}" in outcome.err
    plan = load_plan(out)
    assert plan.metrics["find"]["over_budget"] == document["over_budget"]
    steered = cli("steer", "--model", model, "--plan", out, "-p", "Rain closed the road.", "-q",
                  "--max-new-tokens", 3, "--dtype", "float32")  # fmt: skip
    assert steered.status == 0, steered.err


def test_what_is_refused(cli: Cli, model: Path, task: Path) -> None:
    assert "--task is missing" in cli("find", "--model", model).error(2)
    words = ("find", "--model", model, "--task", task, "-q", "--budget-minutes")
    assert "--budget-minutes must be above 0, got 0" in cli(*words, 0).error(2)
