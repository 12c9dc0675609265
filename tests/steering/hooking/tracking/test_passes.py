"""Passes of every kind: beams, drafts, caches, paddings and masks, loops of one's own, towers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.model.hooks import capture, resolve_site, run_to
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import pad_left
from saesteer.steering.hooking.hook import steer

from ...hook_reference import (
    generate,
    positions_of,
    prompts_of,
    ranked_plan,
    reference_edit,
    reference_greedy,
    reference_logits,
)
from ...whole_row import CLOSE, STEPS, make_sae

pytestmark = pytest.mark.usefixtures("endless")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("cached", [True, False])
def test_beams_score_their_sequences_as_the_reference_does(
    family: str, cached: bool, lm_of: Callable[..., LanguageModel]
) -> None:
    lm = lm_of(family, endless=True)
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    edit = reference_edit(sae, plan)
    prompts = prompts_of(lm)
    ids, mask = pad_left(lm, [prompt.token_ids for prompt in prompts])
    with steer(lm, plan) as report:
        output = lm.model.generate(
            input_ids=ids, attention_mask=mask, num_beams=3, num_return_sequences=2,
            max_new_tokens=STEPS, do_sample=False, use_cache=cached, pad_token_id=lm.pad_id,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    assert len(output.sequences) == 2 * len(prompts)
    for i, sequence in enumerate(output.sequences[:, ids.shape[1] :].tolist()):
        prompt = prompts[i // 2]
        P = len(prompt)
        row = [*prompt.token_ids, *sequence]
        logprobs = reference_logits(lm, row, edit, range(P - 1, len(row))).log_softmax(dim=-1)
        total = sum(logprobs[P - 1 + t, token] for t, token in enumerate(sequence)) / STEPS
        torch.testing.assert_close(output.sequences_scores[i], total, **CLOSE)
    rows = report.rows
    assert len(rows) == 3 * len(prompts)
    for i, row in enumerate(rows):
        P = len(prompts[i // 3])
        assert row.positions.tolist() == list(range(P - 1, P + STEPS - 1))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}],
    ids=str,
)
def test_sampled_sequences_score_as_the_reference_does(
    options: dict[str, Any], lm: LanguageModel
) -> None:
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    edit = reference_edit(sae, plan)
    prompts = prompts_of(lm)
    torch.manual_seed(0)
    with steer(lm, plan) as report:
        tokens, logits = generate(lm, prompts, do_sample=True, num_return_sequences=2, **options)
    assert len(report.rows) == len(tokens) == 2 * len(prompts)
    assert tokens[0].tolist() != tokens[1].tolist()
    for i, new in enumerate(tokens.tolist()):
        P = len(prompts[i // 2])
        row = [*prompts[i // 2].token_ids, *new]
        wanted = reference_logits(lm, row, edit, range(P - 1, len(row)))[P - 1 : -1]
        torch.testing.assert_close(logits[i], wanted, **CLOSE)


def test_drafts_that_are_rolled_back_are_steered_and_counted_once(lm: LanguageModel) -> None:
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    prompt = prompts_of(lm)[0]
    new, _ = reference_greedy(
        lm, prompt.token_ids, reference_edit(sae, plan),
        lambda row: range(len(prompt) - 1, len(row)), steps=12,
    )  # fmt: skip
    with steer(lm, plan) as report:
        tokens, _ = generate(lm, [prompt], prompt_lookup_num_tokens=2, max_new_tokens=12)
    assert tokens[0].tolist() == new
    touched = report.rows[0].positions.tolist()
    assert touched == list(range(len(prompt) - 1, touched[-1] + 1))
    assert touched[-1] - (len(prompt) + 10) in (0, 1, 2)  # a last draft may lie beyond the end


def test_padding_without_a_mask_is_what_generate_takes_it_for(lm: LanguageModel) -> None:
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    prompts = prompts_of(lm, chat=False)
    ids, mask = pad_left(lm, [prompt.token_ids for prompt in prompts])
    ids = torch.where(mask == 0, 0, ids)
    with steer(lm, plan, scope="last-prompt") as report:
        lm.model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert [row.positions.tolist() for row in report.rows] == [[len(p) - 1] for p in prompts]
    # When padding is also an end of text, generate takes it for text, and the rows are all as long.
    with steer(lm, plan, scope="last-prompt") as report:
        lm.model.generate(
            inputs=ids, max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=[0, 2]
        )
    assert [row.positions.tolist() for row in report.rows] == [[ids.shape[1] - 1]] * 3


def test_embeddings_in_place_of_ids_are_steered_alike(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    ids, mask = pad_left(lm, [prompt.token_ids for prompt in prompts_of(lm)])
    embeds = lm.model.get_input_embeddings()(ids)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": lm.pad_id}
    with steer(lm, plan) as by_ids:
        wanted = lm.model.generate(input_ids=ids, attention_mask=mask, **options)
    with steer(lm, plan) as by_embeds:
        found = lm.model.generate(inputs_embeds=embeds, attention_mask=mask, **options)
    assert torch.equal(found, wanted[:, ids.shape[1] :])
    for one, other in zip(by_ids.rows, by_embeds.rows, strict=True):
        assert one.positions.tolist() == other.positions.tolist()


def test_a_conversation_goes_on_from_its_cache(lm: LanguageModel) -> None:
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    first = torch.tensor([prompts_of(lm, chat=False)[0].token_ids])
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    said = lm.model.generate(first, **options)
    second = torch.cat([said.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    P = second.shape[1]
    new, _ = reference_greedy(
        lm, second[0].tolist(), reference_edit(sae, plan), lambda row: range(P - 1, len(row)), 4
    )
    for mask in ({}, {"attention_mask": torch.ones_like(second)}):
        cache = copy.deepcopy(said.past_key_values)
        with steer(lm, plan) as report:
            output = lm.model.generate(second, past_key_values=cache, **mask, **options)
        assert output.sequences[0, P:].tolist() == new
        assert report.rows[0].positions.tolist() == list(range(P - 1, P + 3))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scope", ["generation", "prompt", "all", "span:4-12"])
def test_a_padded_forward_pass_agrees_with_the_reference(
    scope: str, side: str, lm: LanguageModel
) -> None:
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    prompts = prompts_of(lm)
    answers = ([5, 6, 7], [8], [9, 10, 11, 12, 13])
    rows = [[*prompt.token_ids, *new] for prompt, new in zip(prompts, answers, strict=True)]
    ids, mask = pad_left(lm, rows)
    if side == "right":
        for i, row in enumerate(rows):
            shift = ids.shape[1] - len(row)
            ids[i], mask[i] = ids[i].roll(-shift), mask[i].roll(-shift)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), steer(lm, plan, scope=scope, prompts=prompts):
        logits = lm.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    special = set(lm.special_ids.tolist())
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        wanted = reference_logits(
            lm, row, reference_edit(sae, plan), positions_of(scope, prompt, row, special)
        )
        torch.testing.assert_close(logits[i][mask[i] == 1].float(), wanted, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_decoding_loop_of_ones_own_is_steered_from_its_first_row_on(
    family: str, cached: bool, lm_of: Callable[..., LanguageModel]
) -> None:
    lm = lm_of(family, endless=True)
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    prompt = prompts_of(lm)[1].token_ids
    new, _ = reference_greedy(
        lm, prompt, reference_edit(sae, plan), lambda row: range(len(prompt) - 1, len(row))
    )
    row, cache = list(prompt), None
    with torch.no_grad(), steer(lm, plan) as report:
        for _ in range(STEPS):
            chunk = row if cache is None else row[-1:]
            output = lm.model(torch.tensor([chunk]), past_key_values=cache, use_cache=cached)
            cache = output.past_key_values if cached else None
            row.append(int(output.logits[0, -1].argmax()))
    assert row[len(prompt) :] == new
    assert len(report.rows) == 1
    assert report.rows[0].positions.tolist() == list(
        range(len(prompt) - 1, len(prompt) + STEPS - 1)
    )


def test_another_row_is_another_prompt(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    with torch.no_grad(), steer(lm, plan) as report:
        lm.model(torch.tensor([[5, 6, 7]]))
        lm.model(torch.tensor([[5, 6, 7]]))  # again: counted once
        lm.model(torch.tensor([[5, 9, 7, 8]]))
        lm.model(torch.tensor([[5, 9]]))
    assert [row.positions.tolist() for row in report.rows] == [[2], [3], [1]]
    assert [row.call for row in report.rows] == [0, 1, 2]


def test_prompt_lengths_say_where_the_answer_begins(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad(), steer(lm, plan, prompt_lengths=[1, 3]) as report:
        lm.model(input_ids=ids)
    assert [row.positions.tolist() for row in report.rows] == [[0, 1, 2, 3], [2, 3]]
    with pytest.raises(UsageError, match="prompt_lengths.*names 1 rows.*given 2"):
        with torch.no_grad(), steer(lm, plan, prompt_lengths=[1]):
            lm.model(input_ids=ids)


def test_a_4d_mask_hides_its_padding(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    real = torch.tensor([False, False, True, True, True])
    allowed = torch.tril(torch.ones(5, 5, dtype=torch.bool)) & real
    for mask in (allowed, torch.zeros(5, 5).masked_fill(~allowed, torch.finfo(torch.float32).min)):
        with torch.no_grad(), steer(lm, plan, scope="all", include_first=True) as report:
            lm.model(input_ids=ids, attention_mask=mask[None, None])
        assert report.rows[0].positions.tolist() == [0, 1, 2]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_multimodal"])
def test_the_text_tower_alone_is_steered_like_the_whole_model(
    family: str, lm_of: Callable[..., LanguageModel]
) -> None:
    lm = lm_of(family, endless=True)
    plan = ranked_plan(lm, make_sae(lm))
    ids = torch.tensor([prompts_of(lm)[0].token_ids])
    last = resolve_site(lm, -1)
    with torch.no_grad(), steer(lm, plan) as report, capture([last]) as whole:
        lm.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    with torch.no_grad(), steer(lm, plan) as alone:
        seen = run_to(lm, [last], input_ids=ids, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(seen[last.key], whole[last.key], rtol=0, atol=0)
    assert alone.tokens_touched == report.tokens_touched == 1
