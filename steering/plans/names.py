"""Plans loaded from several folders and named after them, and the task of a plan."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from saesteer.checkpoints.errors import UsageError
from saesteer.steering.plans.plan import Plan
from saesteer.steering.plans.plan_file import load_plan
from saesteer.steering.tasks.task import Task, builtin_tasks, load_task


def load_plans(paths: Sequence[str | Path]) -> dict[str, Plan]:
    """The plans of several folders, by their paths as given.

    Raises what `load_plan` does.
    """
    return {str(path): load_plan(path) for path in paths}


def by_folder(plans: Mapping[str, Plan]) -> dict[str, Plan]:
    """Plans by the names of their folders, or by their paths where two names are equal."""
    short = [Path(path).name for path in plans]
    names = short if len(set(short)) == len(short) else list(plans)
    return dict(zip(names, plans.values(), strict=True))


def task_of(plan: Plan, path: str = "") -> Task:
    """The built-in task that a plan was ranked for.

    Raises UsageError, naming `path`, where the plan has no task or one that is not built in.
    """
    if plan.task is None or plan.task.name not in builtin_tasks():
        what = "names no task" if plan.task is None else f"is for {plan.task.name!r}"
        raise UsageError(f"`plan` {path} {what}, which is not built in: give `task` NAME or FILE")
    return load_task(plan.task.name)
