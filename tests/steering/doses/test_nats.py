"""The scale at which a plan costs so many nats."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.doses.nats import dose_plan
from saesteer.steering.doses.sweep import Budget
from saesteer.steering.evaluation.damage import Damage, NeutralProbe
from saesteer.steering.plans.directions import plan_from_directions
from saesteer.steering.plans.plan import Plan
from saesteer.steering.plans.plan_file import load_plan, save_plan

TEXTS = ["What is it?", "Where did the heron stand for so long?", "Who?"]


@pytest.fixture
def plan(lm: LanguageModel) -> Plan:
    direction = torch.randn(1, lm.d_model, generator=torch.Generator().manual_seed(0))
    return plan_from_directions(lm, direction, layer=1)


@pytest.mark.parametrize("scale", [1.0, 30.0, 0.01, -1.0])
@pytest.mark.parametrize(("kind", "nats"), [("ce", 0.1), ("kl", 0.3)])
def test_the_dose_that_was_asked_for_is_the_dose_measured(
    kind: str, nats: float, scale: float, lm: LanguageModel, plan: Plan, tmp_path: Any
) -> None:
    start = dataclasses.replace(plan, scale=scale)
    found = dose_plan(lm, start, Budget(kind, nats), texts=TEXTS, tolerance=0.02)
    assert (found.plan.scale > 0) == (scale > 0)
    # Measured again from the plan alone, on the same texts.
    from saesteer.steering.evaluation.damage import Question

    probe = NeutralProbe(lm, [Question(text, ()) for text in TEXTS], max_new_tokens=24)
    again = probe.measure(found.plan)
    cost = again.delta_ce if kind == "ce" else again.kl
    assert cost == pytest.approx(nats, rel=0.021)
    assert cost == pytest.approx(found.cost, rel=1e-3)
    save_plan(found.plan, tmp_path)
    facts = load_plan(tmp_path).metrics["dose"]
    assert facts == {
        "unit": kind, "asked": nats, "measured": pytest.approx(cost), "texts": 3,
        "scale": found.plan.scale, "relative_dose": pytest.approx(again.relative_dose),
        "on": "given texts",
    }  # fmt: skip
    assert len(found.trials) < 25


def measured(monkeypatch: pytest.MonkeyPatch, cost: Callable[[float], float]) -> None:
    """Make a plan's cost a function of its scale."""

    def measure(self: NeutralProbe, plan: Plan, *, flips: bool = False) -> Damage:
        return Damage(0.0, 0.0, 1.0, cost(plan.scale), abs(plan.scale), 1.0, 0.0)

    monkeypatch.setattr(NeutralProbe, "measure", measure)


def test_a_dose_beyond_reach_is_an_error(
    lm: LanguageModel, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, lambda s: 2 * s / (1 + s))
    with pytest.raises(UserError, match=r"`dose` ce=3 is out of reach: at most 2 nats") as error:
        dose_plan(lm, plan, Budget("ce", 3.0), texts=TEXTS)
    assert "\n" not in str(error.value)
    assert dose_plan(lm, plan, Budget("ce", 1.5), texts=TEXTS).plan.scale == pytest.approx(3, 0.2)


def test_a_cost_that_jumps_over_the_dose_is_an_error(
    lm: LanguageModel, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, lambda s: 0.0 if s < 0.7 else 5.0)
    with pytest.raises(UserError, match="jumps to 5 between scale 0.7 and 0.7"):
        dose_plan(lm, plan, Budget("ce", 1.0), texts=TEXTS)


def test_a_cost_that_falls_before_it_rises_is_found(
    lm: LanguageModel, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, lambda s: s * s - 0.3 * s if s < 9 else float("nan"))
    found = dose_plan(lm, dataclasses.replace(plan, scale=50.0), Budget("ce", 0.5), texts=TEXTS)
    scale = found.plan.scale
    assert scale * scale - 0.3 * scale == pytest.approx(0.5, rel=0.05)


def test_what_does_not_grow_with_its_scale_has_no_dose(lm: LanguageModel, plan: Plan) -> None:
    for method in ("set", "max", "scale", "ablate", "project"):
        values = {} if method in ("ablate", "project") else {"scale": 2.0}
        other = dataclasses.replace(plan, method=method, **values)
        with pytest.raises(UsageError, match="`dose` needs an edit that grows with its scale"):
            dose_plan(lm, other, Budget("ce", 0.1), texts=TEXTS)
    with pytest.raises(UsageError, match="tolerance must be in"):
        dose_plan(lm, plan, Budget("ce", 0.1), texts=TEXTS, tolerance=0.0)
