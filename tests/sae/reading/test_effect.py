"""Steering with a direction is the same as steering with a plan of unit rel."""

from collections.abc import Callable

import torch

from saesteer.sae.model.hooks import resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.reading.effect import steering_effects

from .small_sae import config, small_sae


def test_it_is_what_a_plan_of_unit_rel_does(shared_lm: Callable[..., LanguageModel]) -> None:
    from saesteer.steering import generate_steered, plan_from_latents

    lm = shared_lm()
    sae = small_sae(lm)
    point = resolve_site(lm, 1)
    settings = config(dose=0.5, new_tokens=8, neutral_prompt="The class of all objects")
    found = steering_effects(lm, point, 3 * sae.W_dec[:3], settings)  # the length does not matter
    for latent, one in enumerate(found):
        plan = plan_from_latents(lm, sae, 1, {latent: 1.0}, unit="rel", scale=0.5)
        (answer,) = generate_steered(
            lm, [settings.neutral_prompt], plan, chat=False, max_new_tokens=8, baseline=True
        )
        assert one.completion.strip() == answer.completion
        assert one.baseline.strip() == answer.baseline
        assert (one.dose, one.prompt) == (0.5, settings.neutral_prompt)
    assert len({one.completion for one in found}) > 1


def test_the_next_token_is_measured(shared_lm: Callable[..., LanguageModel]) -> None:
    lm = shared_lm("gpt2")
    point = resolve_site(lm, 2)
    direction = torch.randn(2, lm.d_model, generator=torch.Generator().manual_seed(0))
    prompt = "Hello there"
    found = steering_effects(lm, point, direction, config(dose=2.0, neutral_prompt=prompt))
    ids = torch.tensor([lm.tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        plain = lm.model(ids).logits[0, -1].double().log_softmax(-1)
        unit = direction[1] / direction[1].norm()

        def edit(module, args, output):  # type: ignore[no-untyped-def]
            h = output[0] if isinstance(output, tuple) else output
            new = h.clone()
            new[:, -1] += 2.0 * h[:, -1].norm() * unit
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = lm.blocks[2].register_forward_hook(edit)
        steered = lm.model(ids).logits[0, -1].double().log_softmax(-1)
        handle.remove()
    kl = float((steered.exp() * (steered - plain)).sum())
    # Log-probabilities in float32.
    assert abs(found[1].kl - kl) < 1e-4
    best = int((steered.exp() - plain.exp()).argmax())
    raised = found[1].raised[0]
    assert abs(raised.before - float(plain[best].exp())) < 1e-5
    assert abs(raised.after - float(steered[best].exp())) < 1e-5


def test_no_direction_is_no_work(shared_lm: Callable[..., LanguageModel]) -> None:
    lm = shared_lm()
    assert steering_effects(lm, resolve_site(lm, 1), torch.zeros(0, lm.d_model), config()) == []
