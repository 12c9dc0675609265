"""Plans evaluated and reported, without the command line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.files import plain
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering import (
    CompareConfig,
    Decoding,
    evaluate_plans,
    load_task,
    plans_by_task,
    save_plan,
)
from saesteer.steering.evaluation.judge import Judge
from saesteer.steering.ifeval.benchmark import IFEvalPrompt
from saesteer.steering.plans.plan import Plan, TaskIdentity

from ..small_plans import small_plan

QUICK = CompareConfig(controls=(), n=1, decoding=Decoding(temperature=0.0), damage=False)
ROW = IFEvalPrompt(1, "Say it. No commas.", ("punctuation:no_comma",), ({},), "Say it.")


def plan_for(lm: LanguageModel, task: str, *latents: int) -> Plan:
    identity = TaskIdentity(task, load_task(task).hash, load_task(task).wordings)
    return replace(small_plan(lm, latents), task=identity)


def test_plans_are_grouped_by_their_tasks(lm: LanguageModel) -> None:
    plans = {
        "runs/a": plan_for(lm, "french", 1),
        "runs/b": plan_for(lm, "no_comma", 2),
        "runs/c": plan_for(lm, "french", 3),
    }
    french, commas = plans_by_task(plans)
    assert (french.task.name, list(french.arms())) == ("french", ["a", "c"])
    assert (commas.task.name, list(commas.arms())) == ("no_comma", ["steered"])
    (everything,) = plans_by_task(plans, "json")
    assert everything.task.name == "json" and list(everything.plans) == list(plans)
    assert plans_by_task({}) == []


def test_a_report_with_what_lies_with_the_plan(lm: LanguageModel, tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    save_plan(plan_for(lm, "no_comma", 1, 2), folder)
    ranking = {"stability": {"by": "rate", "k": 15}, "shuffled": None}
    (folder / "ranking.json").write_text(json.dumps(ranking))
    groups = plans_by_task([folder], replace(load_task("no_comma"), max_new_tokens=3))
    assert groups[0].found_with_it() == {"stability": ranking["stability"]}
    found = evaluate_plans(lm, groups, QUICK, ifeval=[ROW], max_new_tokens=3)
    (task,) = found.document["tasks"]
    assert task["stability"] == ranking["stability"] and task["shuffled"] is None
    assert [arm["name"] for arm in task["arms"]] == ["unsteered", "steered"]
    assert "steered" in found.document["ifeval"]["arms"]
    assert "arms=['unsteered', 'steered']" in repr(found) and len(repr(found)) < 400
    frame = found.to_frame()
    assert list(frame["arm"]) == ["unsteered", "steered"]
    assert list(frame["follows"]) == [arm["follows"][0] for arm in task["arms"]]
    found.save(tmp_path / "report")
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert written == json.loads(json.dumps(plain(found.document)))
    assert "Steering evaluation: no_comma" in (tmp_path / "report" / "report.html").read_text()


def test_warnings_are_told_with_their_task(lm: LanguageModel) -> None:
    short = replace(
        load_task("no_comma"),
        max_new_tokens=2,
        contents={"test": ("Seven boats left the harbour.",)},
    )
    groups = plans_by_task({"a": small_plan(lm, (1,))}, short)
    found = evaluate_plans(lm, groups, replace(QUICK, n=3))
    assert found.warnings == ("no_comma: 1 contents in the test split, 3 asked",)


def test_ifeval_without_a_plan_and_for_a_task_it_does_not_know(lm: LanguageModel) -> None:
    alone = evaluate_plans(lm, [], QUICK, ifeval=[ROW], max_new_tokens=2)
    assert alone.document["tasks"] == []
    assert set(alone.document["ifeval"]["arms"]) == {"prompted", "unsteered"}
    groups = plans_by_task({"a": small_plan(lm, (1,))}, "python")
    with pytest.raises(UsageError, match="no instruction like the task 'python': give `only`"):
        evaluate_plans(lm, groups, QUICK, ifeval=[ROW])


def test_what_cannot_end_well_is_refused_before_an_arm_runs(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*words: object, **more: object) -> None:
        raise AssertionError("an arm ran")

    monkeypatch.setattr(lm.model, "generate", generate)
    groups = plans_by_task({"p": plan_for(lm, "no_comma", 1)})
    without = replace(ROW, plain=None)
    with pytest.raises(UserError, match="no IFEval row is left"):
        evaluate_plans(lm, groups, QUICK, ifeval=[without])
    with pytest.raises(UserError, match="no IFEval row is left"):
        evaluate_plans(lm, groups, QUICK, ifeval=[ROW], only=["startend:quotation"])
    with pytest.raises(UserError, match="cannot be used"):
        evaluate_plans(lm, groups, QUICK, judge=Judge("http://127.0.0.1:9", "small", timeout=2.0))
