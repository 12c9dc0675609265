"""Plans of directions that come from no SAE."""

from pathlib import Path

import pytest
import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.model.hooks import capture, resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import encode_prompt
from saesteer.steering.evaluation.controls import mean_difference_plan
from saesteer.steering.hooking.hook import steer
from saesteer.steering.hooking.latent_values import with_gate
from saesteer.steering.plans.directions import mean_difference, plan_from_directions
from saesteer.steering.plans.plan import Plan
from saesteer.steering.plans.plan_file import load_plan, save_plan

from ..small_plans import CONTENTS, TASK, small_plan

POSITIVE, NEGATIVE = ["a name is bound", "yield it twice"], ["the tuple", "objects are", "one"]


def moved(lm: LanguageModel, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual of a token before and after the edit."""
    here = resolve_site(lm, plan.layer)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        with capture([here]) as before:
            lm.model(input_ids=ids)
        with steer(lm, plan), capture([here]) as after:
            lm.model(input_ids=ids)
    return before[here.key][0, -1], after[here.key][0, -1]


@pytest.mark.parametrize("read", ["last", "template"])
def test_the_mean_difference_is_added_as_it_is(read: str, lm: LanguageModel) -> None:
    plan = mean_difference(lm, POSITIVE, NEGATIVE, layer=2, read=read, batch_size=2)
    here = resolve_site(lm, 2)
    means = []
    for texts in (POSITIVE, NEGATIVE):
        rows = []
        for prompt in [encode_prompt(lm, text, chat=True) for text in texts]:
            with torch.no_grad(), capture([here]) as seen:
                lm.model(input_ids=torch.tensor([prompt.token_ids]))
            at = -1 if read == "template" else prompt.user_span[1] - 1
            rows.append(seen[here.key][0, at])
        means.append(torch.stack(rows).mean(dim=0))
    before, after = moved(lm, plan)
    # Float32 rows of a padded batch against single ones.
    torch.testing.assert_close(after - before, means[0] - means[1], rtol=1e-4, atol=1e-4)
    assert plan.sae.source == "mean difference"


def test_one_mean_difference_serves_plans_and_controls(lm: LanguageModel) -> None:
    plan = small_plan(lm, (7,))
    control = mean_difference_plan(lm, plan, TASK)
    texts = [f"{text}\n{TASK.instruction}" for text in CONTENTS]
    found = mean_difference(lm, texts, CONTENTS, layer=plan.layer)
    assert torch.equal(control.directions, found.directions)


def test_sinks_are_left_out_of_short_texts_whatever_the_batch_size(lm: LanguageModel) -> None:
    lm.tokenizer.chat_template = None
    (sink,) = lm.tokenizer("H")["input_ids"]
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[sink] *= 300
    texts = ["the end", "a", "H", "of one"]
    wanted = mean_difference(lm, ["it is so"], [t for t in texts if t != "H"], layer=1)
    for batch_size in (1, 2, 16):
        found = mean_difference(lm, ["it is so"], texts, layer=1, batch_size=batch_size)
        # A padded batch is summed in another order.
        torch.testing.assert_close(found.directions, wanted.directions, rtol=1e-4, atol=1e-5)
        assert found.latents[0].mu == pytest.approx(wanted.latents[0].mu, rel=1e-4)


def test_directions_take_every_method(lm: LanguageModel, tmp_path: Path) -> None:
    d = torch.randn(32, generator=torch.Generator().manual_seed(0))
    unit = d / d.norm()
    for method, wanted in (("set", float(d.norm())), ("ablate", 0.0), ("project", 0.0)):
        plan = plan_from_directions(lm, d[None], layer=1, method=method)
        save_plan(plan, tmp_path / method)
        before, after = moved(lm, load_plan(tmp_path / method))
        assert float(after @ unit) == pytest.approx(wanted, abs=1e-4)
        # What is across the direction stays.
        across = before - (before @ unit) * unit
        torch.testing.assert_close(after - (after @ unit) * unit, across, rtol=1e-4, atol=1e-4)
    relative = plan_from_directions(lm, d[None], layer=1, unit="rel", scale=0.5)
    before, after = moved(lm, relative)
    assert float((after - before).norm()) == pytest.approx(0.5 * float(before.norm()), rel=1e-4)


def test_a_gate_may_ask_for_the_direction(lm: LanguageModel) -> None:
    d = torch.randn(32, generator=torch.Generator().manual_seed(0))
    plan = plan_from_directions(lm, d[None], layer=1)
    before, _ = moved(lm, plan)
    value = float(before @ d / d.norm())
    for threshold, opens in ((value - 0.1, True), (value + 0.1, False)):
        after = moved(lm, with_gate(plan, f"0 > {threshold}"))[1]
        assert (not torch.equal(after, before)) == opens


def test_what_gives_no_direction_is_an_error(lm: LanguageModel) -> None:
    with pytest.raises(UsageError, match="length 0"):
        plan_from_directions(lm, torch.zeros(1, 32), layer=1)
    with pytest.raises(UsageError, match="33 wide"):
        plan_from_directions(lm, torch.ones(1, 33), layer=1)
    with pytest.raises(UserError, match="same mean residual"):
        mean_difference(lm, ["one"], ["one"], layer=1)
    with pytest.raises(UsageError, match="no negative"):
        mean_difference(lm, ["one"], [], layer=1)
