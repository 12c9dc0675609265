"""`saesteer evaluate` on a tiny model."""

import json
from pathlib import Path

import pytest

from .conftest import Cli

SMALL = ("--n", 1, "--random-draws", 1, "--temperature", 0, "--dtype", "float32", "-q")


def test_the_table_and_the_report(
    cli: Cli, model: Path, plan: Path, task: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    outcome = cli("evaluate", "--plan", plan, "--task", task, *SMALL, "-o", out)
    assert outcome.status == 0, outcome.err
    for arm in ("unsteered", "prompted", "steered + prompted", "random latents", "logit bias"):
        assert f"\n  {arm} " in outcome.out
    assert "steered - random" in outcome.out and "late: Answer in French." in outcome.out
    assert {path.name for path in out.iterdir()} == {"report.json", "report.html", "run.json"}
    document = json.loads((out / "report.json").read_text())
    (found,) = document["tasks"]
    assert found["n"] == 1 and found["plans"]["steered"]["k"] == 3
    page = (out / "report.html").read_text()
    assert "Steering evaluation: late" in page and "steered + prompted" in page


def test_a_sweep_beside_the_plan_is_in_the_report(
    cli: Cli, model: Path, plan: Path, task: Path, tmp_path: Path
) -> None:
    swept = tmp_path / "sweep"
    assert cli(
        "sweep", "--plan", plan, "--task", task, "--grid", "k=1", "--grid", "scale=1", "--rounds",
        "1:1", "--dtype", "float32", "-q", "-o", swept,
    ).status == 0  # fmt: skip
    words = ("evaluate", "--plan", swept, "--task", task, *SMALL, "--controls", "none")
    document = cli(*words, "--json").json()
    (found,) = document["tasks"]
    assert found["sweep"]["chosen"]["k"] == 1
    assert [arm["name"] for arm in found["arms"]] == ["unsteered", "steered"]


def test_two_plans_of_one_task_are_arms_of_one_section(
    cli: Cli, plan: Path, task: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("plan.yaml", "plan.safetensors"):
        (other / name).write_bytes((plan / name).read_bytes())
    found = cli("evaluate", "--plan", plan, "--plan", other, "--task", task, *SMALL,
                "--controls", "logit-bias", "--json").json()  # fmt: skip
    (one,) = found["tasks"]
    assert [arm["name"] for arm in one["arms"]] == [
        "unsteered", "plan", "logit bias (plan)", "other", "logit bias (other)"
    ]  # fmt: skip


def test_seeds(cli: Cli, plan: Path, task: Path) -> None:
    words = ("evaluate", "--plan", plan, "--task", task, "--n", 1, "--dtype", "float32", "-q")
    found = cli(*words, "--controls", "none", "--seeds", "1,2", "--json").json()
    assert found["tasks"][0]["seeds"] == [1, 2]
    assert [row["seed"] for row in found["tasks"][0]["answers"]["steered"]] == [1, 2]
    greedy = (*words, "--temperature", 0, "--seeds", "1,2")
    assert "--seeds 1,2 with temperature 0" in cli(*greedy).error(2)


def test_ifeval_alone_and_with_a_plan(cli: Cli, model: Path, plan: Path, tmp_path: Path) -> None:
    row = {
        "key": 1, "prompt": "Say it without commas.", "kwargs": [{}],
        "instruction_id_list": ["punctuation:no_comma"], "prompt_without_instruction": "Say it.",
    }  # fmt: skip
    data = tmp_path / "ifeval.jsonl"
    data.write_text(json.dumps(row))
    words = ("evaluate", "--ifeval", data, "--max-new-tokens", 3, "--temperature", 0, "-q")
    found = cli(*words, "--model", model, "--json").json()
    assert found["tasks"] == [] and set(found["ifeval"]["arms"]) == {"prompted", "unsteered"}
    outcome = cli(*words, "--model", model)
    assert "IFEval: 1 prompts" in outcome.out and "prompt strict" in outcome.out
    assert "no IFEval row is left" in cli(
        *words, "--model", model, "--ifeval-only", "startend:quotation"
    ).error(1)


def test_ifeval_rows_are_steered_by_the_plan_for_them(
    cli: Cli, plan: Path, task: Path, tmp_path: Path
) -> None:
    row = {
        "key": 1, "prompt": "Say it without commas.", "kwargs": [{}],
        "instruction_id_list": ["punctuation:no_comma"], "prompt_without_instruction": "Say it.",
    }  # fmt: skip
    data = tmp_path / "ifeval.jsonl"
    data.write_text(json.dumps(row))
    own = tmp_path / "task.yaml"
    own.write_text(task.read_text().replace("name: length", "name: no_comma"))
    words = ("evaluate", "--plan", plan, "--ifeval", data, "--max-new-tokens", 3, "--n", 1,
             "--controls", "none", "--temperature", 0, "--dtype", "float32", "-q")  # fmt: skip
    outcome = cli(*words, "--task", own)
    assert outcome.status == 0, outcome.err
    assert "\n  steered + prompted " in outcome.out and "\n  steered - unsteered " in outcome.out
    assert "IFEval has no instruction like the task 'late'" in cli(*words, "--task", task).error(2)
    chosen = (*words, "--task", task, "--ifeval-only", "punctuation:no_comma", "--json")
    assert set(cli(*chosen).json()["ifeval"]["arms"]) == {"prompted", "unsteered", "steered"}


def test_a_plan_for_a_task_of_ones_own_needs_its_file(cli: Cli, plan: Path) -> None:
    said = cli("evaluate", "--plan", plan, "-q").error(2)
    assert "is for 'late', which is not built in: give --task NAME or FILE" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "nothing to evaluate: give --plan DIR, or --ifeval FILE"),
        (("--plan", "a", "--judge", "http://a"), "--judge and --judge-model belong together"),
        (("--plan", "a", "--ifeval-only", "b"), "--ifeval-only needs --ifeval FILE"),
        (("--plan", "a", "--controls", "luck"), "--controls must be some of prompt, random"),
        (("--plan", "a", "--n", "0"), "--n must be at least 1"),
        (("--plan", "a", "--judge", "here", "--judge-model", "m"), "--judge must be the address"),
    ],
)
def test_what_cannot_be_evaluated(cli: Cli, words: tuple[str, ...], said: str) -> None:
    assert said in cli("evaluate", *words, "-q").error(2)
