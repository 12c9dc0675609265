"""Two phases: the prompt's tail put to plain states plus a vector, and replies; in every run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.model.language_model import LanguageModel, wrap_model
from saesteer.sae.text.prompts import encode_prompt, pad_left, pad_right
from saesteer.steering.hooking.arrangement import ByRow
from saesteer.steering.hooking.chats import encode_chat
from saesteer.steering.hooking.generation import generate_steered
from saesteer.steering.hooking.hook import steer
from saesteer.steering.hooking.latent_changes import read_back
from saesteer.steering.hooking.latent_values import with_gate
from saesteer.steering.plans.condition import Condition
from saesteer.steering.plans.plan import Plan
from saesteer.steering.plans.plan_file import load_plan, save_plan

from ..whole_row import (
    CLOSE,
    ONE_ROW,
    RUNS,
    STEPS,
    TEXTS,
    check,
    make_sae,
    plain,
    plan_of,
    prompts_of,
    reference,
    rule_of,
)

pytestmark = pytest.mark.usefixtures("endless")


def by_place(places: int, n: int = 2, seed: int = 5) -> Tensor:
    return torch.randn(places, n, generator=torch.Generator().manual_seed(seed))


def tail(lm: LanguageModel, sae: SAE, places: int | None = None, **fields: Any) -> Plan:
    options = {"method": "set-to", "scope": "tail", **fields}
    plan = plan_of(lm, sae, **options)
    return plan if places is None else plan.with_changes(by_place=by_place(places))


def joined(*plans: Plan, when: Condition | None = None) -> Plan:
    parts = [part for plan in plans for part in plan.parts]
    return Plan(model=plans[0].model, parts=parts, when=when)


def two_phases(lm: LanguageModel, seed: int = 0, **fields: Any) -> tuple[Plan, list[SAE]]:
    """The tail at layers 0, 1 and 3 and replies at layers 1 and 2."""
    saes = [make_sae(lm, seed=seed + layer, layer=layer) for layer in (0, 1, 1, 2, 3)]
    plan = joined(
        tail(lm, saes[0], 4),
        tail(lm, saes[1]),
        plan_of(lm, saes[2], 9, scope="replies", scale=0.4, schedule="steps:0=2,2=1,4=0.3"),
        plan_of(lm, saes[3], 4, 5, scope="replies", scale=0.3),
        tail(lm, saes[4], 2, scale=1.5),
        **fields,
    )
    return plan, saes


def rules_of(lm: LanguageModel, plan: Plan, saes: list[SAE], row: int, tokens: list[int]) -> Any:
    return [
        (part.layer, rule_of(lm, plan.only(number), sae, prompts_of(lm)[row], tokens))
        for number, (part, sae) in enumerate(zip(plan.parts, saes, strict=True))
    ]


def splitting(lm: LanguageModel, layer: int = 2) -> Condition:
    """A condition that holds for some of the prompts and not for others."""
    last = torch.stack([plain(lm, layer, prompt.token_ids)[-1] for prompt in prompts_of(lm)])
    weight = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(1))
    values = (last @ weight).sort().values
    return Condition(layer=layer, weight=weight, bias=-float(values[:2].mean()))


@pytest.mark.parametrize("run", RUNS)
def test_both_phases_in_every_run(run: str, lm: LanguageModel, tmp_path: Path) -> None:
    plan, saes = two_phases(lm)
    save_plan(plan, tmp_path)
    report = check(
        lm, load_plan(tmp_path), lambda row, tokens: rules_of(lm, plan, saes, row, tokens), run
    )
    assert all(part.tokens_touched > 0 for part in report.parts)


@pytest.mark.parametrize("run", ["greedy", "chunked prefill", "beams", "assistant"])
@pytest.mark.parametrize("scope", ["prompt", "last-prompt", "span:4-12"])
def test_set_to_at_every_scope_inside_the_prompt(scope: str, run: str, lm: LanguageModel) -> None:
    saes = [make_sae(lm, layer=0), make_sae(lm, seed=1, layer=2)]
    plan = joined(
        plan_of(lm, saes[0], scope="all"),
        tail(lm, saes[1], None if scope == "prompt" else 2, scope=scope),
    )
    check(lm, plan, lambda row, tokens: rules_of(lm, plan, saes, row, tokens), run)


@pytest.mark.parametrize(
    "run", ["greedy", "static cache", "chunked prefill", "beams", "early exit"]
)
@pytest.mark.parametrize("fields", [{"method": "add"}, {"method": "add-keep-norm"}])
def test_adding_by_place_in_the_tail(fields: Any, run: str, lm: LanguageModel) -> None:
    sae = make_sae(lm)
    plan = tail(lm, sae, 3, **fields)
    check(lm, plan, lambda row, tokens: rules_of(lm, plan, [sae], row, tokens), run)


@pytest.mark.parametrize("run", RUNS)
def test_a_condition_decides_for_each_row(run: str, lm: LanguageModel, tmp_path: Path) -> None:
    plan, saes = two_phases(lm, when=splitting(lm))
    save_plan(plan, tmp_path)
    report = check(
        lm, load_plan(tmp_path), lambda row, tokens: rules_of(lm, plan, saes, row, tokens), run
    )
    open_rows = [len(row.positions) > 0 for row in report.rows]
    assert any(open_rows) and not all(open_rows)
    assert all(bool(row.gated_off) != bool(len(row.positions)) for row in report.rows)


@pytest.mark.parametrize("run", RUNS)
def test_rows_with_two_phases_of_their_own(run: str, lm: LanguageModel) -> None:
    plans = [two_phases(lm), None, two_phases(lm, seed=7, when=splitting(lm))]
    calls = (lambda n: [n]) if run in ONE_ROW else None
    row_plans = ByRow([one and one[0] for one in plans], calls)

    def rules(row: int, tokens: list[int]) -> Any:
        one = plans[row]
        return [] if one is None else rules_of(lm, *one, row, tokens)

    check(lm, row_plans, rules, run)


def test_alike_parts_of_rows_share_a_hook(lm: LanguageModel) -> None:
    first, _ = two_phases(lm)
    second = joined(*(first.only(n) for n in (1, 2, 3, 4)))
    with torch.no_grad(), steer(lm, ByRow([first, second, None]), prompts=prompts_of(lm)) as report:
        generate(lm)
    assert len(report.parts) == len(first.parts)


def generate(lm: LanguageModel) -> Any:
    ids, mask = pad_left(lm, [prompt.token_ids for prompt in prompts_of(lm)])
    return lm.model.generate(
        ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=lm.pad_id
    )


@pytest.mark.parametrize("side", [pad_left, pad_right])
@pytest.mark.parametrize("known", [True, False])
def test_forward_passes_with_answers_in_them(side: Any, known: bool, lm: LanguageModel) -> None:
    plan, saes = two_phases(lm)
    prompts = prompts_of(lm)
    rows = [[*prompt.token_ids, *range(5, 9 + n)] for n, prompt in enumerate(prompts)]
    ids, mask = side(lm, rows)
    lengths = {"prompts": prompts} if known else {"prompt_lengths": [len(p) for p in prompts]}
    with torch.no_grad(), steer(lm, plan, **lengths):
        logits = lm.model(input_ids=ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        wanted = reference(lm, row, len(prompts[i]), rules_of(lm, plan, saes, i, row))
        torch.testing.assert_close(logits[i][mask[i] == 1], wanted, **CLOSE)


def test_a_loop_with_a_cache_of_ones_own(lm: LanguageModel) -> None:
    plan, saes = two_phases(lm)
    prompt, new = prompts_of(lm)[0], [5, 9, 13]
    found, cache = [], None
    with torch.no_grad(), steer(lm, plan):
        for piece in (prompt.token_ids, *([token] for token in new)):
            out = lm.model(torch.tensor([piece]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits[0])
    row = [*prompt.token_ids, *new]
    wanted = reference(lm, row, len(prompt), rules_of(lm, plan, saes, 0, row))
    torch.testing.assert_close(torch.cat(found), wanted, **CLOSE)


def test_the_last_turn_of_a_conversation_has_the_tail(lm: LanguageModel) -> None:
    turns = [
        {"role": "user", "content": "yield it"},
        {"role": "assistant", "content": "a name"},
        {"role": "user", "content": "and a tuple"},
    ]
    chat = encode_chat(lm, turns)
    one = encode_prompt(lm, "and a tuple", chat=True)
    after = len(one) - one.user_span[1]
    plan = tail(lm, make_sae(lm))
    ids = torch.tensor([chat.token_ids])
    for known in ({"prompts": [chat]}, {}):
        with torch.no_grad(), steer(lm, plan, **known) as report:
            lm.model(input_ids=ids)
        wanted = list(range(len(chat) - after, len(chat)))
        assert report.rows[0].positions.tolist() == wanted and after > 2


def test_equal_rows_are_read_once(lm: LanguageModel) -> None:
    plans = [two_phases(lm)[0], tail(lm, make_sae(lm)), two_phases(lm, seed=3)[0]]
    texts, seen = [TEXTS[0], TEXTS[1], TEXTS[0]], []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(len(kwargs["input_ids"]))

    handle = lm.text_model.register_forward_pre_hook(look, with_kwargs=True)
    together = generate_steered(lm, texts, ByRow(plans), max_new_tokens=3)
    handle.remove()
    assert seen[:2] == [2, 3]
    alone = [
        generate_steered(lm, [text], plan, max_new_tokens=3)[0].completion
        for text, plan in zip(texts, plans, strict=True)
    ]
    assert [answer.completion for answer in together] == alone


def test_embeddings_in_place_of_tokens(lm: LanguageModel) -> None:
    plan, _ = two_phases(lm)
    ids = torch.tensor([prompts_of(lm)[0].token_ids])
    embeds = lm.model.get_input_embeddings()(ids).detach()
    options = {
        "max_new_tokens": 4, "do_sample": False, "pad_token_id": lm.pad_id,
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    with torch.no_grad(), steer(lm, plan):
        wanted = lm.model.generate(ids, **options)[0, ids.shape[1] :]
        assert torch.equal(lm.model.generate(inputs_embeds=embeds, **options)[0], wanted)


def test_plain_is_plain_inside_another_context_too(lm: LanguageModel) -> None:
    """What the outer context edits is no part of the plain state that the inner one returns to."""
    sae = make_sae(lm, layer=3)
    outer, inner = plan_of(lm, make_sae(lm, layer=1), scope="all"), tail(lm, sae)
    ids = torch.tensor([prompts_of(lm)[0].token_ids])
    with torch.no_grad(), steer(lm, inner):
        alone = lm.model(ids).logits[0, -1]
    with torch.no_grad(), steer(lm, outer) as report, steer(lm, inner):
        torch.testing.assert_close(lm.model(ids).logits[0, -1], alone, **CLOSE)
    assert report.passes == 1


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen2"])
def test_families(family: str, tiny_lm: Any) -> None:
    lm = wrap_model(*tiny_lm(family))
    plan, _ = two_phases(lm)
    rows = [*range(5, 12)], [*range(6, 16)]
    ids, mask = pad_left(lm, rows)
    changed = {"tail": "last-prompt"}
    plan = plan.with_changes(
        parts=[replace(part, scope=changed.get(part.scope, part.scope)) for part in plan.parts]
    )
    with torch.no_grad(), steer(lm, plan):
        together = lm.model.generate(
            ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=lm.pad_id,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        for i, row in enumerate(rows):
            alone = lm.model.generate(
                torch.tensor([row]), max_new_tokens=4, do_sample=False, pad_token_id=lm.pad_id,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            for a, b in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(a[i], b[0], **CLOSE)


def test_a_closed_condition_is_no_error_and_leaves_the_text_alone(lm: LanguageModel) -> None:
    never = Condition(layer=1, weight=torch.zeros(lm.d_model), bias=-1.0)
    plan, _ = two_phases(lm, when=never)
    answers = generate_steered(lm, list(TEXTS), plan, max_new_tokens=STEPS, baseline=True)
    assert all(answer.completion == answer.baseline for answer in answers)
    assert all(answer.tokens_touched == 0 < answer.tokens_gated_off for answer in answers)


def test_a_condition_and_a_gate_have_to_hold_together(lm: LanguageModel) -> None:
    sae = make_sae(lm)
    gated = with_gate(plan_of(lm, sae, scope="all"), "5 > 0.6", sae)
    counts = {}
    for name, when in (("gate", None), ("both", splitting(lm))):
        with torch.no_grad(), steer(lm, gated.with_changes(when=when), prompts=prompts_of(lm)) as r:
            generate(lm)
        counts[name] = [len(row.positions) for row in r.rows]
    kept = [both or 0 for both in counts["both"]]
    assert 0 in kept and any(kept)
    assert all(both in (0, gate) for both, gate in zip(kept, counts["gate"], strict=True))


def test_gradients_reach_what_is_not_put_to_plain_states(lm: LanguageModel) -> None:
    plan = tail(lm, make_sae(lm, layer=3), layer=3)
    prompt = prompts_of(lm)[0]
    embeds = lm.model.get_input_embeddings()(torch.tensor([prompt.token_ids])).detach()
    embeds.requires_grad_()
    with steer(lm, plan):
        lm.model(inputs_embeds=embeds).logits[0, -1].sum().backward()
    # After the last block only the last token reaches its logits, and it was replaced.
    assert embeds.grad is not None and float(embeds.grad.abs().max()) == 0


def test_parts_outside_the_prompt_cannot_be_put_to_plain_states(lm: LanguageModel) -> None:
    with pytest.raises(UsageError, match="`method` set-to are for positions of the prompt"):
        plan_of(lm, make_sae(lm), method="set-to", scope="generation")
    with pytest.raises(UsageError, match="doses by place in the prompt are for positions"):
        plan_of(lm, make_sae(lm)).with_changes(by_place=by_place(2))
    with pytest.raises(UsageError, match="weigh a vector that is added, and this part"):
        tail(lm, make_sae(lm), method="set").with_changes(by_place=by_place(2))


def test_a_prompt_without_a_tail_is_an_error(lm: LanguageModel) -> None:
    plan = tail(lm, make_sae(lm))
    with pytest.raises(UserError, match="nothing follows the text of the prompt 'yield it'"):
        generate_steered(lm, ["yield it"], plan, chat=False)
    with pytest.raises(UserError, match="row 0 does not end with what the chat template"):
        with torch.no_grad(), steer(lm, plan):
            lm.model(torch.tensor([[5, 6, 7, 8, 9, 10, 11]]))
    lm.tokenizer.chat_template = None
    with pytest.raises(UsageError, match="has no template, or one that writes nothing there"):
        with steer(lm, plan):
            pass


def test_a_prompt_in_pieces_is_refused(lm: LanguageModel) -> None:
    prompt = prompts_of(lm)[0].token_ids
    with pytest.raises(UserError, match="need the whole prompt in the first pass"):
        with torch.no_grad(), steer(lm, tail(lm, make_sae(lm), scope="last-prompt"),
                                    prompt_lengths=[len(prompt)]):  # fmt: skip
            lm.model(torch.tensor([prompt[:4]]), use_cache=True)


def test_latents_of_both_phases_are_read_back(lm: LanguageModel) -> None:
    plan, _ = two_phases(lm)
    changes = read_back(lm, plan, list(TEXTS), max_new_tokens=STEPS)
    assert [change.id for change in changes] == [i for part in plan.parts for i in part.ids]
    assert all(change.tokens > 0 for change in changes)
    # What has doses by place, or starts from plain states, asks for no change of one size.
    asked = [change.asked is not None for change in changes]
    assert asked == [part.method == "add" for part in plan.parts for _ in part.ids]
