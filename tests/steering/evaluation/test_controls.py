"""Controls: the same ||delta|| in other directions; the logit bias, exact at the last block."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.model.kept_replies import keep_replies
from saesteer.sae.model.language_model import LanguageModel, wrap_model
from saesteer.sae.text.prompts import encode_prompt
from saesteer.steering.evaluation import controls
from saesteer.steering.evaluation.controls import (
    delta_vector,
    logit_bias,
    mean_difference_plan,
    random_plan,
)
from saesteer.steering.hooking.hook import steer
from saesteer.steering.plans.plan import ModelIdentity, Plan, PlannedLatent
from saesteer.steering.ranking.rank import RankConfig, rank
from saesteer.steering.tasks.task import load_task

from ..small_plans import CONTENTS, TASK, small_plan, small_sae


@pytest.fixture
def plan(lm: LanguageModel) -> Plan:
    return small_plan(lm, (7, 3, 5), scale=1.5, beta=0.5, scope="all")


@pytest.fixture
def sae(lm: LanguageModel) -> SAE:
    sae = small_sae(lm, 20)
    sae.W_dec[11] = 0
    sae.W_enc[:, 11] = 0
    return sae


def test_delta_vector_is_what_the_hook_adds(lm: LanguageModel, plan: Plan) -> None:
    ids = torch.tensor([[1, 50, 60, 70]])
    with torch.inference_mode(), steer(lm, plan) as report:
        lm.model(input_ids=ids)
    assert report.delta_norm == pytest.approx(float(delta_vector(plan).norm()), rel=1e-5)
    with pytest.raises(UsageError, match="`method` ablate does not fix"):
        delta_vector(dataclasses.replace(plan, method="ablate", scale=1.0, beta=0.0))


@pytest.mark.parametrize("unit", ["raw", "rel"])
def test_random_latents_have_the_same_length_and_are_others(
    plan: Plan, sae: SAE, unit: str
) -> None:
    if unit == "rel":
        plan = dataclasses.replace(plan, unit="rel", beta=0.0, scale=0.4)
    seen = set()
    for seed in range(8):
        drawn = random_plan(plan, sae, seed)
        assert delta_vector(drawn).norm() == pytest.approx(float(delta_vector(plan).norm()))
        assert len(set(drawn.ids)) == 3 and not {7, 3, 5, 11} & set(drawn.ids)
        assert torch.equal(drawn.directions, sae.W_dec[list(drawn.ids)])
        assert (drawn.scope, drawn.layer, drawn.unit) == ("all", 1, unit)
        seen |= set(drawn.ids)
    assert len(seen) > 8
    assert random_plan(plan, sae, 3).ids == random_plan(plan, sae, 3).ids


def test_random_directions_stand_in_without_an_sae(plan: Plan) -> None:
    drawn = random_plan(plan, None, 1)
    assert drawn.sae.source == "random directions"
    assert delta_vector(drawn).norm() == pytest.approx(float(delta_vector(plan).norm()))
    assert not torch.equal(drawn.directions, random_plan(plan, None, 2).directions)


def test_an_sae_too_small_to_draw_from(plan: Plan, sae: SAE) -> None:
    few = dataclasses.replace(
        sae, spec=dataclasses.replace(sae.spec, d_sae=8), W_enc=sae.W_enc[:, :8],
        W_dec=sae.W_dec[:8], b_enc=sae.b_enc[:8],
    )  # fmt: skip
    assert len(random_plan(plan, few).ids) == 3
    wide = dataclasses.replace(
        plan,
        latents=tuple(PlannedLatent(id=i, mu=1.0, sigma=1.0) for i in range(5)),
        directions=sae.W_dec[:5],
    )
    with pytest.raises(UserError, match="has 3 latents besides the plan's, too few to draw 5"):
        random_plan(wide, few)


def test_mean_difference_of_single_positions(lm: LanguageModel, plan: Plan) -> None:
    found = mean_difference_plan(lm, plan, TASK)
    means = []
    for texts in ([f"{text}\nSelect one" for text in CONTENTS], CONTENTS):
        rows = []
        for text in texts:
            prompt = encode_prompt(lm, text, chat=True)
            with torch.inference_mode():
                states = lm.model(
                    input_ids=torch.tensor([prompt.token_ids]), output_hidden_states=True
                ).hidden_states
            rows.append(states[2][0, prompt.user_span[1] - 1])
        means.append(torch.stack(rows).double().mean(dim=0))
    wanted = means[0] - means[1]
    cosine = torch.cosine_similarity(found.directions[0].double(), wanted, dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-5)
    assert delta_vector(found).norm() == pytest.approx(float(delta_vector(plan).norm()))


def test_mean_difference_of_replies_reads_other_positions(lm: LanguageModel, plan: Plan) -> None:
    by_reply = dataclasses.replace(plan, metrics={"read": "reply"})
    found = mean_difference_plan(lm, by_reply, TASK)
    assert found.sae.source == "mean difference"
    assert not torch.allclose(found.directions, mean_difference_plan(lm, plan, TASK).directions)


def test_how_replies_are_sampled_is_for_the_caller_to_say(
    lm: LanguageModel, plan: Plan, tmp_path: Path
) -> None:
    """Other replies are sampled, of the number and length that was asked for."""
    by_reply = dataclasses.replace(plan, metrics={"read": "reply"})
    usual = mean_difference_plan(lm, by_reply, TASK)
    asked = RankConfig(contents=2, max_new_tokens=3, temperature=0.0)
    stages: dict[str, float] = {}
    with keep_replies(tmp_path):
        found = mean_difference_plan(
            lm, by_reply, TASK, sampled=asked,
            progress=lambda stage, done, total, note: stages.update({stage: total or 0}),
        )  # fmt: skip
    assert stages["mean difference: plain replies"] == 2
    assert not torch.allclose(found.directions, usual.directions)


def test_a_ranking_and_the_mean_difference_share_their_replies(
    lm: LanguageModel, plan: Plan, sae: SAE, tmp_path: Path
) -> None:
    task = dataclasses.replace(load_task("french"), contents={"train": CONTENTS})
    with keep_replies(tmp_path):
        rank(lm, sae, task, RankConfig(read="reply", all_replies=True, shuffles=0), layer=1)
        before = sorted(tmp_path.iterdir())
        mean_difference_plan(lm, dataclasses.replace(plan, metrics={"read": "reply"}), task)
        assert before and sorted(tmp_path.iterdir()) == before  # nothing was sampled again


def test_nothing_to_take_a_mean_over(lm: LanguageModel, plan: Plan) -> None:
    with pytest.raises(UserError, match="has no train contents"):
        mean_difference_plan(lm, plan, dataclasses.replace(TASK, contents={"test": CONTENTS}))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_logit_bias_is_the_direct_term_of_the_last_block(
    family: str, tiny_lm: Callable[..., tuple[Any, Any]], plan: Plan
) -> None:
    """logits(h + v) = logits(h) s(h)/s(h + v) + bias: exact for one text, whose s is the median.

    The bias of GPT-2's norm and Gemma's soft cap are outside the identity, so logits are taken
    without them.
    """
    model, tokenizer = tiny_lm(family)
    if hasattr(model.config, "final_logit_softcapping"):
        model.config.final_logit_softcapping = None
    lm = wrap_model(model, tokenizer, "tiny")
    norm = lm.final_norm
    assert norm is not None
    if getattr(norm, "bias", None) is not None:
        norm.bias.data.zero_()
    plan = dataclasses.replace(
        plan, model=ModelIdentity(lm.name, lm.fingerprint, lm.n_layers, lm.d_model),
        layer=lm.n_layers - 1, scope="generation",
    )  # fmt: skip
    prompt = encode_prompt(lm, CONTENTS[0], chat=True)
    ids = torch.tensor([prompt.token_ids])
    kept = {}
    handle = lm.blocks[-1].register_forward_hook(
        lambda m, a, o: kept.update(h=(o if isinstance(o, torch.Tensor) else o[0])[0, -1])
    )
    with torch.inference_mode():
        plain = lm.model(input_ids=ids).logits[0, -1]
        handle.remove()
        with steer(lm, plan, prompt_lengths=[len(prompt)]):
            steered = lm.model(input_ids=ids).logits[0, -1]
        bias = logit_bias(lm, plan, [CONTENTS[0]])
        h = kept["h"].float()
        shrink = controls._spread(norm, h) / controls._spread(norm, h + delta_vector(plan).float())
    # float32 products in another order; the norms' epsilon
    torch.testing.assert_close(steered, plain * shrink + bias, atol=2e-3, rtol=2e-3)
