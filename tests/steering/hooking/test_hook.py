"""The steering hook against a slow reference: families, scopes, methods, dtypes, nested plans."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from saesteer.sae.model.hooks import capture, resolve_site
from saesteer.sae.model.language_model import LanguageModel, wrap_model
from saesteer.steering.hooking.hook import steer

from ..hook_reference import (
    IDS,
    INSTRUCTION,
    check_against_reference,
    edited_at,
    generate,
    hooks_on,
    logits_of,
    prompts_of,
    ranked_plan,
    reference_edit,
    reference_greedy,
)
from ..whole_row import CLOSE, LAYER, STEPS, make_sae

pytestmark = pytest.mark.usefixtures("endless")


@pytest.mark.parametrize(
    "family",
    [
        "llama", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi", "olmo2", "mistral",
        "mixtral", "gemma3_multimodal", "llava",
    ],
)  # fmt: skip
def test_every_family_agrees_with_the_reference(
    family: str, lm_of: Callable[..., LanguageModel]
) -> None:
    lm = lm_of(family, endless=True)
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    prompts = prompts_of(lm)
    check_against_reference(lm, sae, plan, prompts)
    unsteered, _ = generate(lm, prompts)
    with steer(lm, plan):
        steered, _ = generate(lm, prompts)
    assert not torch.equal(unsteered, steered)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 5},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_every_way_to_run_generate_agrees_with_the_reference(
    family: str, options: dict[str, Any], lm_of: Callable[..., LanguageModel]
) -> None:
    lm = lm_of(family, endless=True)
    sae = make_sae(lm)
    for scope in ("generation", "all"):
        plan = ranked_plan(lm, sae)
        check_against_reference(lm, sae, plan, prompts_of(lm), scope, **options)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    "scope",
    [
        "generation", "generated", "prompt", "all", "last-prompt", "first:3", "span:4-12",
        "after-instruction",
    ],
)  # fmt: skip
def test_every_scope_agrees_with_the_reference(scope: str, cached: bool, lm: LanguageModel) -> None:
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    options = {"instructions": ["never there", INSTRUCTION]}
    check_against_reference(lm, sae, plan, prompts_of(lm), scope, options, use_cache=cached)


@pytest.mark.parametrize("scope", ["generation", "all"])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
@pytest.mark.parametrize("method", ["add", "set", "min", "max", "scale", "ablate", "project"])
def test_every_method_agrees_with_the_reference(
    method: str, architecture: str, scope: str, lm: LanguageModel
) -> None:
    sae = make_sae(lm, architecture, apply_b_dec_to_input=architecture != "standard")
    scale = {"scale": 2.5}.get(method, 1.0)
    plan = ranked_plan(lm, sae, method=method, scale=scale)
    options = {"sae": sae} if architecture == "topk" else {}
    check_against_reference(lm, sae, plan, prompts_of(lm), scope, options)


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_chunks_without_a_covered_position_pass_through_reading_methods(
    architecture: str, lm: LanguageModel
) -> None:
    sae = make_sae(lm, architecture)
    plan = ranked_plan(lm, sae, method="set")
    check_against_reference(
        lm, sae, plan, prompts_of(lm), "generated", {"sae": sae}, prefill_chunk_size=7
    )


def test_latents_in_units_of_their_rows_move_the_residual_as_the_sae_decodes(
    lm: LanguageModel,
) -> None:
    sae = make_sae(lm, "topk", rescale_acts_by_decoder_norm=True)
    plan = ranked_plan(lm, sae, method="set")
    h = torch.randn(1, 5, lm.d_model, generator=torch.Generator().manual_seed(1))
    from saesteer.steering.hooking.edits import EditPositions, make_edit

    delta = make_edit(plan.parts, sae).delta(h, EditPositions(torch.ones(1, 5, dtype=torch.bool)))
    acts = sae.encode(h)
    wanted = acts.clone()
    wanted[..., list(IDS)] = torch.tensor(plan.doses())
    # Differences of decoded values of size 1: some float32 roundings.
    torch.testing.assert_close(delta, sae.decode(wanted) - sae.decode(acts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.7, -0.4])
def test_relative_dose_is_the_share_of_each_tokens_own_norm(
    scale: float, lm: LanguageModel
) -> None:
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae, unit="rel", scale=scale)
    edit = reference_edit(sae, plan)
    prompts = prompts_of(lm)
    with steer(lm, plan) as report:
        tokens, logits = generate(lm, prompts)
    # float32 norms of 32 numbers.
    assert report.relative_dose == pytest.approx(abs(scale), rel=1e-5)
    for i, prompt in enumerate(prompts):
        P = len(prompt)
        new, scores = reference_greedy(
            lm, prompt.token_ids, edit, lambda row, P=P: range(P - 1, len(row))
        )
        assert tokens[i].tolist() == new
        torch.testing.assert_close(logits[i], scores, **CLOSE)


def test_bfloat16_residuals_are_edited_in_float32_and_stay_bfloat16(
    tiny_lm: Callable[..., tuple[Any, Any]],
) -> None:
    model, tokenizer = tiny_lm("llama")
    lm = wrap_model(model.bfloat16(), tokenizer, "tiny")
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    edit = reference_edit(sae, plan)
    ids = torch.tensor([prompts_of(lm)[0].token_ids])
    here = resolve_site(lm, LAYER)
    with torch.no_grad():
        with capture([here]) as before:
            lm.model(input_ids=ids)
        with steer(lm, plan), capture([here]) as during:
            logits = lm.model(input_ids=ids).logits
    assert during[here.key].dtype == logits.dtype == torch.bfloat16
    assert torch.equal(during[here.key][:, :-1], before[here.key][:, :-1])
    wanted = edit(before[here.key][0, -1].float()).bfloat16()
    # Both round one float32 sum of three terms, added in another order: one bfloat16 step at most.
    torch.testing.assert_close(during[here.key][0, -1], wanted, rtol=2**-7, atol=0.0)


@pytest.mark.parametrize("method", ["add", "set"])
def test_gradients_flow_through_the_edit(method: str, lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm), method=method)
    prompts = prompts_of(lm)
    embeds = lm.model.get_input_embeddings()(torch.tensor([prompts[0].token_ids]))
    embeds.requires_grad_()
    with steer(lm, plan) as report:
        with torch.inference_mode():
            lm.model(input_ids=torch.tensor([[5, 6, 7]]))
        lm.model(inputs_embeds=embeds).logits[0, -1].sum().backward()
    assert embeds.grad is not None and bool((embeds.grad[0, -1] != 0).any())
    assert report.tokens_touched == 2


def test_nested_plans_add_up(lm: LanguageModel) -> None:
    sae, other = make_sae(lm), make_sae(lm, seed=1)
    first, second = ranked_plan(lm, sae), ranked_plan(lm, other, scale=0.5)
    prompts = prompts_of(lm)
    edits = [reference_edit(sae, first), reference_edit(other, second)]
    with steer(lm, first) as outer, steer(lm, second, scope="generated") as inner:
        tokens, logits = generate(lm, prompts)
    for i, prompt in enumerate(prompts):
        P, row = len(prompt), list(prompt.token_ids)
        for t in range(STEPS):
            with (
                edited_at(lm, LAYER, edits[0], range(P - 1, len(row))),
                edited_at(lm, LAYER, edits[1], range(P, len(row))),
            ):
                wanted = logits_of(lm, row)[-1]
            torch.testing.assert_close(logits[i, t], wanted, **CLOSE)
            row.append(int(wanted.argmax()))
        assert tokens[i].tolist() == row[P:]
    assert outer.tokens_touched == STEPS * 3
    assert inner.tokens_touched == (STEPS - 1) * 3
    assert "generate" not in vars(lm.model) and hooks_on(lm) == 0


def test_nested_contexts_may_close_in_any_order(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    prompts = prompts_of(lm)
    with steer(lm, plan):
        wanted = generate(lm, prompts)[1]
    outer, inner = steer(lm, plan), steer(lm, plan)
    outer.__enter__()
    inner.__enter__()
    generate(lm, prompts)
    outer.__exit__(None, None, None)
    assert torch.equal(generate(lm, prompts)[1], wanted)
    inner.__exit__(None, None, None)
    assert "generate" not in vars(lm.model) and hooks_on(lm) == 0


def test_scope_exclusions_can_be_lifted(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    prompt = prompts_of(lm)[1]
    ids = torch.tensor([prompt.token_ids])
    special = set(lm.special_ids.tolist())
    assert prompt.token_ids[0] in special
    text = list(range(*prompt.user_span))

    def touched(**options: Any) -> list[int]:
        with torch.no_grad(), steer(lm, plan, scope="prompt", **options) as report:
            lm.model(input_ids=ids)
        return report.rows[0].positions.tolist()  # type: ignore[no-any-return]

    everything = list(range(len(prompt)))
    assert touched(prompts=[prompt]) == text
    assert touched(prompts=[prompt], include_first=True) == [0, *text]
    assert touched(prompts=[prompt], include_template=True) == everything[1:]
    assert touched(prompts=[prompt], include_first=True, include_template=True) == everything
    # Without prompts, the special tokens are all that is known of the template.
    assert touched() == [p for p in everything[1:] if prompt.token_ids[p] not in special]


def test_a_plan_may_be_given_by_its_path(lm: LanguageModel, tmp_path: Any) -> None:
    from saesteer.steering.plans.plan_file import save_plan

    plan = ranked_plan(lm, make_sae(lm))
    prompts = prompts_of(lm)
    save_plan(plan, tmp_path / "plan")
    with steer(lm, plan):
        wanted = generate(lm, prompts)[1]
    with steer(lm, tmp_path / "plan"):
        assert torch.equal(generate(lm, prompts)[1], wanted)
