"""Other ways to the same end, beside a plan."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.evaluation.controls import mean_difference_plan
from saesteer.steering.evaluation.side_by_side import generate_beside
from saesteer.steering.hooking.generation import generate_steered
from saesteer.steering.plans.plan import Plan, TaskIdentity
from saesteer.steering.plans.plan_file import save_plan
from saesteer.steering.tasks.task import load_task

from ..whole_row import make_sae, plan_of

pytestmark = pytest.mark.usefixtures("endless")

TEXTS = ["The statement assigns a value to a name.", "yield it"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 5}


@pytest.fixture
def plan(lm: LanguageModel) -> Plan:
    task = load_task("french")
    return plan_of(lm, make_sae(lm), task=TaskIdentity(task.name, task.hash, task.wordings))


def test_each_way_says_what_it_says_alone(lm: LanguageModel, plan: Plan, tmp_path: Path) -> None:
    other = dataclasses.replace(plan, scale=-2.0)
    path = str(save_plan(other, tmp_path / "other").parent)
    ways = ["prompt", "prompt: Use a list. ", "meandiff", path]
    found = generate_beside(lm, TEXTS, ways, plan=plan, **OPTIONS)
    assert list(found) == ways
    instruction = load_task("french").instruction
    vector = mean_difference_plan(lm, plan, load_task("french"))
    wanted = {
        "prompt": generate_steered(lm, [f"{t}\n{instruction}" for t in TEXTS], None, **OPTIONS),
        ways[1]: generate_steered(lm, [f"{t}\nUse a list." for t in TEXTS], None, **OPTIONS),
        "meandiff": generate_steered(lm, TEXTS, vector, **OPTIONS),
        path: generate_steered(lm, TEXTS, other, **OPTIONS),
    }
    for way, answers in found.items():
        assert [answer.prompt for answer in answers] == TEXTS
        assert [answer.token_ids for answer in answers] == [a.token_ids for a in wanted[way]]
        assert bool(answers[0].tokens_touched) == (way in ("meandiff", path))
    # The same length is added: only the direction differs.
    dose = generate_steered(lm, TEXTS[:1], plan, max_new_tokens=1)[0].relative_dose
    alone = generate_steered(lm, TEXTS[:1], vector, max_new_tokens=1)[0].relative_dose
    assert alone == pytest.approx(dose, rel=1e-4)


def test_ways_that_cannot_be_are_errors_before_anything_is_generated(
    lm: LanguageModel, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something was generated")

    monkeypatch.setattr("saesteer.steering.evaluation.side_by_side.generate_steered", never)
    bare = dataclasses.replace(plan, task=None)
    mine = dataclasses.replace(plan, task=TaskIdentity("mine", "0", ("x",)))
    old = dataclasses.replace(plan, task=TaskIdentity("french", "0", ("x",)))
    clamped = dataclasses.replace(plan, method="min")
    cases: list[tuple[Plan | None, str, type[Exception], str]] = [
        (bare, "prompt", UsageError, "write `ways` 'prompt:Answer in French.'"),
        (bare, "meandiff", UsageError, "the plan has none"),
        (mine, "meandiff", UsageError, "mine is not built in"),
        (old, "meandiff", UserError, "make the plan again with rank"),
        (clamped, "meandiff", UsageError, "needs a plan of method add, got min"),
        (None, "meandiff", UsageError, "got none"),
        (plan, "nowhere/plan", UserError, "`plan` nowhere/plan: there is no"),
    ]
    for one, way, kind, says in cases:
        with pytest.raises(kind, match=says):
            generate_beside(lm, TEXTS, ["prompt:x", way], plan=one, **OPTIONS)
    with pytest.raises(UsageError, match="`ways` prompt:x is given twice"):
        generate_beside(lm, TEXTS, ["prompt:x", "prompt:x"], plan=plan, **OPTIONS)
