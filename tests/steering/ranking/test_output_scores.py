"""Output-side scores against finite differences and against one latent, one text at a time."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.model.hooks import HookPoint, sae_hook_point
from saesteer.sae.model.language_model import LanguageModel, wrap_model
from saesteer.steering.ranking.detection_scores import NO_VARIANT, TextsBuilder
from saesteer.steering.ranking.lens import lens_ids, lens_scores
from saesteer.steering.ranking.output_scores import (
    Contrast,
    attribution_scores,
    contrast_gradients,
    effect_scores,
    output_scores,
)

LAYER = 1
D_SAE = 10


@pytest.fixture
def lm(tiny_lm: Callable[..., tuple[Any, Any]]) -> LanguageModel:
    """In float64, so that differences are exact enough to be compared."""
    model, tokenizer = tiny_lm("llama")
    return wrap_model(model.double(), tokenizer, "tiny-llama")


def make_sae(**changes: Any) -> SAE:
    generator = torch.Generator().manual_seed(3)
    facts: dict[str, Any] = {
        "architecture": "topk", "d_model": 32, "d_sae": D_SAE, "k": 4,
        "hook_name": f"blocks.{LAYER}.hook_resid_post", "apply_b_dec_to_input": True,
    }  # fmt: skip
    spec = SAESpec(**{**facts, **changes})
    return SAE(
        spec=spec,
        W_enc=torch.randn(32, D_SAE, generator=generator) / 3,
        b_enc=torch.randn(D_SAE, generator=generator),
        W_dec=torch.randn(D_SAE, 32, generator=generator),
        b_dec=torch.randn(32, generator=generator),
    )


@pytest.fixture
def point(lm: LanguageModel) -> HookPoint:
    return sae_hook_point(make_sae(), lm)


def ids_of(lm: LanguageModel, text: str) -> list[int]:
    return list(lm.tokenizer(text)["input_ids"])


@pytest.fixture
def contrasts(lm: LanguageModel) -> list[Contrast]:
    rows = [
        ("The yield statement", "une expression de la liste", "returns a value"),
        ("Modules", "sont", "are objects, and so are the functions that they hold"),
        ("A tuple of one element", "exige une virgule", "needs"),
    ]
    return [
        Contrast(2 * i, *(ids_of(lm, text) for text in row)) for i, row in enumerate(rows)
    ]  # contents 0, 2, 4


def run(lm: LanguageModel, ids: list[int], edit: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """Logits of one text alone, `edit` changing the residual of the block in place."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        h = (output if isinstance(output, torch.Tensor) else output[0]).clone()
        edit(h)
        return h if isinstance(output, torch.Tensor) else (h, *output[1:])

    handle = lm.blocks[LAYER].register_forward_hook(hook)
    try:
        with torch.no_grad():
            return lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        handle.remove()


def slow_metric(lm: LanguageModel, contrast: Contrast, added: torch.Tensor) -> float:
    total = 0.0
    for sign, answer in ((1, contrast.followed), (-1, contrast.plain)):
        start = len(contrast.prompt) - 1

        def edit(h: torch.Tensor, start: int = start) -> None:
            h[:, start:] += added

        logits = run(lm, contrast.prompt + answer, edit)
        logp = [
            float(logits[start + t].log_softmax(dim=-1)[token]) for t, token in enumerate(answer)
        ]
        total += sign * sum(logp) / len(logp)
    return total


def test_gradients_are_slopes_of_the_metric(
    lm: LanguageModel, point: HookPoint, contrasts: list[Contrast]
) -> None:
    gradients = contrast_gradients(lm, point, contrasts)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        d = torch.randn(32, generator=generator, dtype=torch.float64)
        step = 1e-3
        slopes = [
            (slow_metric(lm, c, step * d) - slow_metric(lm, c, -step * d)) / (2 * step)
            for c in contrasts
        ]
        # Central differences: an error of step^2, and of float32 logits 1e-7 / step.
        np.testing.assert_allclose((gradients.double() @ d).numpy(), slopes, rtol=5e-3, atol=5e-4)
    assert gradients.abs().max() > 1e-2


@pytest.mark.parametrize("rescaled", [False, True])
def test_effects_are_products_with_decoder_rows(
    rescaled: bool, lm: LanguageModel, point: HookPoint, contrasts: list[Contrast]
) -> None:
    sae = make_sae(rescale_acts_by_decoder_norm=rescaled)
    gradients = contrast_gradients(lm, point, contrasts)
    found = effect_scores(sae, gradients)
    for j in range(D_SAE):
        row = sae.W_dec[j].double()
        row = row / row.norm() if rescaled else row
        wanted = sum(float(row @ g.double()) for g in gradients) / len(gradients)
        assert float(found[j]) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_attribution_is_effect_times_change(
    lm: LanguageModel, point: HookPoint, contrasts: list[Contrast]
) -> None:
    sae = make_sae()
    gradients = contrast_gradients(lm, point, contrasts)
    rng = np.random.default_rng(0)
    builder = TextsBuilder(D_SAE)
    plain = rng.exponential(size=(5, D_SAE)) * (rng.random((5, D_SAE)) < 0.6)
    instructed = rng.exponential(size=(2, 5, D_SAE)) * (rng.random((2, 5, D_SAE)) < 0.6)
    for content in range(5):
        builder.add(torch.from_numpy(plain[content]), positive=False, content=content,
                    variant=NO_VARIANT, success=False)  # fmt: skip
        for variant in range(2):
            builder.add(torch.from_numpy(instructed[variant, content]), positive=True,
                        content=content, variant=variant, success=True)  # fmt: skip
    found = attribution_scores(sae, contrasts, gradients, builder.build())
    for j in range(D_SAE):
        wanted = 0.0
        for i, content in enumerate((0, 2, 4)):  # those with a contrast
            change = instructed[:, content, j].mean() - plain[content, j]
            wanted += float(sae.W_dec[j].double() @ gradients[i].double()) * change / 3
        assert float(found[j]) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_output_scores_are_those_of_single_runs(lm: LanguageModel, point: HookPoint) -> None:
    sae, ids = make_sae(), [7, 0, 3, 9, 4]
    found = output_scores(lm, sae, point, ids, prompt="Statements end", batch_size=2)
    prompt, last = ids_of(lm, "Statements end"), []
    plain = run(lm, prompt, lambda h: last.append(h[0, -1].clone()))[-1]
    highest = float(sae.encode(last[0].float()[None]).max())
    assert highest > 0

    def prominence(logits: torch.Tensor, latent: int) -> float:
        order = torch.argsort(logits, descending=True).tolist()
        p = logits.softmax(dim=-1)
        (tokens,) = lens_ids(lm, sae.W_dec[latent][None], 20)
        b = min(tokens, key=order.index)
        return (1 - order.index(b) / len(order)) * float(p[b])

    for place, latent in enumerate(ids):

        def edit(h: torch.Tensor, latent: int = latent) -> None:
            h[:, -1] += 10 * highest * sae.W_dec[latent].double()

        steered = run(lm, prompt, edit)[-1]
        wanted = prominence(steered, latent) - prominence(plain, latent)
        assert float(found[place]) == pytest.approx(wanted, rel=1e-4, abs=1e-7)
    assert float(found.abs().max()) > 1e-3


def test_lens_scores_are_means_of_logits(lm: LanguageModel) -> None:
    directions = make_sae().W_dec
    texts, controls = ["yield a list"], ["The functions list"]
    ours, theirs = set(ids_of(lm, texts[0])), set(ids_of(lm, controls[0]))
    only, others = sorted(ours - theirs), sorted(theirs - ours)
    assert only and others and ours & theirs
    found = lens_scores(lm, directions, texts, controls)
    for d, score in zip(directions, found, strict=True):
        x = d.double() * math.sqrt(32) / d.double().norm()
        assert lm.final_norm is not None
        logits = lm.unembed(lm.final_norm(x[None]))[0].detach()
        assert float(score) == pytest.approx(
            float(logits[only].mean() - logits[others].mean()), rel=1e-4, abs=1e-6
        )
    assert not lens_scores(lm, directions, ["list"], ["list"]).any()
