"""Names of plans that are compared, and the tasks they are for."""

from dataclasses import replace

import pytest

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.plans.names import by_folder, task_of
from saesteer.steering.plans.plan import TaskIdentity

from ..small_plans import small_plan


def test_folders_name_plans_as_far_as_they_differ(lm: LanguageModel) -> None:
    one, other = small_plan(lm, (1,)), small_plan(lm, (2,))
    assert by_folder({"runs/a": one, "runs/b": other}) == {"a": one, "b": other}
    alike = {"first/plan": one, "second/plan": other}
    assert by_folder(alike) == alike


def test_a_plan_without_a_built_in_task_is_refused(lm: LanguageModel) -> None:
    plan = replace(small_plan(lm, (1,)), task=TaskIdentity("french", "ab", ("x",)))
    assert task_of(plan).name == "french"
    mine = replace(plan, task=TaskIdentity("mine", "ab", ("x",)))
    with pytest.raises(UsageError, match="`plan` runs/a is for 'mine', .* give `task`"):
        task_of(mine, "runs/a")
    with pytest.raises(UsageError, match="names no task"):
        task_of(replace(plan, task=None))
