"""Several plans and plans by row, against the whole row computed again; turns and exclusions."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.hooking.arrangement import ByRow
from saesteer.steering.hooking.chats import encode_chat
from saesteer.steering.hooking.hook import steer
from saesteer.steering.hooking.latent_values import with_gate
from saesteer.steering.plans.plan import Plan

from ..whole_row import ONE_ROW, RUNS, Rule, check, make_sae, plan_of, prompts_of, rule_of

pytestmark = pytest.mark.usefixtures("endless")


def vector(plan: Plan) -> Tensor:
    return torch.tensor(plan.doses()) @ plan.directions


def adding(plan: Plan, first: int) -> Rule:
    """The plan's vector from position P + `first` on."""
    return lambda h, P: (torch.arange(len(h)) >= P + first)[:, None] * vector(plan)


def projecting(d: Tensor) -> Rule:
    d = d / d.norm()
    return lambda h, P: (torch.arange(len(h)) >= P - 1)[:, None] * (h @ -d)[:, None] * d


@pytest.mark.parametrize("run", RUNS)
def test_several_plans_edit_in_turn(run: str, lm: LanguageModel) -> None:
    sae = make_sae(lm)
    first, second = plan_of(lm, sae), plan_of(lm, sae, 11, method="project")
    rules = [adding(first, -1), projecting(sae.W_dec[11])]
    report = check(lm, [first, second], lambda row, tokens: rules, run)
    assert len(report.parts) == 2
    assert report.tokens_touched == report.parts[0].tokens_touched > 0


@pytest.mark.parametrize("run", RUNS)
def test_several_plans_with_gates_and_schedules_of_their_own(run: str, lm: LanguageModel) -> None:
    sae, prompts = make_sae(lm), prompts_of(lm)
    plans = [
        with_gate(plan_of(lm, sae, schedule="first:3"), "5 > 0.6", sae),
        with_gate(plan_of(lm, sae, 11, 2, method="set", scope="all"), "2 > 0.4 : 0.1", sae),
        plan_of(lm, sae, 9, unit="rel", scale=-0.3, schedule="decay:1,2"),
    ]

    def rules(row: int, tokens: list[int]) -> list[Rule]:
        return [rule_of(lm, plan, sae, prompts[row], tokens) for plan in plans]

    check(lm, plans, rules, run)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("mixed", [False, True])
def test_each_row_follows_its_own_plan(mixed: bool, run: str, lm: LanguageModel) -> None:
    sae = make_sae(lm)
    a = plan_of(lm, sae)
    b = plan_of(lm, sae, 11, method="project") if mixed else plan_of(lm, sae, 5, scope="generated")
    rule_b = projecting(sae.W_dec[11]) if mixed else adding(b, 0)
    # Runs of one row at a time make a call for each.
    plans = ByRow([b, None, a], (lambda call: [call]) if run in ONE_ROW else None)
    report = check(lm, plans, lambda row, tokens: [[rule_b], [], [adding(a, -1)]][row], run)
    per_prompt = len(report.rows) // 3
    assert all(len(row.positions) == 0 for row in report.rows[per_prompt : 2 * per_prompt])


def test_row_plans_must_be_as_many_as_rows(lm: LanguageModel) -> None:
    plan = plan_of(lm, make_sae(lm))
    with pytest.raises(UsageError, match="plans for 2 rows and the model was given 3"):
        check(lm, ByRow([plan, None]), lambda row, tokens: [], "greedy")
    with pytest.raises(UsageError, match="no plan for any row"):
        with steer(lm, ByRow([None])):
            pass


def test_a_cache_that_is_not_seen_is_an_error(lm: LanguageModel) -> None:
    """Rather than text that is steered at its first token alone."""
    plan = plan_of(lm, make_sae(lm))
    forward = type(lm.model).forward

    class Hidden:
        def __init__(self, cache: Any) -> None:
            self.inner = cache

    def hide(module: Any, args: Any, kwargs: Any) -> Any:
        name = "cache" if "cache" in kwargs else "past_key_values"
        return args, {**kwargs, name: None, "unknown": Hidden(kwargs[name])}

    def show(self: Any, *args: Any, unknown: Any = None, **kwargs: Any) -> Any:
        return forward(self, *args, **{**kwargs, "past_key_values": unknown.inner})

    ids = torch.tensor([[5, 6, 7]])
    handle = lm.model.register_forward_pre_hook(hide, with_kwargs=True)
    lm.model.forward = show.__get__(lm.model)
    with pytest.raises(UserError, match="no cache was found among its arguments"):
        with steer(lm, plan):
            lm.model.generate(ids, max_new_tokens=3, do_sample=False)
    handle.remove()


def test_assistant_turns_of_a_conversation(lm: LanguageModel) -> None:
    chat = encode_chat(
        lm,
        [
            {"role": "user", "content": "yield it"},
            {"role": "assistant", "content": "a name"},
            {"role": "user", "content": "and a tuple"},
        ],
    )
    words = [
        "".join(chat.rendered[a:b] for a, b in chat.offsets[start:end])
        for start, end in chat.replies
    ]
    assert words == ["a name"]
    ((first, end),) = chat.replies
    P = len(chat)
    plan = plan_of(lm, make_sae(lm), scope="assistant")
    for wide, wanted in (
        (False, [*range(first - 1, end), P - 1]),
        (True, None),
    ):
        with torch.no_grad(), steer(lm, plan, prompts=[chat], include_template=wide) as report:
            lm.model(input_ids=torch.tensor([chat.token_ids]))
        positions = report.rows[0].positions.tolist()
        if wanted is not None:
            assert positions == wanted
        else:
            text = "".join(chat.rendered[slice(*chat.offsets[p])] for p in positions)
            header = "<|im_start|>assistant\n"
            assert text == header + "a name<|im_end|>" + header


def test_special_tokens_can_be_left_out_of_any_scope(lm: LanguageModel) -> None:
    plan = plan_of(lm, make_sae(lm))
    ids = torch.tensor([[5, 6, 7, 2, 8, 1]])
    with torch.no_grad(), steer(lm, plan, prompt_lengths=[2], exclude_special=True) as report:
        lm.model(input_ids=ids)
    assert report.rows[0].positions.tolist() == [1, 2, 4]


def test_a_changed_gate_needs_its_own_columns(lm: LanguageModel) -> None:
    sae = make_sae(lm)
    plan = with_gate(plan_of(lm, sae), "5 > 1", sae)
    with pytest.raises(UserError, match="encoder columns of the latents"):
        dataclasses.replace(plan, gate="6 > 1")
    assert with_gate(plan, "").gate_W_enc is None
