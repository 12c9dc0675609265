"""Steering where the model is not float32 on one device, nor its rows padded on the left."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.sae.model.hooks import hooked, resolve_site
from saesteer.sae.model.language_model import LanguageModel, wrap_model
from saesteer.sae.text.prompts import pad_left, pad_right
from saesteer.steering.hooking.arrangement import ByRow
from saesteer.steering.hooking.hook import SteerReport, steer
from saesteer.steering.hooking.latent_values import with_gate
from saesteer.steering.plans.plan import Plan

from ..whole_row import (
    CLOSE,
    LAYER,
    STEPS,
    RecordingStreamer,
    check,
    generate,
    make_sae,
    options_of,
    plan_of,
    prompts_of,
    reference,
    rule_of,
)

pytestmark = pytest.mark.usefixtures("endless")

EDITS: tuple[dict[str, Any], ...] = (
    {"unit": "rel", "scale": 0.4},
    {"method": "add-keep-norm", "schedule": "decay:0.5,3"},
    {"method": "set", "schedule": "linear:4"},
    {"method": "min", "scope": "all"},
    {"method": "max", "scale": 0.2, "scope": "all"},
    {"method": "scale", "scale": 2.5, "schedule": "first:3"},
    {"method": "ablate", "scope": "all"},
    {"method": "project", "scope": "all", "schedule": "linear:9"},
)
GATES = ("", "5 > 0.6 & !(2 > 1) | 9 > 2", "5 > 1 : 0.1 | 2 > 1.5 : 0.2", "prompt: 14 > 1")


def passes(
    lm: LanguageModel,
    plan: Plan,
    prompts: Any,
    steering: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[list[Tensor], list[Tensor], Tensor, SteerReport]:
    """What came to the hook and what left it in each pass, the sequences and the report."""
    here = resolve_site(lm, LAYER)
    before: list[Tensor] = []
    after: list[Tensor] = []
    settings = {"max_new_tokens": STEPS, "pad_token_id": lm.pad_id, **options}
    with (
        hooked(here, lambda h: before.append(h.clone())),
        steer(lm, plan, prompts=prompts, **(steering or {})) as report,
        hooked(here, lambda h: after.append(h.clone())),
    ):
        output = lm.model.generate(**settings)
    return before, after, output, report


# ---------------------------------------------------------------------------------------------
# bfloat16


@pytest.mark.parametrize("run", ["no cache", "chunked prefill"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("architecture", ["standard", "topk"])
@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_in_bfloat16_each_edit_is_that_of_the_residual_that_arrived(
    edit: dict[str, Any], architecture: str, gate: str, run: str, lm: LanguageModel
) -> None:
    """Rounding tells passes apart, so the reference is given the residuals that came to the hook.

    When a position comes, all earlier ones of its row have come: it has the whole row.
    """
    lm.model.bfloat16()
    sae = make_sae(lm, architecture)
    plan = plan_of(lm, sae, **edit)
    plan = with_gate(plan, gate, sae) if gate else plan
    more = {"sae": sae} if architecture == "topk" else {}
    prompts = prompts_of(lm)
    ids, mask = pad_left(lm, [prompt.token_ids for prompt in prompts])
    before, after, output, _ = passes(
        lm, plan, prompts, input_ids=ids, attention_mask=mask, steering=more,
        **options_of(lm, run),
    )  # fmt: skip
    width = ids.shape[1]
    for row, prompt in enumerate(prompts):
        pads, P = width - len(prompt), len(prompt)
        tokens = output[row, pads:-1].tolist()
        rule = rule_of(lm, plan, sae, prompt, tokens)
        arrived, reached = torch.zeros(pads + len(tokens), lm.d_model), 0
        for came, left in zip(before, after, strict=True):
            assert came.dtype == left.dtype == torch.bfloat16
            start = 0 if run == "no cache" else reached
            reached = start + came.shape[1]
            arrived[start:reached] = came[row].float()
            wanted = arrived[:reached].clone()
            wanted[pads:] += rule(arrived[pads:reached], P)
            # Both round one float32 sum, added in another order: one bfloat16 step at most.
            torch.testing.assert_close(left[row], wanted[start:].bfloat16(), rtol=2**-7, atol=1e-5)
        assert reached == pads + len(tokens)


# ---------------------------------------------------------------------------------------------
# padding on the right


@pytest.mark.parametrize("gate", ["", "5 > 1 : 0.1 | 2 > 1.5 : 0.2", "prompt: 14 > 1"])
@pytest.mark.parametrize("fields", [{}, {"method": "set", "scope": "all"}], ids=str)
def test_generation_after_padding_on_the_right_edits_the_right_tokens(
    fields: dict[str, Any], gate: str, lm: LanguageModel
) -> None:
    """What `generate` makes of such rows is its own affair: it warns, takes the first new token
    from padding and counts positions anew. Each token is edited as its place in the row says.
    """
    sae = make_sae(lm)
    plan = plan_of(lm, sae, **fields)
    plan = with_gate(plan, gate, sae) if gate else plan
    prompts = prompts_of(lm)
    ids, mask = pad_right(lm, [prompt.token_ids for prompt in prompts])
    before, after, output, report = passes(
        lm, plan, prompts, input_ids=ids, attention_mask=mask, do_sample=False
    )
    for row, prompt in enumerate(prompts):
        P = len(prompt)
        tokens = [*prompt.token_ids, *output[row, ids.shape[1] : -1].tolist()]
        real = [*range(P), *range(ids.shape[1], output.shape[1] - 1)]
        came = torch.cat([chunk[row] for chunk in before])
        wanted = came.clone()
        wanted[real] += rule_of(lm, plan, sae, prompt, tokens)(came[real], P)
        left = torch.cat([chunk[row] for chunk in after])
        torch.testing.assert_close(left, wanted, **CLOSE)
        if not gate and not fields:
            assert report.rows[row].positions.tolist() == list(range(P - 1, P + STEPS - 1))


@pytest.mark.parametrize("fields", EDITS, ids=str)
def test_a_forward_pass_with_padding_on_the_right_and_a_plan_for_each_row(
    fields: dict[str, Any], lm: LanguageModel
) -> None:
    sae, prompts = make_sae(lm), prompts_of(lm)
    one = with_gate(plan_of(lm, sae, **fields), "5 > 1 : 0.1 | 2 > 1.5 : 0.2", sae)
    other = plan_of(lm, sae, 11, scope="generated")
    answers = ([5, 6, 7], [8], [9, 10, 11, 12, 13])
    rows = [[*prompt.token_ids, *new] for prompt, new in zip(prompts, answers, strict=True)]
    ids, mask = pad_right(lm, rows)
    with torch.no_grad(), steer(lm, ByRow([one, other, one]), prompts=prompts):
        logits = lm.model(input_ids=ids, attention_mask=mask).logits
    for row, (prompt, tokens) in enumerate(zip(prompts, rows, strict=True)):
        rule = rule_of(lm, other if row == 1 else one, sae, prompt, tokens)
        wanted = reference(lm, tokens, len(prompt), [rule])
        torch.testing.assert_close(logits[row, : len(tokens)], wanted, **CLOSE)


# ---------------------------------------------------------------------------------------------
# accelerate


def placed(lm: LanguageModel, how: str, folder: Path) -> LanguageModel:
    from accelerate import cpu_offload, dispatch_model

    model = copy.deepcopy(lm.model)
    if how == "cpu":
        model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    elif how == "memory":
        model = cpu_offload(model, execution_device="cpu")
    else:
        device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        device_map |= {"model.rotary_emb": "cpu"}
        device_map |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(lm.n_layers)}
        model = dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder))
    return wrap_model(model, lm.tokenizer, "tiny")


@pytest.mark.parametrize("run", ["greedy", "no cache", "beams", "chunked prefill"])
@pytest.mark.parametrize("how", ["cpu", "memory", "disk"])
def test_blocks_that_accelerate_places_are_steered_alike(
    how: str, run: str, lm: LanguageModel, tmp_path: Path
) -> None:
    sae, prompts = make_sae(lm), prompts_of(lm)
    there = placed(lm, how, tmp_path)
    kinds = {parameter.device.type for parameter in there.blocks.parameters()}
    assert ("meta" in kinds) == (how != "cpu")
    for fields in ({}, {"method": "set", "scope": "all", "schedule": "linear:4"}):
        plan = with_gate(plan_of(there, sae, **fields), "5 > 1 : 0.1 | 2 > 1.5 : 0.2", sae)

        def rules(row: int, tokens: list[int], plan: Any = plan) -> Any:
            return [rule_of(there, plan, sae, prompts[row], tokens)]

        check(there, plan, rules, run)
        # The model it was made from is the same one, whatever holds its weights.
        assert lm.fingerprint == there.fingerprint
    assert all(
        not module._forward_hooks and not module._forward_pre_hooks
        for module in there.model.modules()
    )


# ---------------------------------------------------------------------------------------------
# assistants and streamers


def test_an_assistant_that_is_steered_too_guesses_right(lm: LanguageModel) -> None:
    """Both contexts are open at once, each on its own model."""
    sae, prompts = make_sae(lm), prompts_of(lm)[:1]
    plan = plan_of(lm, sae)
    helper = wrap_model(copy.deepcopy(lm.model), lm.tokenizer, "helper")
    options = {"do_sample": False, "max_new_tokens": 12}
    with steer(lm, plan) as alone:
        wanted = generate(lm, prompts, **options).sequences
    with steer(lm, plan) as report, steer(helper, plan) as other:
        found = generate(lm, prompts, assistant_model=helper.model, **options).sequences
    assert torch.equal(found, wanted)
    assert report.passes < alone.passes == 12
    assert other.tokens_touched > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt_lookup_num_tokens": 2}, "only supported for batch_size = 1"),
        ({"prompt_lookup_num_tokens": 2, "num_return_sequences": 2}, "num_return_sequences"),
        (
            {"streamer": RecordingStreamer(), "num_beams": 2},
            "`streamer` cannot be used with beam search",
        ),
    ],
    ids=["guesses", "guesses of two", "streamer"],
)
def test_what_generate_refuses_it_refuses_in_its_own_words(
    options: dict[str, Any], says: str, lm: LanguageModel
) -> None:
    plan = plan_of(lm, make_sae(lm))
    prompts = prompts_of(lm)
    with pytest.raises(ValueError, match=says):
        with steer(lm, plan):
            generate(lm, prompts, do_sample=False, max_new_tokens=4, **options)
    assert "generate" not in vars(lm.model)
    with steer(lm, plan) as report:
        generate(lm, prompts, do_sample=False, max_new_tokens=2)
    assert report.tokens_touched == 6


@pytest.mark.parametrize("fails", [False, True])
def test_drafts_of_the_model_itself_are_not_counted(fails: bool, lm: LanguageModel) -> None:
    """Early exit calls `generate` of the same model inside of `generate`."""
    plan, prompts = plan_of(lm, make_sae(lm)), prompts_of(lm)[:1]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
    with steer(lm, plan) as alone:
        wanted = generate(lm, prompts, **options).sequences
    with steer(lm, plan) as report:
        if fails:
            with pytest.raises(ValueError, match="batch_size = 1"):
                generate(lm, prompts_of(lm), assistant_early_exit=2, **options)
        found = generate(lm, prompts, assistant_early_exit=2, **options).sequences
    assert torch.equal(found, wanted)
    (mine,) = [row for row in report.rows if len(row.positions)]
    assert mine.positions[:6].tolist() == alone.rows[0].positions.tolist()
