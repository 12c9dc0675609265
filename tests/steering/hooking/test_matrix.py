"""Every edit, scope, schedule and gate in every way to run `generate`, against `whole_row`."""

import random
from typing import Any

import pytest

from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.hooking.latent_values import with_gate
from saesteer.steering.plans.plan import Plan

from ..whole_row import CLOSE, INSTRUCTION, RUNS, check, make_sae, plan_of, prompts_of, rule_of

pytestmark = pytest.mark.usefixtures("endless")

EDITS: dict[str, dict[str, Any]] = {
    "add": {},
    "add sigma": {"unit": "sigma", "scale": 2.0},
    "add rel": {"unit": "rel", "scale": 0.4},
    "keep norm": {"method": "add-keep-norm"},
    "set": {"method": "set"},
    "min": {"method": "min"},
    "max": {"method": "max", "scale": 0.2},
    "scale": {"method": "scale", "scale": 2.5},
    "ablate": {"method": "ablate"},
    "project": {"method": "project"},
}
SCOPES = (
    "generation", "generated", "prompt", "all", "last-prompt", "first:3", "span:4-12",
    "after-instruction", "assistant", "tail", "replies",
)  # fmt: skip
SCHEDULES = ("constant", "first:2", "linear:4", "decay:0.5,3", "steps:0=1.5,2=0.4")
GATES = ("", "5 > 0.6 & !(2 > 1) | 9 > 2", "5 > 1 : 0.1 | 2 > 1.5 : 0.2", "prompt: 14 > 1")
ARCHITECTURES = ("standard", "jumprelu", "topk")


def make(
    lm: LanguageModel, sae: SAE, edit: str, scope: str, schedule: str = "constant", gate: str = ""
) -> Plan:
    plan = plan_of(lm, sae, **EDITS[edit], scope=scope, schedule=schedule)
    return with_gate(plan, gate, sae) if gate else plan


def agrees(
    lm: LanguageModel, sae: SAE, plan: Plan, run: str, close: dict[str, float] = CLOSE
) -> Any:
    prompts = prompts_of(lm)

    def rules(i: int, tokens: list[int]) -> Any:
        return [rule_of(lm, plan, sae, prompts[i], tokens)]

    more = {"sae": sae} if sae.spec.architecture == "topk" else {}
    return check(lm, plan, rules, run, close, instructions=[INSTRUCTION], **more)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_in_every_run(edit: str, run: str, lm: LanguageModel) -> None:
    sae = make_sae(lm)
    report = agrees(lm, sae, make(lm, sae, edit, "all"), run)
    assert report.tokens_touched > 0


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("scope", SCOPES)
def test_every_scope_in_every_run(scope: str, run: str, lm: LanguageModel) -> None:
    sae = make_sae(lm)
    report = agrees(lm, sae, make(lm, sae, "set", scope), run)
    assert report.tokens_touched > 0


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("schedule", SCHEDULES[1:])
def test_every_schedule_in_every_run(schedule: str, run: str, lm: LanguageModel) -> None:
    sae = make_sae(lm)
    agrees(lm, sae, make(lm, sae, "add", "generation", schedule), run)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("gate", GATES[1:])
@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_every_gate_in_every_run(architecture: str, gate: str, run: str, lm: LanguageModel) -> None:
    sae = make_sae(lm, architecture)
    report = agrees(lm, sae, make(lm, sae, "add", "generation", gate=gate), run)
    # Both outcomes occur, or nothing would have been tested. (What is sampled is for chance.)
    assert report.tokens_gated_off > 0 and (report.tokens_touched > 0 or "sampled" in run)


def drawn(lm: LanguageModel, seed: int) -> tuple[SAE, Plan, str]:
    """A combination of everything, by chance."""
    chance = random.Random(seed)
    sae = make_sae(lm, chance.choice(ARCHITECTURES))
    plan = make(
        lm, sae, chance.choice(list(EDITS)), chance.choice(SCOPES),
        chance.choice(SCHEDULES), chance.choice(GATES),
    )  # fmt: skip
    return sae, plan, chance.choice(list(RUNS))


@pytest.mark.parametrize("seed", range(60))
def test_combinations_drawn_by_chance(seed: int, lm: LanguageModel) -> None:
    sae, plan, run = drawn(lm, seed)
    agrees(lm, sae, plan, run)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_a_thousand_combinations_drawn_by_chance(block: int, lm: LanguageModel) -> None:
    for seed in range(1000 + 100 * block, 1100 + 100 * block):
        sae, plan, run = drawn(lm, seed)
        try:
            agrees(lm, sae, plan, run)
        except AssertionError as error:
            what = (seed, run, plan.method, plan.unit, plan.scope, plan.schedule, plan.gate)
            raise AssertionError(f"{what}: {error}") from error
