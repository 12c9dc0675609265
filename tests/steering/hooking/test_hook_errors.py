"""What the steering hook refuses, and what it asks for: prompts, wordings, the plan's own SAE."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import save_sae
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import encode_prompt
from saesteer.steering.hooking.hook import steer
from saesteer.steering.plans.plan import TaskIdentity

from ..hook_reference import check_against_reference, generate, prompts_of, ranked_plan
from ..whole_row import LAYER, STEPS, make_sae

pytestmark = pytest.mark.usefixtures("endless")


def test_a_run_that_touches_no_token_is_an_error(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    with pytest.raises(UserError, match="touched no token: `scope` generated .* 1 forward passes"):
        with steer(lm, plan, scope="generated"):
            generate(lm, prompts_of(lm), max_new_tokens=1)


def test_a_model_that_does_not_run_is_an_error(lm: LanguageModel) -> None:
    with pytest.raises(UserError, match="the model did not run inside steer"):
        with steer(lm, ranked_plan(lm, make_sae(lm))):
            pass


def test_a_plan_for_another_model_needs_force(lm_of: Callable[..., LanguageModel]) -> None:
    lm, other = lm_of("llama", endless=True), lm_of("qwen3", endless=True)
    plan = ranked_plan(lm, make_sae(lm))
    with pytest.raises(UserError, match="made for tiny-llama .*tiny-qwen3 differs.*`force`"):
        with steer(other, plan):
            pass
    with steer(other, plan, force=True) as report:
        generate(other, prompts_of(other))
    assert report.tokens_touched == 3 * STEPS


def test_prompts_that_are_not_run_are_an_error(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    prompts = prompts_of(lm)
    with pytest.raises(UserError, match="row 0 .* begins with none of the 2 prompts"):
        with steer(lm, plan, scope="all", prompts=prompts[1:]):
            generate(lm, prompts[:1])


@pytest.mark.parametrize("scope", ["span:0-4", "after-instruction"])
def test_scopes_on_text_need_the_prompts(scope: str, lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    with pytest.raises(UsageError, match=f"`scope` {scope} depends on the text of the prompts"):
        with steer(lm, plan, scope=scope, instructions=["x"]):
            pass


def test_after_instruction_needs_the_wordings(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    with pytest.raises(UsageError, match="needs the texts of the instruction"):
        with steer(lm, plan, scope="after-instruction", prompts=prompts_of(lm)):
            pass


def test_a_site_off_the_residual_stream_is_an_error(lm: LanguageModel) -> None:
    sae = make_sae(lm)
    sae = dataclasses.replace(sae, spec=dataclasses.replace(sae.spec, hook_name=""))
    plan = ranked_plan(lm, sae, layer=LAYER, site="model.layers.1.mlp.up_proj")
    with pytest.raises(UserError, match=r"`site` .*up_proj.* shape \[3, \d+, 64\], not"):
        with steer(lm, plan):
            generate(lm, prompts_of(lm))


def test_reading_a_topk_sae_needs_the_sae_that_the_plan_was_made_from(
    lm: LanguageModel, tmp_path: Any
) -> None:
    sae = make_sae(lm, "topk")
    folder = tmp_path / "sae"
    sha256 = save_sae(folder, sae.spec, **sae.tensors())
    plan = ranked_plan(
        lm, dataclasses.replace(sae, source=str(folder), sha256=sha256), method="set"
    )
    check_against_reference(lm, sae, plan, prompts_of(lm))
    other = make_sae(lm, "topk", seed=5)
    save_sae(folder, other.spec, **other.tensors())
    with pytest.raises(UserError, match="is not the one the plan was made from"):
        with steer(lm, plan):
            pass
    (folder / "cfg.json").unlink()
    with pytest.raises(UserError, match="TopK SAE needs the SAE itself.*give `sae`"):
        with steer(lm, plan):
            pass
    # Adding reads no latent and needs no SAE.
    check_against_reference(lm, sae, dataclasses.replace(plan, method="add"), prompts_of(lm))


def test_encoder_decoders_are_refused(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    lm.model.config.is_encoder_decoder = True
    with pytest.raises(UserError, match="tiny is an encoder-decoder"):
        with steer(lm, plan):
            pass


def test_after_instruction_takes_the_wordings_of_the_plans_task(lm: LanguageModel) -> None:
    from saesteer.steering.tasks.task import compose, load_task

    task = load_task("french")
    plan = ranked_plan(lm, make_sae(lm), task=TaskIdentity(task.name, task.hash))
    prompts = [
        encode_prompt(lm, compose("Names are bound.", text), chat=True)
        for text in (task.instruction, task.variants[-1].text)
    ]
    with steer(lm, plan, scope="after-instruction", prompts=prompts) as report:
        generate(lm, prompts)
    for row, prompt in zip(report.rows, prompts, strict=True):
        tail = list(range(prompt.user_span[1], len(prompt)))
        assert row.positions[: len(tail)].tolist() == tail
    for unknown in (TaskIdentity("mine", "0"), TaskIdentity("french", "0")):
        old = dataclasses.replace(plan, task=unknown)
        with pytest.raises(UsageError, match=f"this plan of {unknown.name} does not hold them"):
            with steer(lm, old, scope="after-instruction", prompts=prompts):
                pass
    # The plan's own wordings come first, whatever the name says.
    prompts = [encode_prompt(lm, "Names are bound. Go on as I said, please.", chat=True)]
    own = dataclasses.replace(plan, task=TaskIdentity("french", "0", ("Go on",)))
    with steer(lm, own, scope="after-instruction", prompts=prompts) as report:
        generate(lm, prompts)
    at = prompts[0].text.index("Go on")
    assert report.rows[0].positions[0] == prompts[0].token_span(at, at + len("Go on"))[1]
