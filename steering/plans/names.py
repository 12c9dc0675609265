"""Names for plans that are compared: those of their folders."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from saesteer.checkpoints.errors import UsageError
from saesteer.steering.plans.plan import Plan
from saesteer.steering.plans.plan_file import load_plan
from saesteer.steering.tasks.task import Task, builtin_tasks, load_task


def load_plans(paths: Sequence[str | Path]) -> dict[str, Plan]:
    """The plans of several folders, each by its path as it was given.

    Raises what `load_plan` does.
    """
    return {str(path): load_plan(path) for path in paths}


def by_folder(plans: Mapping[str, Plan]) -> dict[str, Plan]:
    """Plans by the names of their folders; by their whole paths where two of those are alike."""
    short = [Path(path).name for path in plans]
    names = short if len(set(short)) == len(short) else list(plans)
    return dict(zip(names, plans.values(), strict=True))


def task_of(plan: Plan, path: str = "") -> Task:
    """The task that a plan was ranked for.

    Raises UsageError where the plan names none, or one that is not built in; the message names
    `path`.
    """
    if plan.task is None or plan.task.name not in builtin_tasks():
        what = "names no task" if plan.task is None else f"is for {plan.task.name!r}"
        raise UsageError(f"`plan` {path} {what}, which is not built in: give `task` NAME or FILE")
    return load_task(plan.task.name)
