"""Evaluates plans for their tasks with every control, and makes the report, in one call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.files import plain, read_json, write_json, write_text
from saesteer.checkpoints.sae_file import SAE
from saesteer.checkpoints.shown import Shown
from saesteer.sae.config import Progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.sae.reading.found_pages import latent_pages as find_latent_pages
from saesteer.sae.runs.bars import show_progress
from saesteer.steering.evaluation.compare import CompareConfig, Comparison, compare
from saesteer.steering.evaluation.judge import Judge
from saesteer.steering.grades.grade import GRADES
from saesteer.steering.ifeval.benchmark import (
    INSTRUCTION_OF,
    IFEvalPrompt,
    chosen_rows,
    evaluate_ifeval,
)
from saesteer.steering.plans.names import by_folder, load_plans, task_of
from saesteer.steering.plans.plan import Plan
from saesteer.steering.reports.evaluation_report import render_html, report_document
from saesteer.steering.tasks.task import Task, load_task


@dataclass(frozen=True)
class TaskPlans:
    """A task, and the plans that are evaluated for it."""

    task: Task
    plans: Mapping[str, Plan]
    """By their paths, or other distinct names."""

    def arms(self) -> dict[str, Plan]:
        """The plans by the names of their arms, see `arm_names`."""
        return arm_names(self.plans)

    def found_with_it(self) -> dict[str, Any]:
        """Earlier results in the folder of the first plan: `sweep` from sweep.json, `stability` and
        `shuffled` from ranking.json, as far as these files exist."""
        given = Path(next(iter(self.plans))).expanduser()
        folder = given if given.is_dir() else given.parent
        found: dict[str, Any] = {}
        if (folder / "sweep.json").is_file():
            found["sweep"] = read_json(folder / "sweep.json")
        if (folder / "ranking.json").is_file():
            ranking = read_json(folder / "ranking.json")
            for name in ("stability", "shuffled"):
                if isinstance(ranking.get(name), dict):
                    found[name] = ranking[name]
        return found


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """What `evaluate_plans` found."""

    document: dict[str, Any]
    """The report, JSON-ready."""
    comparisons: tuple[Comparison, ...]
    """One for each task."""
    warnings: tuple[str, ...]
    """What could not be measured, and doses that leave the model's norm range."""

    def _facts(self) -> dict[str, Any]:
        tasks = self.document["tasks"]
        return {
            "model": self.document["model"]["name"],
            "tasks": [task["task"]["name"] for task in tasks],
            "arms": [arm["name"] for arm in tasks[0]["arms"]] if tasks else None,
            "warnings": len(self.warnings) or None,
        }

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each task and arm, and the rates of the four grades.

        A rate is None where it was not graded. Needs pandas.
        """
        import pandas

        rows = [
            {
                "task": task["task"]["name"],
                "arm": arm["name"],
                **{name: arm[name][0] if arm[name] else None for name in GRADES},
            }
            for task in self.document["tasks"]
            for arm in task["arms"]
        ]
        return pandas.DataFrame(rows)

    def save(self, folder: str | Path, latent_pages: Sequence[str | Path] = ()) -> None:
        """Write `report.json` and `report.html` into a folder, made if missing.

        The page links to pages of the plans' latents: those in `latent_pages`, and those that are
        found beside the folder or in an SAE's folder. Raises UserError for one that holds none.
        """
        folder = Path(folder)
        near: list[str | Path] = [folder.parent, *self._sae_folders()]
        self.document["latent_pages"] = find_latent_pages(latent_pages, near, folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "report.json", self.document)
        write_text(folder / "report.html", render_html(plain(self.document)))

    def _sae_folders(self) -> list[str]:
        parts = [
            part
            for task in self.document["tasks"]
            for plan in task["plans"].values()
            for part in plan.get("parts", [plan])
        ]
        return sorted({part["sae"]["source"] for part in parts if part["sae"]["source"]})


def arm_names(plans: Mapping[str, Plan]) -> dict[str, Plan]:
    """A single plan as `steered`; several plans by their folders' names, or their paths."""
    if len(plans) == 1:
        return {"steered": next(iter(plans.values()))}
    return by_folder(plans)


def plans_by_task(
    plans: Mapping[str, Plan] | Sequence[str | Path], task: str | Path | Task | None = None
) -> list[TaskPlans]:
    """Plans, or their folders, grouped by the task that each is evaluated for.

    Args:
        task: the task of all plans; by default the built-in task that each was ranked for.

    Raises UsageError, without `task`, for a plan that was not ranked for a built-in task.
    """
    named = dict(plans) if isinstance(plans, Mapping) else load_plans(plans)
    if not named:
        return []
    if task is not None:
        return [TaskPlans(task if isinstance(task, Task) else load_task(task), named)]
    groups: dict[str, tuple[Task, dict[str, Plan]]] = {}
    for path, plan in named.items():
        of = task_of(plan, path)
        groups.setdefault(of.name, (of, {}))[1][path] = plan
    return [TaskPlans(of, members) for of, members in groups.values()]


def evaluate_plans(
    model: str | LanguageModel,
    groups: Sequence[TaskPlans],
    config: CompareConfig = CompareConfig(),  # noqa: B008 (frozen: one may serve all)
    *,
    sae: SAE | None = None,
    judge: Judge | None = None,
    ifeval: Sequence[IFEvalPrompt] | None = None,
    only: Sequence[str] = (),
    max_new_tokens: int = 256,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = show_progress,
) -> Evaluation:
    """Compare plans with every control on their tasks, and with IFEval where it is given.

    Args:
        groups: what `plans_by_task` returns; none for IFEval alone.
        ifeval: rows of `load_ifeval`. Each plan steers the rows whose only instruction corresponds
            to its task; with `only`, the rows all of whose instructions are among these ids.
        max_new_tokens: longest answer to an IFEval prompt; tasks have their own.

    Raises:
        UsageError: a plan of a task that IFEval has no instruction for, without `only`.
        UserError, UsageError: what `compare` and `evaluate_ifeval` raise.
    """
    # Before the arms, whose answers would be lost.
    matched = [] if ifeval is None else check_ifeval(groups, ifeval, only)
    everything = {path: plan for group in groups for path, plan in group.plans.items()}
    if judge is not None:
        judge.check()
    lm = as_language_model(model, device=device, dtype=dtype)
    comparisons = tuple(
        compare(lm, group.task, group.arms(), config, sae=sae, judge=judge, progress=progress)
        for group in groups
    )
    answered = None
    if ifeval is not None:
        answered = evaluate_ifeval(
            lm,
            ifeval,
            arm_names(everything) if everything and only else None,
            matched=matched,
            only=only,
            n=config.n,
            decoding=config.decoding,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
    earlier = {group.task.name: group.found_with_it() for group in groups}
    document = report_document(
        lm,
        comparisons,
        sweeps={name: found.get("sweep") for name, found in earlier.items()},
        stability={name: found.get("stability") for name, found in earlier.items()},
        shuffled={name: found.get("shuffled") for name, found in earlier.items()},
        ifeval=answered,
        judge=None if judge is None else judge.model,
    )
    warnings = [message for one in comparisons for message in _warnings(one)]
    return Evaluation(document, comparisons, tuple(warnings))


def check_ifeval(
    groups: Sequence[TaskPlans], ifeval: Sequence[IFEvalPrompt], only: Sequence[str] = ()
) -> list[tuple[Task, Plan]]:
    """The plans that steer rows of IFEval by their own task, with it; none with `only`.

    Raises UsageError for a plan of a task that IFEval has no instruction for, without `only`, and
    UserError where no row is left. Needs no model.
    """
    matched = []
    if not only:
        matched = [(group.task, plan) for group in groups for plan in _in_ifeval(group)]
    steered = bool(matched or (only and any(group.plans for group in groups)))
    chosen_rows(ifeval, steered=steered, matched=matched, only=only)
    return matched


def _in_ifeval(group: TaskPlans) -> Sequence[Plan]:
    if group.task.check_name not in INSTRUCTION_OF:
        raise UsageError(
            f"IFEval has no instruction like the task {group.task.name!r}: give `only`, the ids of "
            "the rows to steer"
        )
    return list(group.plans.values())


def _warnings(comparison: Comparison) -> list[str]:
    name = comparison.task.name
    warnings = [f"{name}: {note}" for note in comparison.notes]
    for arm, damage in comparison.damage.items():
        if damage.leaves_norm_range and arm in comparison.plans:
            warnings.append(
                f"{name}: the dose of {arm} leaves the model's norm range "
                f"({damage.norm_ratio:.2g} times the usual length)"
            )
    return warnings
