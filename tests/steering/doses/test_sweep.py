"""Choosing a dose: what is tried, on how many contents, and what wins."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.model.language_model import LanguageModel, wrap_model
from saesteer.steering.doses import sweep as calibration
from saesteer.steering.doses.sweep import Budget, Grid, Trial, calibrate, pareto, sweep
from saesteer.steering.evaluation.arms import Decoding
from saesteer.steering.evaluation.damage import Damage
from saesteer.steering.hooking.generation import SteeredText
from saesteer.steering.hooking.tracking.finite import NotFiniteError
from saesteer.steering.plans.plan import Plan
from saesteer.steering.tasks.task import Task

from ..small_plans import small_plan

DEV = tuple(f"dev content number {i}" for i in range(10))

TASK = Task(
    name="lists",
    instruction="Use a list",
    variants=(),
    contents={"train": ("a train content",), "dev": DEV, "test": ("a test content",)},
    check_name="keyword",
    check_arguments={"keyword": "indeed"},
    max_new_tokens=9,
)

Setting = tuple[int, float, str]
"""k, scale and scope of a plan."""


@pytest.fixture
def plan(lm: LanguageModel) -> Plan:
    return small_plan(lm, (7, 3, 5, 1))


def setting_of(plan: Plan) -> Setting:
    return len(plan.latents), plan.scale, plan.scope


@dataclasses.dataclass
class Script:
    """Stands in for generation: how each setting does, and what it was asked."""

    right: dict[Setting, int] = dataclasses.field(default_factory=dict)
    """Answers that are strict, counted from the first content; all others follow nothing."""
    degenerate: dict[Setting, int] = dataclasses.field(default_factory=dict)
    """Answers that repeat themselves, counted from the last content."""
    dose: dict[Setting, float] = dataclasses.field(default_factory=dict)
    calls: list[tuple[Setting, list[str]]] = dataclasses.field(default_factory=list)
    rest: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)

    def answer(
        self, lm: LanguageModel, texts: Sequence[str], plan: Plan, *rest: Any
    ) -> list[SteeredText]:
        setting = setting_of(plan)
        self.calls.append((setting, list(texts)))
        self.rest.append(rest)
        answers = []
        for i, text in enumerate(texts):
            broken = i >= len(texts) - self.degenerate.get(setting, 0)
            words = f"Indeed, {text}" if i < self.right.get(setting, 0) else "not at all"
            ids = [1, 2, 3, 4] * 3 if broken else list(range(12))
            dose = self.dose.get(setting, setting[1])
            answers.append(SteeredText(text, words, ids, None, 12, dose))
        return answers


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script()
    monkeypatch.setattr(calibration, "answer", script.answer)
    return script


def test_the_grid_is_every_combination(plan: Plan) -> None:
    grid = Grid(k=(1, 3), scale=(0.5, 2.0), scope=("generation", "all"))
    plans = grid.plans(plan)
    assert [setting_of(p) for p in plans] == [
        (k, scale, scope) for k in (1, 3) for scale in (0.5, 2.0) for scope in ("generation", "all")
    ]
    for candidate in plans:
        k = len(candidate.latents)
        assert candidate.ids == plan.ids[:k]
        assert torch.equal(candidate.directions, plan.directions[:k])


def test_a_k_beyond_the_plan_is_left_out(plan: Plan) -> None:
    assert [len(p.latents) for p in Grid(k=(1, 4, 5, 15), scale=(1.0,)).plans(plan)] == [1, 4]
    # A plan may hold fewer latents than asked for; then all of them are tried.
    assert [len(p.latents) for p in Grid(k=(15, 30), scale=(1.0,)).plans(plan)] == [4]


@pytest.mark.parametrize("empty", ["k", "scale", "scope"])
def test_a_grid_without_values_is_refused(empty: str) -> None:
    with pytest.raises(UsageError, match=f"at least one value of {empty}, got none"):
        Grid(**{empty: ()})  # type: ignore[arg-type]


def test_a_k_that_means_nothing_is_refused(lm: LanguageModel, plan: Plan, script: Script) -> None:
    with pytest.raises(UsageError, match="`top` must be in 1..4 for this plan, got 0"):
        calibrate(lm, TASK, plan, Grid(k=(0,)))


def test_more_successes_win(lm: LanguageModel, plan: Plan, script: Script) -> None:
    grid = Grid(k=(1, 4), scale=(1.0, 2.0))
    script.right = {(1, 1.0, "generation"): 2, (4, 2.0, "generation"): 5}
    script.degenerate = {(4, 2.0, "generation"): 1}
    chosen, trials = calibrate(lm, TASK, plan, grid, rounds=((8, 1),))
    assert setting_of(chosen) == (4, 2.0, "generation")
    assert [setting_of(trial.plan) for trial in trials] == [
        (1, 1.0, "generation"), (1, 2.0, "generation"),
        (4, 1.0, "generation"), (4, 2.0, "generation"),
    ]  # fmt: skip
    assert [trial.arm.success.successes for trial in trials] == [2, 0, 0, 5]


def test_degenerate_answers_are_no_successes(lm: LanguageModel, plan: Plan, script: Script) -> None:
    script.right = {(1, 1.0, "generation"): 8, (1, 2.0, "generation"): 3}
    script.degenerate = {(1, 1.0, "generation"): 6}
    chosen, trials = calibrate(lm, TASK, plan, Grid(k=(1,), scale=(1.0, 2.0)), rounds=((8, 1),))
    assert [trial.arm.success.successes for trial in trials] == [2, 3]
    assert chosen.scale == 2.0


def test_ties_go_to_fewer_broken_answers_then_to_the_gentler_dose_then_to_the_first(
    lm: LanguageModel, plan: Plan, script: Script
) -> None:
    grid = Grid(k=(1, 2), scale=(1.0, 2.0))
    every = [setting_of(p) for p in grid.plans(plan)]
    script.right = dict.fromkeys(every, 3)
    script.degenerate = dict(zip(every, (2, 1, 3, 1), strict=True))
    script.dose = dict(zip(every, (0.1, 0.9, 0.1, 0.4), strict=True))
    assert setting_of(calibrate(lm, TASK, plan, grid, rounds=((8, 1),))[0]) == every[3]
    script.dose = dict.fromkeys(every, 0.5)
    assert setting_of(calibrate(lm, TASK, plan, grid, rounds=((8, 1),))[0]) == every[1]


def test_each_round_halves_the_field(lm: LanguageModel, plan: Plan, script: Script) -> None:
    """Round by round: fewer settings, more contents; the last round decides."""
    grid = Grid(k=(1, 2, 3), scale=(1.0, 2.0))
    every = [setting_of(p) for p in grid.plans(plan)]
    shown: list[tuple[str, int, int, str]] = []
    script.right = dict(zip(every, (0, 3, 1, 2, 3, 0), strict=True))
    chosen, trials = calibrate(
        lm, TASK, plan, grid, rounds=((4, 3), (6, 2), (40, 1)),
        progress=lambda *call: shown.append(call),
    )  # fmt: skip
    # The scale is the dose here, so of the two with three successes the gentler one leads.
    kept = [every[4], every[1], every[3]]
    assert script.calls == [
        *((setting, list(DEV[:4])) for setting in every),
        *((setting, list(DEV[:6])) for setting in kept),
        *((setting, list(DEV)) for setting in kept[:2]),
    ]
    assert len(trials) == 6 + 3 + 2
    assert setting_of(chosen) == every[4]
    stages = [(stage, done, total) for stage, done, total, _ in shown]
    assert stages == [
        *(("choose dose, round 1", done, 6) for done in range(7)),
        *(("choose dose, round 2", done, 3) for done in range(4)),
        *(("choose dose, round 3", done, 2) for done in range(3)),
    ]
    assert {note for _, _, _, note in shown} == {
        f"settings, on {n} contents each" for n in (4, 6, 10)
    }


def test_only_dev_contents_are_answered_and_in_the_way_asked(
    lm: LanguageModel, plan: Plan, script: Script
) -> None:
    decoding = Decoding(temperature=0.3, seed=4)
    calibrate(lm, TASK, plan, Grid(k=(1, 2)), rounds=((3, 2), (99, 1)), decoding=decoding)
    assert {text for _, texts in script.calls for text in texts} == set(DEV)
    assert set(script.rest) == {(TASK.max_new_tokens, decoding)}


def test_a_trial_gives_a_row(lm: LanguageModel, plan: Plan, script: Script) -> None:
    script.right = {(2, 1.5, "all"): 3}
    script.dose = {(2, 1.5, "all"): 0.25}
    grid = Grid(k=(2,), scale=(1.5,), scope=("all",))
    _, (trial,) = calibrate(lm, TASK, plan, grid, rounds=((4, 1),))
    row = trial.row()
    assert (row["k"], row["scale"], row["scope"], row["n"]) == (2, 1.5, "all", 4)
    assert row["success"]["measure"] == "strict"
    assert row["success"]["value"] == row["strict"][0] == row["follows"][0] == 0.75
    assert row["relative_dose"] == 0.25


@pytest.mark.parametrize("rounds", [(), ((0, 1),), ((4, 2), (4, 0))])
def test_rounds_that_leave_nothing_are_refused(
    rounds: tuple[tuple[int, int], ...], lm: LanguageModel, plan: Plan, script: Script
) -> None:
    with pytest.raises(UsageError, match="rounds must be .* pairs, each at least 1"):
        calibrate(lm, TASK, plan, rounds=rounds)
    assert not script.calls


def test_nothing_to_choose_on(lm: LanguageModel, plan: Plan, script: Script) -> None:
    without = dataclasses.replace(TASK, contents={"train": ("a",), "test": ("b",)})
    with pytest.raises(UserError, match="task 'lists' has no contents in its dev split"):
        calibrate(lm, without, plan)
    unchecked = dataclasses.replace(TASK, check_name=None, check_arguments=None)
    with pytest.raises(UserError, match="task 'lists' has no check, so no answer can be graded"):
        calibrate(lm, unchecked, plan)
    assert not script.calls


def test_on_a_model(lm: LanguageModel, plan: Plan) -> None:
    """Nothing replaced: the answers are the steered model's own."""
    task = dataclasses.replace(TASK, check_name="length", check_arguments={"minimum": 1})
    grid = Grid(k=(1, 4), scale=(0.5, 3.0))
    chosen, trials = calibrate(
        lm, task, plan, grid, rounds=((2, 2), (3, 1)), decoding=Decoding(temperature=0.0)
    )
    assert len(trials) == 4 + 2
    assert setting_of(chosen) in [setting_of(p) for p in grid.plans(plan)]
    for trial in trials:
        for answer in trial.arm.answers:
            assert answer.content in DEV and answer.prompt == answer.content
            assert answer.tokens_touched and answer.relative_dose
    stronger = [t.row()["relative_dose"] for t in trials if t.plan.scale == 3.0]
    weaker = [t.row()["relative_dose"] for t in trials if t.plan.scale == 0.5]
    assert min(stronger) > max(weaker)


# --- sweeps: success against damage --------------------------------------------------------------


def damage(kl: float, ce: float = 0.0, outside: float = 0.0) -> Damage:
    return Damage(kl, kl, 1.0, ce, 0.5, 1.2, outside)


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> dict[Setting, Damage]:
    """Stands in for the neutral questions: what each setting costs."""
    table: dict[Setting, Damage] = {}

    class Probe:
        def __init__(self, lm: LanguageModel) -> None:
            pass

        def measure(self, plan: Plan) -> Damage:
            return table.get(setting_of(plan), damage(0.1))

    monkeypatch.setattr(calibration, "NeutralProbe", Probe)
    return table


@pytest.fixture
def tolerant(script: Script, monkeypatch: pytest.MonkeyPatch) -> Script:
    """The script, which also answers without a plan: the unsteered and the prompted arm."""

    def answer(lm: LanguageModel, texts: Sequence[str], plan: Plan | None, *rest: Any) -> Any:
        if plan is None:
            return [SteeredText(text, "not at all", list(range(12))) for text in texts]
        return script.answer(lm, texts, plan, *rest)

    monkeypatch.setattr(calibration, "answer", answer)
    return script


def test_a_budget_leaves_out_settings_before_they_answer(
    lm: LanguageModel, plan: Plan, tolerant: Script, costs: dict[Setting, Damage]
) -> None:
    grid = Grid(k=(1,), scale=(1.0, 2.0, 3.0))
    one, two, three = (setting_of(p) for p in grid.plans(plan))
    costs.update({one: damage(0.1, 2.0), two: damage(0.4, 0.1), three: damage(0.9, 0.3)})
    tolerant.right = {one: 1, two: 3, three: 8}
    found = sweep(lm, TASK, plan, grid, rounds=((8, 1),), budget=Budget("kl", 0.5))
    assert setting_of(found.chosen.plan) == two and found.within_budget
    assert {setting for setting, _ in tolerant.calls} == {one, two}
    assert [setting_of(left) for left, _ in found.skipped] == [three]
    found = sweep(lm, TASK, plan, grid, rounds=((8, 1),), budget=Budget("ce", 0.5))
    assert setting_of(found.chosen.plan) == three
    assert not found.warnings


def test_a_budget_that_nothing_keeps_to_takes_the_cheapest_and_says_so(
    lm: LanguageModel, plan: Plan, tolerant: Script, costs: dict[Setting, Damage]
) -> None:
    grid = Grid(k=(1,), scale=(1.0, 2.0))
    one, two = (setting_of(p) for p in grid.plans(plan))
    costs.update({one: damage(0.7), two: damage(0.6)})
    tolerant.right = {one: 5, two: 4}
    found = sweep(lm, TASK, plan, grid, rounds=((8, 1),), budget=Budget("kl", 0.5))
    assert setting_of(found.chosen.plan) == two and not found.within_budget
    assert (
        "no setting keeps to the budget kl=0.5: the cheapest of them costs 0.6"
        in (found.warnings[0])
    )


def test_a_dose_beyond_the_models_norms_is_warned_of(
    lm: LanguageModel, plan: Plan, tolerant: Script, costs: dict[Setting, Damage]
) -> None:
    grid = Grid(k=(1,), scale=(1.0,))
    (setting,) = (setting_of(p) for p in grid.plans(plan))
    tolerant.right = {setting: 2}
    costs[setting] = damage(0.1, outside=0.4)
    assert not sweep(lm, TASK, plan, grid, rounds=((8, 1),)).warnings
    costs[setting] = damage(0.1, outside=0.8)
    (said,) = sweep(lm, TASK, plan, grid, rounds=((8, 1),)).warnings
    assert said.startswith("the dose leaves the model's norm range: 80 % of the edited residuals")


def test_no_success_at_all_is_warned_of(
    lm: LanguageModel, plan: Plan, tolerant: Script, costs: dict[Setting, Damage]
) -> None:
    (said,) = sweep(lm, TASK, plan, Grid(k=(1,)), rounds=((8, 1),)).warnings
    assert said.startswith("no setting followed the instruction once")


def test_beta_and_several_plans_are_axes_too(
    lm: LanguageModel, plan: Plan, tolerant: Script, costs: dict[Setting, Damage]
) -> None:
    other = dataclasses.replace(plan, layer=2)
    grid = Grid(k=(1,), scale=(1.0,), beta=(-1.0, 2.0))
    found = sweep(lm, TASK, {"one": plan, "two": other}, grid, rounds=((4, 1),))
    rows = found.document()["trials"]
    assert [(row["plan"], row["layer"], row["beta"]) for row in rows] == [
        ("one", 1, -1.0), ("one", 1, 2.0), ("two", 2, -1.0), ("two", 2, 2.0),
    ]  # fmt: skip
    assert found.plan().metrics["sweep"]["settings"] == 4


def test_the_front_holds_what_none_beats(plan: Plan, script: Script, lm: LanguageModel) -> None:
    def trial(kl: float, right: int) -> Trial:
        script.right = {setting_of(plan): right}
        texts = script.answer(lm, DEV[:8], plan)
        arm = calibration.grade_arm("steered", TASK, DEV[:8], texts)
        return Trial(plan, arm, damage(kl))

    cheap, beaten, good, costly, waste = (
        trial(0.1, 2), trial(0.2, 1), trial(0.3, 5), trial(0.9, 7), trial(1.5, 7)
    )  # fmt: skip
    assert pareto([waste, good, beaten, costly, cheap]) == [cheap, good, costly]
    assert pareto([dataclasses.replace(cheap, damage=None)]) == []


@pytest.mark.parametrize(
    ("kind", "limit", "said"),
    [("mse", 1.0, "`budget` must be kl=NATS or ce=NATS"), ("kl", 0.0, "a number above 0")],
)
def test_budgets_that_mean_nothing(kind: str, limit: float, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Budget(kind, limit)


def test_scale_0_is_no_setting() -> None:
    with pytest.raises(UsageError, match="`grid` scale=0 would steer nothing"):
        Grid(scale=(0.0, 1.0))


def test_a_sweep_on_a_model_measures_more_damage_for_more_dose(
    lm: LanguageModel, plan: Plan
) -> None:
    task = dataclasses.replace(TASK, check_name="length", check_arguments={"minimum": 1})
    grid = Grid(k=(4,), scale=(0.2, 4.0))
    found = sweep(lm, task, plan, grid, rounds=((2, 1),), decoding=Decoding(temperature=0.0))
    gentle, strong = (trial.damage for trial in found.trials)
    assert gentle is not None and strong is not None
    assert 0 < gentle.kl < strong.kl and gentle.top1_agreement >= strong.top1_agreement
    assert found.unsteered.relative_dose is None and len(found.prompted.answers) == 2
    frame = found.to_frame()
    assert list(frame["scale"]) == [0.2, 4.0] and list(frame["damage_kl"])[0] == gentle.kl
    assert found.plot().svg.count("<title>layer") == 2  # a point a setting
    assert repr(found).startswith("Sweep(task='") and len(repr(found)) < 200


def test_settings_beyond_the_numbers_of_a_dtype_are_left_out(
    lm: LanguageModel,
) -> None:
    half = wrap_model(copy.deepcopy(lm.model).half(), lm.tokenizer, "tiny")
    ours = small_plan(half, (7, 3))
    grid = Grid(k=(2,), scale=(1.0, 1e6))
    found = sweep(half, TASK, ours, grid, rounds=((8, 1),))
    assert found.chosen.plan.scale == 1.0 and len(found.trials) == 1
    said = [text for text in found.warnings if text.startswith("1 settings were left out")]
    assert len(said) == 1 and "float16" in said[0]
    with pytest.raises(NotFiniteError):
        sweep(half, TASK, ours, Grid(k=(2,), scale=(1e6,)), rounds=((8, 1),))
