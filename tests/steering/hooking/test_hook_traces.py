"""What steering leaves as it was: other positions, the blocks' own tensors, the model after it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.sae.model.hooks import capture, resolve_site, run_to
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.hooking.hook import steer

from ..hook_reference import generate, hooks_on, prompts_of, ranked_plan
from ..whole_row import LAYER, STEPS, make_sae

pytestmark = pytest.mark.usefixtures("endless")


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_only_the_steered_positions_of_the_steered_layer_on_change(
    family: str, lm_of: Callable[..., LanguageModel]
) -> None:
    lm = lm_of(family, endless=True)
    plan = ranked_plan(lm, make_sae(lm))
    ids = torch.tensor([prompts_of(lm)[0].token_ids])
    points = [resolve_site(lm, layer) for layer in range(lm.n_layers)]
    with torch.no_grad():
        with capture(points) as before:
            lm.model(input_ids=ids)
        with steer(lm, plan), capture(points) as during:
            lm.model(input_ids=ids)
        with capture(points) as after:
            lm.model(input_ids=ids)
    for point in points:
        assert torch.equal(before[point.key], after[point.key])
        changed = (before[point.key] != during[point.key]).any(dim=-1)[0]
        if point.layer < LAYER:
            assert not changed.any()
        else:  # causal attention: nothing before the last position can change
            assert not changed[:-1].any() and changed[-1]


@pytest.mark.parametrize("method", ["add", "set", "project"])
def test_the_blocks_own_output_is_never_written_to(method: str, lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm), method=method)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = lm.blocks[LAYER].register_forward_hook(
        lambda module, args, output: seen.append((output, output.clone()))
    )
    with torch.no_grad(), steer(lm, plan, scope="all"):
        lm.model(input_ids=torch.tensor([[5, 6, 7]]))
    handle.remove()
    assert seen and all(torch.equal(output, copy) for output, copy in seen)


def test_nothing_is_left_on_the_model_and_the_bodys_error_passes(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    prompts = prompts_of(lm)
    before = generate(lm, prompts)[1]
    with pytest.raises(ZeroDivisionError), steer(lm, plan):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), steer(lm, plan):
        generate(lm, prompts)
        raise ZeroDivisionError
    assert hooks_on(lm) == 0
    assert "generate" not in vars(lm.model)
    assert torch.equal(generate(lm, prompts)[1], before)


def test_a_failed_pass_does_not_confuse_the_next(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    prompts = prompts_of(lm)
    with steer(lm, plan):
        wanted = generate(lm, prompts)[1]
    with steer(lm, plan):
        with pytest.raises(IndexError):
            lm.model.generate(input_ids=torch.tensor([[5, 10**6]]), max_new_tokens=2)
        assert torch.equal(generate(lm, prompts)[1], wanted)


@pytest.mark.parametrize("fails", [False, True])
def test_one_context_may_see_every_kind_of_pass(fails: bool, lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    prompts = prompts_of(lm)
    last = resolve_site(lm, -1)
    with torch.no_grad(), steer(lm, plan) as report:
        generate(lm, prompts[:1])
        if fails:
            with pytest.raises(IndexError):
                lm.model(input_ids=torch.tensor([[5, 10**6]]))
        run_to(lm, [last], input_ids=torch.tensor([[5, 6, 7]]))
        lm.model(input_ids=torch.tensor([[8, 9]]))
        generate(lm, prompts[1:])
    first, second, third = (list(range(len(p) - 1, len(p) + STEPS - 1)) for p in prompts)
    failed: list[list[int]] = [[]] if fails else []
    assert [row.positions.tolist() for row in report.rows] == [
        first, *failed, [2], [1], second, third
    ]  # fmt: skip


def test_a_generate_of_ones_own_is_put_back(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    calls = []
    original = lm.model.generate

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(*args, **kwargs)

    lm.model.generate = mine
    with steer(lm, plan):
        generate(lm, prompts_of(lm))
    assert lm.model.generate is mine
    assert len(calls) == 1


def test_multiplier_0_is_off_to_the_bit(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    prompts = prompts_of(lm)
    before = generate(lm, prompts)[1]
    with steer(lm, plan, scale=0.0) as report:
        assert hooks_on(lm) == 0
        assert torch.equal(generate(lm, prompts)[1], before)
    assert report.tokens_touched == 0
    assert report.relative_dose is None


def test_a_model_that_was_compiled_before_is_steered_and_then_no_more(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    ids = torch.tensor([prompts_of(lm)[0].token_ids])
    with torch.no_grad():
        before = lm.model(input_ids=ids).logits
        with steer(lm, plan):
            wanted = lm.model(input_ids=ids).logits
        lm.model.forward = torch.compile(lm.model.forward, backend="eager")
        for _ in range(2):
            assert torch.equal(lm.model(input_ids=ids).logits, before)
            with steer(lm, plan) as report:
                assert torch.equal(lm.model(input_ids=ids).logits, wanted)
            assert report.rows[0].positions.tolist() == [ids.shape[1] - 1]
