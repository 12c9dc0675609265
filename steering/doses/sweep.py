"""Chooses numbers of latents, doses and scopes on the development split, and measures damage."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.files import plain
from saesteer.checkpoints.shown import Shown
from saesteer.sae.config import Progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.sae.reports.chart import Chart
from saesteer.sae.runs.bars import show_progress
from saesteer.steering.evaluation.arms import (
    Decoding,
    answer,
    contents_to_grade,
    two_ways_to_ask,
)
from saesteer.steering.evaluation.damage import Damage, NeutralProbe
from saesteer.steering.evaluation.graded_arms import Arm, grade_arm
from saesteer.steering.evaluation.rates import Rate
from saesteer.steering.grades.grade import GRADES, Grader, make_grader
from saesteer.steering.hooking.tracking.finite import NotFiniteError
from saesteer.steering.plans.plan import Plan
from saesteer.steering.tasks.task import Task, load_task

BUDGETS = ("kl", "ce")
"""What a damage budget may limit: KL(plain || steered), or the rise of the cross-entropy."""

ROUNDS = ((12, 4), (40, 1))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The settings to try: every combination."""

    k: tuple[int, ...] = (1, 5, 15)
    """Latents, best first."""
    scale: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """Multiples of mu + beta * sigma."""
    scope: tuple[str, ...] = ("generation",)
    beta: tuple[float, ...] = ()
    """Standard deviations above mu; empty keeps the plan's own."""

    def __post_init__(self) -> None:
        for name in ("k", "scale", "scope"):
            if not getattr(self, name):
                raise UsageError(f"the grid needs at least one value of {name}, got none")
        if 0 in self.scale:
            raise UsageError(
                "`grid` scale=0 would steer nothing: the unsteered arm is always there"
            )

    def plans(self, plan: Plan) -> list[Plan]:
        """The plans of the grid.

        A k larger than the plan's number of latents is left out; if none is left, all latents are
        used.
        """
        held = len(plan.latents)
        ks = [k for k in self.k if k <= held] or [held]
        return [
            plan.top(k).with_changes(scale=scale, scope=scope, beta=beta)
            for k, beta, scale, scope in product(
                ks, self.beta or (plan.beta,), self.scale, self.scope
            )
        ]


@dataclass(frozen=True)
class Budget:
    """The largest damage that a setting may do, in nats per token on neutral questions."""

    kind: str
    """`kl` or `ce`."""
    limit: float

    def __post_init__(self) -> None:
        if self.kind not in BUDGETS:
            raise UsageError(f"`budget` must be kl=NATS or ce=NATS, got {self.kind!r}")
        if not self.limit > 0 or not math.isfinite(self.limit):
            raise UsageError(f"`budget` {self.kind}={self.limit:g} must be a number above 0")

    def spent(self, damage: Damage) -> float:
        """The damage of a setting in the budget's measure, in nats per token."""
        return damage.kl if self.kind == "kl" else damage.delta_ce


@dataclass(frozen=True)
class Trial:
    """One setting and its results."""

    plan: Plan
    arm: Arm
    damage: Damage | None = None
    label: str = ""
    """The name of the plan it comes from, where there are several."""

    @property
    def merit(self) -> tuple[float, float, float, float]:
        """Sort key: more success, then more answers that follow, then fewer loops, then a smaller
        edit. Success is `strict`, where it could be graded (`Arm.measure`)."""
        arm = self.arm
        loops = arm.degenerate.value
        return arm.success.value, arm.follows.value, -loops, -self.relative_dose

    @property
    def relative_dose(self) -> float:
        """Median over the answers; 0 where nothing was edited."""
        return self.arm.relative_dose or 0.0

    @property
    def setting(self) -> tuple[Any, ...]:
        """What identifies the setting."""
        plan = self.plan
        return self.label, plan.layer, plan.ids, plan.scale, plan.beta, plan.scope

    def row(self) -> dict[str, Any]:
        """The setting and its rates, JSON-ready."""
        return {
            "plan": self.label,
            "layer": self.plan.layer,
            "k": len(self.plan.latents),
            "beta": self.plan.beta,
            "scale": self.plan.scale,
            "scope": self.plan.scope,
            **self.arm.summary(),
            "relative_dose": self.relative_dose,
            "damage": None if self.damage is None else self.damage.row(),
        }


@dataclass(frozen=True, repr=False)
class Sweep(Shown):
    """Every trial of a sweep, the chosen one, and the unsteered and prompted arms."""

    task: Task
    chosen: Trial
    trials: tuple[Trial, ...]
    """In the order they were made, round by round."""
    unsteered: Arm
    prompted: Arm
    budget: Budget | None = None
    within_budget: bool = True
    """False when every setting was over the budget and only the cheapest was tried."""
    skipped: tuple[tuple[Plan, Damage], ...] = ()
    """Settings over the budget, which were not tried."""
    warnings: tuple[str, ...] = field(default=())

    def _facts(self) -> dict[str, Any]:
        plan = self.chosen.plan
        return {
            "task": repr(self.task.name),
            "settings": len(self.latest),
            "chosen": f"k {len(plan.latents)}, scale {plan.scale:g}, scope {plan.scope}",
            "within_budget": self.within_budget if self.budget is not None else None,
        }

    def to_frame(self) -> Any:
        """The trials as a pandas DataFrame, in the order they were made: the columns of
        `sweep.json`'s trials, with damage as `damage_kl` and so on. Needs pandas."""
        import pandas

        return pandas.json_normalize([trial.row() for trial in self.trials], sep="_")

    def plot(self) -> Chart:
        """Success against damage, with the front and the setting that was chosen."""
        from saesteer.steering.reports.sweep_charts import pareto_chart

        return Chart(pareto_chart(plain(self.document())), "Success against KL")

    @property
    def latest(self) -> list[Trial]:
        """The last trial of every setting, which is that on the most contents."""
        found = {trial.setting: trial for trial in self.trials}
        return list(found.values())

    @property
    def front(self) -> list[Trial]:
        """Settings with more success than all of lower KL, by increasing KL."""
        return pareto(trial for trial in self.latest if trial.damage is not None)

    def plan(self) -> Plan:
        """The chosen plan, with the results of the sweep in its metrics."""
        chosen = self.chosen
        facts = {
            "task": self.task.name,
            "split": "dev",
            "contents": len(chosen.arm.answers),
            "settings": len(self.latest) + len(self.skipped),
            "measure": chosen.arm.measure,
            **{name: None if rate is None else rate.value for name, rate in _rates(chosen.arm)},
            "degenerate": chosen.arm.degenerate.value,
            "kl": None if chosen.damage is None else chosen.damage.kl,
            "delta_ce": None if chosen.damage is None else chosen.damage.delta_ce,
            "budget": None if self.budget is None else f"{self.budget.kind}={self.budget.limit:g}",
        }
        return chosen.plan.with_changes(metrics={**chosen.plan.metrics, "sweep": facts})

    def document(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        front = {trial.setting for trial in self.front}
        latest = {id(trial) for trial in self.latest}
        budget = None
        if self.budget is not None:
            budget = {"kind": self.budget.kind, "limit": self.budget.limit}
        return {
            "schema_version": 1,
            "task": {"name": self.task.name, "hash": self.task.hash},
            "unsteered": self.unsteered.summary(),
            "prompted": self.prompted.summary(),
            "chosen": self.chosen.row(),
            "budget": budget,
            "within_budget": self.within_budget,
            "trials": [
                {
                    **trial.row(),
                    "latest": id(trial) in latest,
                    "on_front": id(trial) in latest and trial.setting in front,
                }
                for trial in self.trials
            ],
            "skipped": [
                {
                    "layer": plan.layer,
                    "k": len(plan.latents),
                    "beta": plan.beta,
                    "scale": plan.scale,
                    "scope": plan.scope,
                    "damage": damage.row(),
                }
                for plan, damage in self.skipped
            ],
            "warnings": list(self.warnings),
        }


def pareto(trials: Iterable[Trial]) -> list[Trial]:
    """The Pareto front of trials: more success than all of lower KL; by increasing KL."""
    measured = [trial for trial in trials if trial.damage is not None]
    measured.sort(key=lambda t: (t.damage.kl if t.damage else 0.0, -t.arm.success.value))
    front: list[Trial] = []
    for trial in measured:
        if not front or trial.arm.success.value > front[-1].arm.success.value:
            front.append(trial)
    return front


def sweep(
    model: str | LanguageModel,
    task: str | Path | Task,
    plans: Mapping[str, Plan] | Plan,
    grid: Grid = Grid(),  # noqa: B008 (frozen: one may serve all)
    *,
    rounds: Sequence[tuple[int, int]] = ROUNDS,
    budget: Budget | None = None,
    decoding: Decoding = Decoding(),  # noqa: B008
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = show_progress,
) -> Sweep:
    """Try every setting on the development split: success against damage on neutral questions.

    First the damage of every setting is measured, and those over the budget are left out. Then
    successive halving chooses, as in `calibrate`.

    Args:
        plans: one plan, or several by name, such as those of several layers or rankings.

    Raises:
        UserError: a task without a check or without development contents.
        UsageError: a grid or rounds that leave nothing to try.
    """
    named = {"": plans} if isinstance(plans, Plan) else dict(plans)
    if not named:
        raise UsageError("nothing to sweep over: give at least one plan")
    _check_rounds(rounds)
    task = task if isinstance(task, Task) else load_task(task)
    contents = contents_to_grade(task, "dev")
    candidates = [(name, one) for name, plan in named.items() for one in grid.plans(plan)]
    lm = as_language_model(model, device=device, dtype=dtype)
    for plan in named.values():
        plan.check_model(lm)
    probe = NeutralProbe(lm)
    measured: list[tuple[str, Plan, Damage]] = []
    broken: list[NotFiniteError] = []
    for done, (name, candidate) in enumerate(candidates):
        progress("damage on neutral questions", done, len(candidates), "settings")
        try:
            measured.append((name, candidate, probe.measure(candidate)))
        except NotFiniteError as error:
            broken.append(error)
    progress("damage on neutral questions", len(candidates), len(candidates), "settings")
    if not measured:
        raise broken[-1]
    skipped: list[tuple[Plan, Damage]] = []
    within = True
    if budget is not None:
        measured.sort(key=lambda entry: budget.spent(entry[2]))
        allowed = sum(budget.spent(cost) <= budget.limit for *_, cost in measured)
        within = allowed > 0
        skipped = [(plan, cost) for _, plan, cost in measured[max(allowed, 1) :]]
        measured = measured[: max(allowed, 1)]
    racing: list[tuple[str, Plan, Damage | None]] = list(measured)
    # The words alone judge fluency here: a model's judgement of every setting would take longer
    # than their answers do, and test contents get it.
    grader = make_grader(task, contents)
    trials = _race(lm, task, grader, contents, racing, rounds, decoding, progress, broken)
    most = min(len(contents), max(n for n, _ in rounds))
    asked, _ = two_ways_to_ask(task, contents[:most])
    arms = []
    for kind, texts in (("unsteered", contents[:most]), ("prompted", asked)):
        made = answer(lm, texts, None, task.max_new_tokens, decoding, kind, progress)
        arms.append(grade_arm(kind, task, contents[:most], made, grader=grader, kind=kind))
    chosen = _winner(trials)
    return Sweep(
        task,
        chosen,
        tuple(trials),
        arms[0],
        arms[1],
        budget,
        within,
        tuple(skipped),
        tuple([*_warnings(chosen, budget, within), *_left_out(broken)]),
    )


def _warnings(chosen: Trial, budget: Budget | None, within: bool) -> list[str]:
    warnings = []
    damage = chosen.damage
    if budget is not None and not within and damage is not None:
        warnings.append(
            f"no setting keeps to the budget {budget.kind}={budget.limit:g}: the cheapest of them "
            f"costs {budget.spent(damage):.2g} nats; raise `budget`, or give smaller scales"
        )
    if damage is not None and damage.leaves_norm_range:
        warnings.append(
            f"the dose leaves the model's norm range: {100 * (damage.outside_norms or 0):.0f} % of "
            f"the edited residuals are longer or shorter than 98 % of the others "
            f"({damage.norm_ratio:.2g} times as long); a smaller scale is safer"
        )
    if chosen.arm.follows.successes == 0:
        warnings.append(
            "no setting followed the instruction once on the development contents: the plan is the "
            "setting with the smallest edit"
        )
    elif chosen.arm.success.successes == 0:
        warnings.append(
            f"no setting had success ({chosen.arm.measure}) on the development contents: the plan "
            "is the one that followed the instruction most often, and its text is not good"
        )
    warnings += [f"{name}: {why}" for name, why in chosen.arm.not_graded.items()]
    return warnings


def _rates(arm: Arm) -> list[tuple[str, Rate | None]]:
    return [(name, arm.rate(name)) for name in GRADES]


def _left_out(broken: Sequence[NotFiniteError]) -> list[str]:
    if not broken:
        return []
    return [f"{len(broken)} settings were left out, the first for this: {broken[0]}"]


def calibrate(
    model: str | LanguageModel,
    task: str | Path | Task,
    plan: Plan,
    grid: Grid = Grid(),
    *,
    rounds: Sequence[tuple[int, int]] = ROUNDS,
    decoding: Decoding = Decoding(),  # noqa: B008 (frozen: one may serve all)
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = show_progress,
) -> tuple[Plan, list[Trial]]:
    """Pick a setting on the development split, by successive halving; damage is not measured.

    Each round `(n, keep)` grades the remaining settings on the first n development contents and
    keeps the best `keep`: many settings on few contents, then few on many. Test contents are never
    used.

    Returns:
        The plan of the best setting, and every trial in the order they were made.

    Raises:
        UserError: a task without a check or without development contents.
        UsageError: a grid or rounds that leave nothing to try.
    """
    _check_rounds(rounds)
    task = task if isinstance(task, Task) else load_task(task)
    contents = contents_to_grade(task, "dev")
    racing = [("", candidate, None) for candidate in grid.plans(plan)]
    lm = as_language_model(model, device=device, dtype=dtype)
    grader = make_grader(task, contents)
    trials = _race(lm, task, grader, contents, racing, rounds, decoding, progress)
    return _winner(trials).plan, trials


def _check_rounds(rounds: Sequence[tuple[int, int]]) -> None:
    if not rounds or any(n < 1 or keep < 1 for n, keep in rounds):
        raise UsageError(
            f"rounds must be (contents, settings kept) pairs, each at least 1, got {list(rounds)}"
        )


def _race(
    lm: LanguageModel,
    task: Task,
    grader: Grader,
    contents: Sequence[str],
    racing: Sequence[tuple[str, Plan, Damage | None]],
    rounds: Sequence[tuple[int, int]],
    decoding: Decoding,
    progress: Progress,
    broken: list[NotFiniteError] | None = None,
) -> list[Trial]:
    """Successive halving; every trial in the order they were made.

    Settings whose outputs are no numbers leave the race, and their errors go into `broken`.
    """
    broken = [] if broken is None else broken
    if not racing:
        raise UserError("no setting is left to try")
    trials: list[Trial] = []
    racing = list(racing)
    for number, (n, keep) in enumerate(rounds, start=1):
        sample = contents[:n]
        stage = f"choose dose, round {number}"
        latest = []
        for done, (label, candidate, damage) in enumerate(racing):
            progress(stage, done, len(racing), f"settings, on {len(sample)} contents each")
            try:
                texts = answer(lm, sample, candidate, task.max_new_tokens, decoding)
            except NotFiniteError as error:
                broken.append(error)
                continue
            arm = grade_arm("steered", task, sample, texts, grader=grader, kind="steered")
            latest.append(Trial(candidate, arm, damage, label))
        progress(stage, len(racing), len(racing), f"settings, on {len(sample)} contents each")
        if not latest:
            raise broken[-1]
        trials += latest
        latest.sort(key=lambda trial: trial.merit, reverse=True)
        racing = [(trial.label, trial.plan, trial.damage) for trial in latest[:keep]]
    return trials


def _winner(trials: Sequence[Trial]) -> Trial:
    """The best trial of the last round: those on as many contents as the last trial."""
    last = len(trials[-1].arm.answers)
    final = [trial for trial in trials if len(trial.arm.answers) == last]
    return max(final, key=lambda trial: trial.merit)
