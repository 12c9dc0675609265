"""Comparison of plans with controls: arms, paired tests, fluency and damage."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from saesteer.checkpoints.errors import UsageError, UserError, meant
from saesteer.checkpoints.sae_file import SAE, load_sae
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.steering.evaluation.arms import (
    ArmSpec,
    Decoding,
    contents_to_grade,
    run_arms,
)
from saesteer.steering.evaluation.controls import (
    logit_bias,
    mean_difference_plan,
    random_plan,
)
from saesteer.steering.evaluation.damage import Damage, NeutralProbe
from saesteer.steering.evaluation.fluency import Fluency, fluency
from saesteer.steering.evaluation.graded_arms import Answer, Arm
from saesteer.steering.evaluation.intervals import holm, paired_difference, sign_test
from saesteer.steering.evaluation.letters import Letter
from saesteer.steering.grades.grade import DEFINITIONS
from saesteer.steering.grades.log_probs import cross_entropies
from saesteer.steering.plans.part import PlanPart
from saesteer.steering.plans.plan import Plan
from saesteer.steering.tasks.task import Task, load_task

CONTROLS = ("prompt", "random", "meandiff", "logit-bias")
"""What a plan is compared with besides the unsteered model. `prompt` adds two arms: the prompted
instruction, and the plan together with it."""

JudgeCall = Callable[[Task, str, str], Letter | None]
"""From a task, a content and a reply to a grade, or None where there is none. A `Judge` is one."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Settings of a comparison: contents, seeds and controls."""

    controls: tuple[str, ...] = CONTROLS
    n: int = 40
    """Contents of the split."""
    split: str = "test"
    seeds: tuple[int, ...] = (0,)
    """Every content is answered once with each seed."""
    random_draws: int = 2
    """Number of arms with random latents."""
    decoding: Decoding = field(default_factory=Decoding)
    damage: bool = True
    """Also measure each plan on neutral questions."""
    dictionaries: str | None = None
    """Folder of bilingual dictionaries, by which translations are graded; None: that of the
    environment variable SAESTEER_DICTIONARIES, or /usr/share/dictd."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.controls if name not in CONTROLS]
        if unknown:
            raise UsageError(
                f"`controls` must be some of {', '.join(CONTROLS)}, or none, got "
                f"{unknown[0]!r}{meant(unknown[0], CONTROLS)}"
            )
        for name, value in (("`n`", self.n), ("`random_draws`", self.random_draws)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise UsageError(f"`seeds` must be different whole numbers, got {self.seeds}")


@dataclass(frozen=True)
class PairedTest:
    """A test of one arm against another, paired by content."""

    ours: str
    theirs: str
    measure: str
    """`follows`, or what counts as success: `Arm.measure`."""
    difference: float
    low: float
    high: float
    """95 % bootstrap interval over contents."""
    wins: int
    losses: int
    p: float
    """Exact sign test over contents; with one seed, McNemar's exact test."""
    p_holm: float
    """p with Holm's correction over all tests of the task, which are fixed in advance."""


@dataclass(frozen=True)
class Comparison:
    """Everything measured for one task."""

    task: Task
    plans: Mapping[str, Plan]
    config: CompareConfig
    arms: tuple[Arm, ...]
    tests: tuple[PairedTest, ...]
    fluency: Mapping[str, Fluency]
    damage: Mapping[str, Damage]
    notes: tuple[str, ...]
    """What could not be measured, and why."""

    def arm(self, kind: str) -> Arm:
        """The first arm of a kind. Raises KeyError where there is none."""
        for arm in self.arms:
            if arm.kind == kind:
                return arm
        raise KeyError(kind)


def compare(
    model: str | LanguageModel,
    task: str | Path | Task,
    plans: Mapping[str, Plan],
    config: CompareConfig = CompareConfig(),  # noqa: B008 (frozen: one may serve all)
    *,
    sae: SAE | None = None,
    judge: JudgeCall | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = no_progress,
) -> Comparison:
    """Evaluate plans and controls for one task, by default on its test contents.

    Arms, all on the same contents: unsteered; prompted; for each plan: steered, steered and
    prompted, random latents, the mean-difference vector and the logit bias at the same ||delta||.

    Tests, corrected together (Holm): `follows` and `strict` of each steered arm against
    unsteered, prompted and each kind of control; random draws are averaged. Where faithfulness
    could not be graded, `follows and fluent` takes the place of `strict`.

    Args:
        plans: by the names of their arms.
        sae: where random latents are drawn from; by default the SAE that each plan names. Where
            that cannot be opened, random directions are drawn instead, and a note says so.
        judge: also grades every answer.

    Raises:
        UserError: a task without a check or contents, a plan for another model.
        UsageError: controls that need a plan that adds a vector, with another plan.
    """
    if not plans:
        raise UsageError("nothing to evaluate: give at least one plan")
    task = task if isinstance(task, Task) else load_task(task)
    contents = contents_to_grade(task, config.split)[: config.n]
    lm = as_language_model(model, device=device, dtype=dtype)
    notes: list[str] = []
    if len(contents) < config.n:
        notes.append(f"{len(contents)} contents in the {config.split} split, {config.n} asked")
    for plan in plans.values():
        plan.check_model(lm)
    specs = _specs(lm, task, plans, config, sae, contents, notes, progress)
    arms = run_arms(
        lm,
        task,
        contents,
        specs,
        config.decoding,
        config.seeds,
        progress,
        dictionaries=config.dictionaries,
    )
    notes += [f"{name}: {why}" for name, why in arms[0].not_graded.items()]
    if judge is not None:
        gone: list[UserError] = []
        arms = [_judged(arm, task, judge, progress, gone) for arm in arms]
        notes += [f"the judge graded no further answers: {error}" for error in gone]
    tests = paired_tests(arms)
    texts = _fluency(lm, task, arms, progress)
    damage: dict[str, Damage] = {}
    if config.damage:
        probe = NeutralProbe(lm)
        measured = [spec for spec in specs if spec.plan is not None and not spec.prompted]
        for done, spec in enumerate(measured):
            progress("damage on neutral questions", done, len(measured), "plans")
            assert spec.plan is not None
            try:
                damage[spec.name] = probe.measure(spec.plan, flips=spec.kind != "random")
            except UserError as error:
                notes.append(f"{spec.name}: damage not measured: {error}")
        progress("damage on neutral questions", len(measured), len(measured), "plans")
    return Comparison(
        task, dict(plans), config, tuple(arms), tuple(tests), texts, damage, tuple(notes)
    )


def _specs(
    lm: LanguageModel,
    task: Task,
    plans: Mapping[str, Plan],
    config: CompareConfig,
    sae: SAE | None,
    contents: Sequence[str],
    notes: list[str],
    progress: Progress,
) -> list[ArmSpec]:
    specs = [ArmSpec("unsteered", "unsteered")]
    controls = config.controls
    if "prompt" in controls:
        specs.append(ArmSpec("prompted", "prompted", prompted=True))
    for name, plan in plans.items():
        after = "" if len(plans) == 1 else f" ({name})"
        specs.append(ArmSpec(name, "steered", plan=plan))
        if "prompt" in controls:
            both = ArmSpec(f"steered + prompted{after}", "steered+prompted", True, plan)
            specs.append(both)
        if "random" in controls:
            drawn_from = sae if sae is not None else _open_sae(plan, notes)
            what = "random directions" if drawn_from is None else "random latents"
            for draw in range(config.random_draws):
                number = "" if config.random_draws == 1 else f" {draw + 1}"
                specs.append(
                    ArmSpec(
                        f"{what}{number}{after}",
                        "random",
                        plan=random_plan(plan, drawn_from, seed=draw),
                    )
                )
        if "meandiff" in controls:
            vector = mean_difference_plan(lm, plan, task, progress=progress)
            specs.append(ArmSpec(f"mean difference{after}", "meandiff", plan=vector))
        if "logit-bias" in controls:
            bias = logit_bias(lm, plan, contents)
            specs.append(ArmSpec(f"logit bias{after}", "logit-bias", logit_bias=bias))
    return specs


def _open_sae(plan: Plan, notes: list[str]) -> SAE | None:
    """The SAE that a plan names, or None and a note where it cannot be opened."""
    try:
        return load_sae(plan.sae.source)
    except UserError as error:
        notes.append(f"random directions stand in for random latents: {error}")
        return None


def _judged(
    arm: Arm, task: Task, judge: JudgeCall, progress: Progress, gone: list[UserError]
) -> Arm:
    """The arm with the judge's grades; after an error, which goes into `gone`, without."""
    answers: list[Answer] = []
    for done, answer in enumerate(arm.answers):
        progress(f"judge: {arm.name}", done, len(arm.answers), "answers")
        grade = None
        # Answers, rates and damage are there already: a judge that is gone takes nothing of them.
        if not gone:
            try:
                grade = judge(task, answer.content, answer.output)
            except UserError as error:
                gone.append(error)
        answers.append(dataclasses.replace(answer, judged=grade))
    progress(f"judge: {arm.name}", len(arm.answers), len(arm.answers), "answers")
    return dataclasses.replace(arm, answers=tuple(answers))


def paired_tests(arms: Sequence[Arm]) -> list[PairedTest]:
    """Tests of each steered arm against the other kinds of arm, corrected together.

    Arms of random latents of the same plan are averaged per content. Steered arms are not tested
    against each other.
    """
    found: list[tuple[str, str, str, list[float], list[float]]] = []
    steered = [arm for arm in arms if arm.kind == "steered"]
    for ours in steered:
        marker = f" ({ours.name})"
        rivals = [
            arm
            for arm in arms
            if arm.kind in ("unsteered", "prompted")
            or (arm.kind not in ("steered",) and (len(steered) == 1 or arm.name.endswith(marker)))
        ]
        groups: dict[str, list[Arm]] = {}
        for arm in rivals:
            label = f"random{marker if len(steered) > 1 else ''}" if arm.kind == "random" else ""
            groups.setdefault(label or arm.name, []).append(arm)
        for measure in dict.fromkeys(("follows", ours.measure)):
            for name, members in groups.items():
                columns = [arm.shares(measure) for arm in (ours, *members)]
                # Contents that could not be graded in one of the arms are left out of all.
                rows = [row for row in zip(*columns, strict=True) if None not in row]
                if rows:
                    shares = np.asarray(rows, dtype=float)
                    own, theirs = shares[:, 0].tolist(), shares[:, 1:].mean(axis=1).tolist()
                    found.append((ours.name, name, measure, own, theirs))
    signs = [sign_test(own, theirs) for *_, own, theirs in found]
    adjusted = holm([p for _, _, p in signs])
    tests = []
    for (ours_name, name, measure, own, theirs), (wins, losses, p), p_holm in zip(
        found, signs, adjusted, strict=True
    ):
        gap = paired_difference(own, theirs)
        tests.append(
            PairedTest(
                ours_name, name, measure, gap.value, gap.low, gap.high, wins, losses, p, p_holm
            )
        )
    return tests


def _fluency(
    lm: LanguageModel, task: Task, arms: Sequence[Arm], progress: Progress
) -> dict[str, Fluency]:
    """Fluency of every arm. The first is the unsteered one, whose 5th percentile is the floor."""
    floor: float | None = None
    found: dict[str, Fluency] = {}
    for done, arm in enumerate(arms):
        progress("fluency", done, len(arms), "arms")
        rows = [answer.token_ids for answer in arm.answers]
        nats = cross_entropies(lm, rows)
        if floor is None:
            known = [value for value in nats if value is not None]
            floor = float(np.percentile(known, 5)) if known else -math.inf
        found[arm.name] = fluency(
            rows,
            [answer.output for answer in arm.answers],
            nats,
            max_new_tokens=task.max_new_tokens,
            floor=floor,
            thoughts=[answer.thoughts for answer in arm.answers],
        )
    progress("fluency", len(arms), len(arms), "arms")
    return found


def _part_row(part: PlanPart) -> dict[str, Any]:
    fixed = part.does.adds_fixed_vector
    return {
        "layer": part.layer,
        "site": part.site,
        "latents": list(part.ids),
        "lens": [list(latent.lens) for latent in part.latents],
        "k": len(part.latents),
        "method": part.method,
        "unit": part.unit,
        "scale": part.scale,
        "beta": part.beta,
        "scope": part.scope,
        "delta_norm": float(part.added_vector().norm()) if fixed else None,
        "sae": dataclasses.asdict(part.sae),
    }


def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """Everything measured for one task, JSON-ready, without the answers."""
    config = comparison.config
    plans = {}
    for name, plan in comparison.plans.items():
        rows = [_part_row(part) for part in plan.parts]
        facts = rows[0] if len(rows) == 1 else {"parts": rows}
        plans[name] = {**facts, "metrics": dict(plan.metrics)}
    return {
        "task": {
            "name": comparison.task.name,
            "hash": comparison.task.hash,
            "instruction": comparison.task.instruction,
            "check": comparison.task.check_name,
            "check_arguments": dict(comparison.task.check_arguments or {}),
            "max_new_tokens": comparison.task.max_new_tokens,
        },
        "split": config.split,
        "n": len(comparison.arms[0].answers) // comparison.arms[0].seeds,
        "seeds": list(config.seeds),
        "decoding": dataclasses.asdict(config.decoding),
        "grades": {
            "definitions": dict(DEFINITIONS),
            "thresholds": dict(comparison.arms[0].thresholds),
            "not_graded": comparison.arms[0].not_graded,
        },
        "plans": plans,
        "arms": [
            {
                **arm.summary(),
                "fluency": comparison.fluency[arm.name].row(),
                "damage": (
                    comparison.damage[arm.name].row() if arm.name in comparison.damage else None
                ),
            }
            for arm in comparison.arms
        ],
        "tests": [dataclasses.asdict(test) for test in comparison.tests],
        "notes": list(comparison.notes),
    }
