"""What a row is answered does not depend on the rows beside it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from saesteer.sae.model.language_model import LanguageModel, wrap_model
from saesteer.steering.hooking.generation import SteeredText, generate_steered
from saesteer.steering.hooking.latent_values import with_gate
from saesteer.steering.plans.from_sae import plan_from_latents
from saesteer.steering.plans.plan import Condition, Plan
from saesteer.steering.serving.sampling import Sampling

from ..small_plans import small_plan, small_sae
from .engine_help import ask, ask_all, generation, in_float64, running

TEXTS = (
    "The museum opens at nine.",
    "Rain",
    "Peter bought three oranges and a melon, and carried them home in a paper bag.",
    "Two words",
    "A list of the rivers of the north, from the longest to the shortest one of them",
    "x",
)
LENGTHS = (12, 5, 9, 14, 3, 8)


def plans_of(lm: LanguageModel) -> list[Plan | None]:
    """One for each text, of every kind that rows can have side by side."""
    add = small_plan(lm, [3, 5], method="add", scale=0.4)
    return [
        add,
        None,
        small_plan(lm, [2], method="add-keep-norm", scale=0.7, schedule="linear:6"),
        add.with_changes(scale=-0.3, scope="first:3"),
        small_plan(lm, [1, 4], method="project"),
        add.with_changes(unit="rel", scale=0.5, scope="all", schedule="decay:1,2"),
    ]


def expected(lm: LanguageModel, plans: list[Plan | None], **fields: object) -> list[SteeredText]:
    """What `steer` answers each text alone."""
    return [
        generate_steered(lm, [text], plan, max_new_tokens=length, **fields)[0]
        for text, plan, length in zip(TEXTS, plans, LENGTHS, strict=True)
    ]


@pytest.mark.parametrize("apart", [False, True], ids=["at once", "one by one"])
@pytest.mark.parametrize("rows", [1, 3, 32])
def test_rows_are_answered_as_steer_answers_them_alone(
    lm: LanguageModel, apart: bool, rows: int
) -> None:
    in_float64(lm)
    plans = plans_of(lm)
    wanted = expected(lm, plans)
    requests = [
        generation(lm, text, plans=[plan] if plan else [], max_new_tokens=length)
        for text, plan, length in zip(TEXTS, plans, LENGTHS, strict=True)
    ]
    with running(lm, settings={"max_batch": rows}) as engine:
        found = ask_all(engine, requests, apart=apart)
    assert [list(a.facts().token_ids) for a in found] == [one.token_ids for one in wanted]
    assert [a.text().strip() for a in found] == [one.completion for one in wanted]
    assert len({tuple(a.facts().token_ids) for a in found}) == len(TEXTS)  # they do differ
    for answers, one in zip(found, wanted, strict=True):
        assert answers.facts().tokens_touched == one.tokens_touched
        if one.relative_dose is None:
            assert answers.facts().relative_dose is None
        else:
            assert answers.facts().relative_dose == pytest.approx(one.relative_dose, rel=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mistral", "mixtral", "gpt_neox"])
def test_rows_join_in_models_of_every_kind(
    lm_of: Callable[..., LanguageModel], family: str
) -> None:
    """Sliding windows shorter than the rows, learned positions, experts."""
    lm = lm_of(family, endless=True)
    if family != "mixtral":  # torch multiplies grouped experts in float32 at most
        in_float64(lm)
    plans = [small_plan(lm, [3], scale=0.5), None, small_plan(lm, [1], scale=-0.5)]
    texts, lengths = (TEXTS[2], TEXTS[1], TEXTS[4]), (20, 6, 12)
    wanted = [
        generate_steered(lm, [text], plan, max_new_tokens=length)[0]
        for text, plan, length in zip(texts, plans, lengths, strict=True)
    ]
    requests = [
        generation(lm, text, plans=[plan] if plan else [], max_new_tokens=length)
        for text, plan, length in zip(texts, plans, lengths, strict=True)
    ]
    with running(lm) as engine:
        found = ask_all(engine, requests, apart=True)
    assert [list(a.facts().token_ids) for a in found] == [one.token_ids for one in wanted]


def test_edits_that_read_run_side_by_side(lm: LanguageModel, endless: None) -> None:
    """Gates, conditions, plain states, latents of a TopK SAE and places inside the prompt."""
    in_float64(lm)
    sae = small_sae(lm, 24)
    reading = plan_from_latents(lm, sae, 1, {2: 3.0, 9: 1.0}, method="set")
    condition = Condition(layer=1, site="resid_post", weight=torch.ones(lm.d_model), bias=0.0)
    plain = small_plan(lm, [3], scale=0.5)
    plans = [
        reading,
        with_gate(plan_from_latents(lm, sae, 1, {5: 2.0}), "2 > 0.1 : 0.05", sae),
        plain.with_changes(when=condition),
        plain.with_changes(method="set-to", scope="tail"),
        plain.with_changes(parts=[*plain.parts, *reading.parts]),
        plain.with_changes(scope="span:0-5"),
    ]
    wanted = [
        generate_steered(lm, [text], plan, max_new_tokens=8, sae=sae)[0]
        for text, plan in zip(TEXTS, plans, strict=True)
    ]
    requests = [
        generation(lm, text, plans=[plan], max_new_tokens=8)
        for text, plan in zip(TEXTS, plans, strict=True)
    ]
    with running(lm, saes=[sae]) as engine:
        found = ask_all(engine, requests, apart=False)
    for answers, one in zip(found, wanted, strict=True):
        assert list(answers.facts().token_ids) == one.token_ids
        assert answers.facts().tokens_touched == one.tokens_touched
        assert answers.facts().tokens_gated_off == one.tokens_gated_off
    assert {one.tokens_touched for one in wanted} != {8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_row_at_a_time_is_bit_equal_in_every_dtype(
    lm: LanguageModel, endless: None, dtype: torch.dtype
) -> None:
    """`max_batch` 1 multiplies the same shapes as `steer` with a batch of one."""
    lm.model.to(dtype)
    plan = small_plan(lm, [3, 5], scale=0.4)
    sampled = {"temperature": 1.1, "top_p": 0.8, "seed": 5}
    wanted = [
        generate_steered(lm, [text], plan, max_new_tokens=20, **sampled)[0] for text in TEXTS[:3]
    ]
    sampling = Sampling(temperature=1.1, top_p=0.8)
    requests = [
        generation(lm, text, plans=[plan], max_new_tokens=20, sampling=sampling, seed=5)
        for text in TEXTS[:3]
    ]
    with running(lm, settings={"max_batch": 1}) as engine:
        found = ask_all(engine, requests, apart=False)
    assert [list(a.facts().token_ids) for a in found] == [one.token_ids for one in wanted]
    assert [a.facts().relative_dose for a in found] == [one.relative_dose for one in wanted]


def test_the_models_own_settings_of_generation_hold(lm: LanguageModel, endless: None) -> None:
    lm.model.generation_config.repetition_penalty = 1.6
    lm.model.generation_config.no_repeat_ngram_size = 2
    wanted = generate_steered(lm, [TEXTS[0]], None, max_new_tokens=24)[0]
    with running(lm) as engine:
        found = ask(engine, generation(lm, TEXTS[0], max_new_tokens=24)).wait()
    assert list(found.facts().token_ids) == wanted.token_ids


def test_models_with_states_run_row_by_row(tiny_tokenizer: Any) -> None:
    """The states of a Mamba hold no columns that could be moved, so its rows are never joined."""
    from transformers import MambaConfig, MambaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = MambaConfig(
            vocab_size=400, hidden_size=32, num_hidden_layers=3, state_size=4, eos_token_id=None
        )
        lm = in_float64(wrap_model(MambaForCausalLM(config), tiny_tokenizer, "tiny-mamba"))
    plan = small_plan(lm, [3], scale=2.0)
    wanted = [
        generate_steered(lm, [text], plan, max_new_tokens=9)[0].token_ids for text in TEXTS[:3]
    ]
    requests = [generation(lm, text, plans=[plan], max_new_tokens=9) for text in TEXTS[:3]]
    with running(lm) as engine:
        found = ask_all(engine, requests, apart=True)
    assert [list(a.facts().token_ids) for a in found] == wanted
