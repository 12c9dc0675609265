"""Texts in, steered texts out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.model.generation import stop_ids
from saesteer.sae.model.language_model import LanguageModel, wrap_model
from saesteer.sae.text.prompts import encode_prompt
from saesteer.steering.hooking.arrangement import ByRow
from saesteer.steering.hooking.generation import SteeredText, generate_steered
from saesteer.steering.hooking.hook import steer
from saesteer.steering.plans.from_sae import plan_from_latents
from saesteer.steering.plans.plan import Plan

TEXTS = [
    "Statements end at the newline, which is a token of its own.",
    "yield",
    "A tuple of one element needs a comma.",
    "Use the name.",
    "yield",
]


@pytest.fixture
def lm(tiny_lm: Callable[..., tuple[Any, Any]]) -> LanguageModel:
    model, tokenizer = tiny_lm("llama")
    # Many stop tokens, so that a random model ends some texts early and not others.
    model.generation_config.eos_token_id = [2, *range(100, 140)]
    return wrap_model(model, tokenizer, "tiny")


@pytest.fixture
def plan(lm: LanguageModel) -> Plan:
    generator = torch.Generator().manual_seed(0)
    sae = SAE(
        spec=SAESpec(
            architecture="topk", d_model=32, d_sae=8, k=2, hook_name="blocks.1.hook_resid_post"
        ),
        W_enc=torch.randn(32, 8, generator=generator),
        b_enc=torch.zeros(8),
        W_dec=torch.randn(8, 32, generator=generator) / 32**0.5,
        b_dec=torch.zeros(32),
        source="folder",
        sha256="ab",
    )
    return plan_from_latents(lm, sae, None, {3: 2.5, 5: 1.5})


def one_by_one(lm: LanguageModel, plan: Plan, texts: list[str], **options: Any) -> list[Any]:
    """The same by hand: one prompt at a time, `generate` under `steer`."""
    found = []
    for text in texts:
        prompt = encode_prompt(lm, text, chat=True)
        ids = torch.tensor([prompt.token_ids])
        with steer(lm, plan, prompts=[prompt], **options) as report:
            row = lm.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
                pad_token_id=lm.pad_id,
            )[0, len(prompt) :].tolist()  # fmt: skip
        stops = stop_ids(lm)
        end = next((i for i, token in enumerate(row) if token in stops), len(row))
        found.append((row[:end], report.tokens_touched, report.relative_dose))
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("scope", ["generation", "generated", "all"])
def test_a_batch_says_what_single_prompts_say(
    scope: str, batch_size: int, lm: LanguageModel, plan: Plan
) -> None:
    texts = TEXTS
    if scope == "generated":  # a text that ends at once has no generated token to touch
        kept = generate_steered(lm, texts, plan, max_new_tokens=8, scope=scope)
        texts = [answer.prompt for answer in kept if answer.tokens_touched]
        assert 0 < len(texts) < len(TEXTS)
    found = generate_steered(lm, texts, plan, max_new_tokens=8, batch_size=batch_size, scope=scope)
    wanted = one_by_one(lm, plan, texts, scope=scope)
    assert [answer.prompt for answer in found] == texts
    assert len({len(tokens) for tokens, _, _ in wanted}) > 1  # some end early, some do not
    for answer, (tokens, touched, dose) in zip(found, wanted, strict=True):
        assert answer.token_ids == tokens
        assert answer.completion == lm.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert answer.tokens_touched == touched
        # Norms of batched and single passes differ by float32 rounding.
        assert answer.relative_dose == pytest.approx(dose, rel=1e-4)
        assert answer.baseline is None


def test_the_baseline_is_what_the_model_says_unsteered(lm: LanguageModel, plan: Plan) -> None:
    seen: list[int] = []
    steered = generate_steered(
        lm, TEXTS, plan, max_new_tokens=8, baseline=True, progress=seen.append, batch_size=2
    )
    plain = generate_steered(lm, TEXTS, None, max_new_tokens=8)
    assert [answer.baseline for answer in steered] == [answer.completion for answer in plain]
    assert [answer.completion for answer in steered] != [answer.completion for answer in plain]
    assert plain[0] == SteeredText(TEXTS[0], plain[0].completion, plain[0].token_ids)
    assert sum(seen) == sum(len(answer.token_ids) for answer in [*steered, *plain])


def test_scale_0_says_what_the_model_says(lm: LanguageModel, plan: Plan) -> None:
    off = generate_steered(lm, TEXTS, plan, max_new_tokens=8, scale=0.0)
    assert off == generate_steered(lm, TEXTS, None, max_new_tokens=8)


def test_sampling_is_seeded_and_steering_keeps_the_draws(lm: LanguageModel, plan: Plan) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9}
    first = generate_steered(lm, TEXTS, plan, seed=1, baseline=True, **options)
    assert first == generate_steered(lm, TEXTS, plan, seed=1, baseline=True, **options)
    assert first != generate_steered(lm, TEXTS, plan, seed=2, baseline=True, **options)
    plain = generate_steered(lm, TEXTS, None, seed=1, **options)
    assert [answer.baseline for answer in first] == [answer.completion for answer in plain]


def test_chat_follows_the_tokenizer_and_can_be_switched_off(lm: LanguageModel, plan: Plan) -> None:
    default = generate_steered(lm, TEXTS[:1], plan, max_new_tokens=4)
    on = generate_steered(lm, TEXTS[:1], plan, max_new_tokens=4, chat=True)
    off = generate_steered(lm, TEXTS[:1], plan, max_new_tokens=4, chat=False)
    assert default == on != off
    lm.tokenizer.chat_template = None
    assert generate_steered(lm, TEXTS[:1], plan, max_new_tokens=4) == off
    with pytest.raises(UserError, match="`chat` needs a chat template and tiny has none"):
        generate_steered(lm, TEXTS[:1], plan, chat=True)


def test_no_prompts_give_no_texts(lm: LanguageModel, plan: Plan) -> None:
    assert generate_steered(lm, [], plan) == []


def test_scopes_on_text_and_exclusions_reach_the_hook(lm: LanguageModel, plan: Plan) -> None:
    text = "a list. Say it in French"
    prompt = encode_prompt(lm, text, chat=True)
    first, last = prompt.user_span
    options: dict[str, Any] = {"max_new_tokens": 1}
    touched = {
        name: generate_steered(lm, [text], plan, **options, **more)[0].tokens_touched
        for name, more in {
            "text": {"scope": "prompt"},
            "first": {"scope": "prompt", "include_first": True},
            "template": {"scope": "prompt", "include_template": True},
            "span": {"scope": "span:0-6"},
            "after": {"scope": "after-instruction", "instructions": ["Say it in French"]},
        }.items()
    }
    assert touched == {
        "text": last - first,
        "first": last - first + 1,
        "template": len(prompt) - 1,
        "span": prompt.token_span(0, 6)[1] - first,
        "after": len(prompt) - last,
    }


def test_errors_pass_through(lm: LanguageModel, plan: Plan) -> None:
    with pytest.raises(UserError, match="touched no token: `scope` generated"):
        generate_steered(lm, TEXTS, plan, max_new_tokens=1, scope="generated")
    with pytest.raises(UsageError, match="`beta` 1 needs latents with mu and sigma"):
        generate_steered(lm, TEXTS, plan, beta=1.0)
    with pytest.raises(UsageError, match="`max_new_tokens` must be at least 1, got 0"):
        generate_steered(lm, TEXTS, plan, max_new_tokens=0)


def test_each_text_follows_its_own_plan(lm: LanguageModel, plan: Plan) -> None:
    other = dataclasses.replace(plan, scale=-2.0)
    plans = [plan, None, other, plan, None]
    found = generate_steered(lm, TEXTS, ByRow(plans), max_new_tokens=8, batch_size=2)
    for text, one, answer in zip(TEXTS, plans, found, strict=True):
        (alone,) = generate_steered(lm, [text], one, max_new_tokens=8)
        assert answer.token_ids == alone.token_ids
        assert answer.tokens_touched == alone.tokens_touched
    with pytest.raises(UsageError, match="plans for 1 texts and 5 were given"):
        generate_steered(lm, TEXTS, ByRow([plan]))
