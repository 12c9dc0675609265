"""Answers of a plan next to those of other plans, of a mean difference, or of a prompt."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.evaluation.controls import mean_difference_plan
from saesteer.steering.hooking.generation import SteeredText, generate_steered
from saesteer.steering.plans.methods import METHODS
from saesteer.steering.plans.plan import Plan
from saesteer.steering.plans.plan_file import load_plan
from saesteer.steering.ranking.config import RankConfig
from saesteer.steering.tasks.task import Task, builtin_tasks, compose, load_task

WAYS = ("prompt", "prompt:TEXT", "meandiff")
"""`prompt`: the plan's instruction appended to the prompt, unsteered; `prompt:TEXT`: that text
instead; `meandiff`: steered with the mean difference of the plan's task at the plan's ||delta||.
Anything else is the path of a plan."""


def generate_beside(
    lm: LanguageModel,
    texts: Sequence[str],
    ways: Sequence[str],
    *,
    plan: Plan | None,
    task: Task | None = None,
    sampled: RankConfig = RankConfig(),  # noqa: B008 (frozen: one may serve all)
    progress: Progress = no_progress,
    **options: Any,
) -> dict[str, list[SteeredText]]:
    """Answer every text in each of several ways, see `WAYS`; the answers by way, in text order.

    Args:
        plan: the plan that the answers are compared with; gives the instruction and the task.
        task: the plan's task, for `meandiff`; by default the built-in task of that name.
        sampled: how many contents `meandiff` uses, and how replies to them are sampled.
        options: passed to `generate_steered`.

    Raises:
        UsageError: a way twice; a way that needs a plan made by `rank`, without one.
        UserError: a plan that cannot be read, or that is for another model.
    """
    check_ways(ways, plan, task)
    # Everything is opened before anything is generated.
    jobs: dict[str, tuple[Plan | None, str]] = {}
    for way in ways:
        kind, _, text = way.partition(":")
        if way == "meandiff":
            ours, of = _adding(plan), task or _task_of(plan)
            jobs[way] = mean_difference_plan(lm, ours, of, sampled=sampled, progress=progress), ""
        elif kind == "prompt":
            jobs[way] = None, text.strip() or _instruction_of(plan)
        else:
            given = load_plan(way)
            given.check_model(lm, bool(options.get("force")))
            jobs[way] = given, ""
    found: dict[str, list[SteeredText]] = {}
    for way, (other, instruction) in jobs.items():
        asked = [compose(text, instruction) for text in texts] if instruction else list(texts)
        answers = generate_steered(lm, asked, other, **options)
        found[way] = [
            dataclasses.replace(answer, prompt=text)
            for answer, text in zip(answers, texts, strict=True)
        ]
    return found


def check_ways(ways: Sequence[str], plan: Plan | None, task: Task | None = None) -> None:
    """Raise what `generate_beside` would, as far as it can be told without the model."""
    twice = sorted({way for way in ways if list(ways).count(way) > 1})
    if twice:
        raise UsageError(f"`ways` {twice[0]} is given twice: name each way once")
    for way in ways:
        kind, _, text = way.partition(":")
        if way == "meandiff":
            _adding(plan)
            task or _task_of(plan)
        elif kind != "prompt":
            load_plan(way)
        elif not text.strip():
            _instruction_of(plan)


def _adding(plan: Plan | None) -> Plan:
    if plan is None or not METHODS[plan.method].adds_fixed_vector:
        raise UsageError(
            "`ways` meandiff adds a vector of the plan's own length: it needs a plan of method "
            f"add, got {'none' if plan is None else plan.method}"
        )
    return plan


def _task_of(plan: Plan | None) -> Task:
    identity = None if plan is None else plan.task
    if identity is None or identity.name not in builtin_tasks():
        raise UsageError(
            "`ways` meandiff needs the contents of the plan's task, and "
            + ("the plan has none" if identity is None else f"{identity.name} is not built in")
            + ": give the path of a mean-difference plan instead"
        )
    task = load_task(identity.name)
    if task.hash != identity.hash:
        raise UserError(
            f"the built-in task {identity.name} is not the one the plan was ranked for: make the "
            "plan again with rank, or leave `ways` meandiff out"
        )
    return task


def _instruction_of(plan: Plan | None) -> str:
    identity = None if plan is None else plan.task
    if identity is None or not identity.instructions:
        raise UsageError(
            "`ways` prompt needs the instruction of the plan's task, which this plan does not "
            "hold: write `ways` 'prompt:Answer in French.'"
        )
    return identity.instructions[0]
