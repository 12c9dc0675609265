"""Plans of several parts against the whole row computed again, layer by layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.hooking import group_hook
from saesteer.steering.hooking.arrangement import ByRow
from saesteer.steering.hooking.edits import Edit, EditPositions
from saesteer.steering.hooking.generation import generate_steered
from saesteer.steering.hooking.hook import steer
from saesteer.steering.hooking.latent_changes import read_back
from saesteer.steering.hooking.latent_values import with_gate
from saesteer.steering.hooking.scope import NO_END, RowInfo, Scope
from saesteer.steering.plans.plan import Plan
from saesteer.steering.plans.plan_file import load_plan, save_plan

from ..whole_row import (
    CLOSE,
    INSTRUCTION,
    ONE_ROW,
    RUNS,
    STEPS,
    TEXTS,
    check,
    make_sae,
    plan_of,
    prompts_of,
    rule_of,
)

pytestmark = pytest.mark.usefixtures("endless")


def joined(*plans: Plan) -> Plan:
    return Plan(model=plans[0].model, parts=[plan.part for plan in plans])


def phases(lm: LanguageModel) -> tuple[Plan, list[SAE]]:
    """A prompt's part and a replies' part, at two layers, of two SAEs."""
    saes = [make_sae(lm), make_sae(lm, "jumprelu", seed=1, layer=3)]
    plan = joined(
        plan_of(lm, saes[0], method="set", scope="prompt"),
        plan_of(lm, saes[1], 11, 2, scope="generated", scale=0.5, schedule="linear:4"),
    )
    return plan, saes


def crowd(lm: LanguageModel) -> tuple[Plan, list[SAE]]:
    """Two parts at one layer, whose order matters, after one that reads a TopK SAE and a gate."""
    saes = [make_sae(lm, "topk", layer=0), make_sae(lm, seed=1), make_sae(lm, seed=2)]
    plan = joined(
        with_gate(plan_of(lm, saes[0], method="min", scope="all"), "5 > 0.6 | 9 > 2"),
        plan_of(lm, saes[1], 11, unit="rel", scale=0.4),
        plan_of(lm, saes[2], 4, method="project", scope="after-instruction"),
    )
    return plan, saes


def rules_of(
    lm: LanguageModel, plan: Plan, saes: Sequence[SAE], row: int, tokens: list[int]
) -> Any:
    prompt = prompts_of(lm)[row]
    return [
        (part.layer, rule_of(lm, plan.only(number), sae, prompt, tokens))
        for number, (part, sae) in enumerate(zip(plan.parts, saes, strict=True))
    ]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("make", [phases, crowd])
def test_all_parts_of_a_plan_edit_in_every_run(
    make: Any, run: str, lm: LanguageModel, tmp_path: Path
) -> None:
    plan, saes = make(lm)
    save_plan(plan, tmp_path)

    def rules(row: int, tokens: list[int]) -> Any:
        return rules_of(lm, plan, saes, row, tokens)

    more = {"sae": saes} if make is crowd else {}
    report = check(lm, load_plan(tmp_path), rules, run, instructions=[INSTRUCTION], **more)
    assert len(report.parts) == len(plan.parts)
    assert all(part.tokens_touched > 0 for part in report.parts)


def test_the_report_says_what_each_part_did(lm: LanguageModel) -> None:
    plan, _ = phases(lm)
    prompts = prompts_of(lm)
    report = check(lm, plan, lambda row, tokens: rules_of(lm, *phases(lm), row, tokens), "greedy")
    first, second = report.parts
    special = set(lm.special_ids.tolist())
    text = [[p for p in range(*prompt.user_span) if prompt.token_ids[p] not in special]
            for prompt in prompts]  # fmt: skip
    assert [row.positions.tolist() for row in first.rows] == text
    # The last new token is never run.
    replies = [list(range(len(prompt), len(prompt) + STEPS - 1)) for prompt in prompts]
    # `linear:4` gives the fourth new token nothing.
    assert [row.positions.tolist() for row in second.rows] == [reply[:3] for reply in replies]
    assert report.tokens_touched == first.tokens_touched + second.tokens_touched
    texts = [prompt.text for prompt in prompts]
    answers = generate_steered(lm, texts, plan, max_new_tokens=STEPS)
    assert sum(answer.tokens_touched for answer in answers) == report.tokens_touched


@pytest.mark.parametrize("run", RUNS)
def test_rows_may_have_plans_of_different_numbers_of_parts(run: str, lm: LanguageModel) -> None:
    two, saes = phases(lm)
    # In the other order, so that the kinds of the first parts differ too.
    turned = Plan(model=two.model, parts=two.parts[::-1])
    one = two.only(1)
    plans = ByRow([two, one, turned], (lambda call: [call]) if run in ONE_ROW else None)

    def rules(row: int, tokens: list[int]) -> Any:
        if row == 1:
            return rules_of(lm, one, saes[1:], row, tokens)
        return rules_of(lm, two, saes, row, tokens)

    check(lm, plans, rules, run)


def test_parts_edit_as_plans_in_turn_do(lm: LanguageModel) -> None:
    plan, saes = crowd(lm)
    separate = [plan.only(number) for number in range(3)]
    ids = torch.tensor([[5, 6, 7, 8]])
    options: dict[str, Any] = {"scope": None, "sae": saes, "instructions": ["x"]}
    separate = [one.with_changes(scope="all") for one in separate]
    together = Plan(model=plan.model, parts=[one.part for one in separate])
    with torch.no_grad():
        with steer(lm, separate, **options):
            wanted = lm.model(input_ids=ids).logits
        with steer(lm, together, **options):
            assert torch.equal(lm.model(input_ids=ids).logits, wanted)


def test_a_change_that_has_several_meanings_is_an_error(lm: LanguageModel) -> None:
    plan, _ = phases(lm)
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(UsageError, match=r"`scale` is not the same.*part 0 \(layer 1, prompt\), "):
        with steer(lm, plan, scale=2.0):
            pass
    with steer(lm, plan, scale=0.0) as report:
        lm.model(input_ids=ids)
    assert report.tokens_touched == 0 and len(report.parts) == 2
    even = plan.with_changes(part=1, scale=1.0)
    assert [part.scale for part in even.with_changes(scale=3.0).parts] == [3.0, 3.0]


def test_one_part_may_be_switched_off(lm: LanguageModel) -> None:
    plan, saes = phases(lm)
    off = plan.with_changes(part=0, scale=0.0)
    alone = plan.only(1)

    def rules(row: int, tokens: list[int]) -> Any:
        return rules_of(lm, alone, saes[1:], row, tokens)

    report = check(lm, off, rules, "greedy")
    assert [part.tokens_touched > 0 for part in report.parts] == [False, True]


def test_a_part_that_covers_no_token_is_an_error(lm: LanguageModel) -> None:
    plan, _ = phases(lm)
    with pytest.raises(UserError, match="touched no token: `scope` generated covers"):
        with torch.no_grad(), steer(lm, plan):
            lm.model(input_ids=torch.tensor([[5, 6, 7]]))


def test_an_sae_that_is_not_a_parts_own_is_refused(lm: LanguageModel) -> None:
    plan, saes = phases(lm)
    with pytest.raises(UserError, match="is not the one the plan was made from"):
        with steer(lm, plan, sae=saes[0]):
            pass


class ByPlace(Edit):
    """A vector of its own for each of the prompt's last three tokens, and one for the replies."""

    def __init__(self, d_model: int) -> None:
        self.vectors = torch.randn(4, d_model, generator=torch.Generator().manual_seed(3))

    def place(self, p: Tensor, P: Any) -> Tensor:
        return (p - P + 3).clamp(0, 3)

    def delta(self, h: Tensor, where: EditPositions) -> Tensor:
        assert where.tokens is not None and where.prompt_lengths is not None
        return self.vectors[self.place(where.tokens.p, where.prompt_lengths[:, None])]


@pytest.mark.parametrize("run", RUNS)
def test_an_edit_may_depend_on_the_place_in_the_prompt(
    run: str, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = ByPlace(lm.d_model)
    monkeypatch.setattr(group_hook, "make_edit", lambda *_: edit)
    monkeypatch.setattr(Scope, "row", lambda self, P, prompt=None: RowInfo(P - 3, NO_END))

    def rule(h: Tensor, P: int) -> Tensor:
        p = torch.arange(len(h))
        return edit.vectors[edit.place(p, P)] * (p >= P - 3)[:, None]

    check(lm, plan_of(lm, make_sae(lm)), lambda row, tokens: [rule], run)


def test_latents_of_every_part_are_read_back(lm: LanguageModel) -> None:
    plan, saes = phases(lm)
    changes = read_back(lm, plan, TEXTS, max_new_tokens=STEPS, sae=saes)
    assert [(change.part, change.id) for change in changes] == [(0, 3), (0, 7), (1, 11), (1, 2)]
    doses = plan.only(0).doses()
    for change, dose in zip(changes[:2], doses, strict=True):
        assert change.asked == pytest.approx(dose - change.before, **_near)
    assert [change.asked for change in changes[2:]] == pytest.approx(plan.only(1).doses())
    # What the first part does is what it does alone.
    alone = read_back(lm, plan.only(0), TEXTS, max_new_tokens=STEPS)
    assert [c.before for c in alone] == pytest.approx([c.before for c in changes[:2]], **_near)


_near = {"rel": CLOSE["rtol"], "abs": CLOSE["atol"]}
