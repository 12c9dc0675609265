"""Shortcuts against what they approximate: derivatives, softmaxes, line integrals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.patching import approximation
from saesteer.mechanisms.patching.approximation import Gradients, approximate
from saesteer.mechanisms.patching.reference import patched_logits
from saesteer.mechanisms.patching.sites import Node, Patch, read_values
from saesteer.sae.model.attention import head_tap
from saesteer.sae.model.hooks import hooked, resolve_site
from saesteer.sae.model.language_model import LanguageModel, uncompiled, wrap_model

Make = Callable[..., tuple[Any, Any]]
BASE = [int(x) for x in torch.arange(9) * 17 % 390 + 3]
SOURCE = [*BASE[:3], *(int(x) for x in torch.arange(6) * 29 % 390 + 5)]


def score(logits: Tensor) -> Tensor:
    return logits[:, 7].double() - logits[:, 30].double()


def double(tiny_lm: Make, family: str = "llama") -> LanguageModel:
    model, tokenizer = tiny_lm(family)
    return wrap_model(model.double(), tokenizer)


# RMSNorm computes in float32 whatever the model's dtype is: steps must be larger there.
@pytest.mark.parametrize(
    ("family", "dose", "rounding"), [("llama", 0.04, 1e-4), ("gpt_neox", 2e-3, 1e-9)]
)
def test_a_small_step_has_the_effect_that_atp_says(
    tiny_lm: Make, family: str, dose: float, rounding: float
) -> None:
    lm = double(tiny_lm, family)
    nodes = [Node("resid_pre", 0), Node("resid_post", 1), Node("attn_out", 2), Node("mlp_out", 1)]
    nodes += [Node(site, 1, 2) for site in ("q", "k", "v", "pattern", "z")]
    wanted = [(node, 4, 4) for node in nodes]
    with head_tap(lm) as tap:
        found = approximate(lm, BASE, SOURCE, wanted, score, "atp", tap=tap)
        places = [(node, 4) for node in nodes]
        new, _ = read_values(lm, SOURCE, places, tap)
        old, plain = read_values(lm, BASE, places, tap)
        errors = []
        for step in (dose, dose / 2):
            effects = []
            for node, a, b in zip(nodes, new, old, strict=True):
                patched = patched_logits(lm, BASE, [Patch(node, 4, b + step * (a - b))])
                effects.append(score(patched[None])[0] - score(plain[None])[0])
            errors.append((torch.stack(effects) - step * found).abs())
    assert (found.abs() > 1e-3).sum() >= 7
    # The rest is of second order: half the dose, a quarter of the error.
    large = errors[0] > rounding
    assert large.sum() >= 3
    assert ((errors[1] / errors[0])[large] - 0.25).abs().max() < 0.08


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_atp_star_computes_the_softmax_again(
    tiny_lm: Make, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = double(tiny_lm, family)
    wanted = [(Node(site, 2, head), 4, 4) for site in ("q", "k") for head in (0, 3)]
    plain_signs = []

    def signs_of(*args: Any) -> Tensor:
        found = real(*args)
        plain_signs.append(found)
        return found

    real = approximation._with_softmax
    monkeypatch.setattr(approximation, "_with_softmax", signs_of)
    with head_tap(lm) as tap:
        star = approximate(lm, BASE, SOURCE, wanted, score, "atp*", tap=tap)
        grad = Gradients(lm, BASE, {(2, "z")}, score, tap).grads[2, "z"]
        new, _ = read_values(lm, SOURCE, [(node, at) for node, at, _ in wanted], tap)
        expected = []
        for (node, _, _), value in zip(wanted, new, strict=True):
            seen: list[Tensor] = []

            def put(x: Tensor, node: Node = node, value: Tensor = value) -> Tensor:
                x = x.clone()
                x[0, node.head, 4] = value
                return x

            for edits in ({}, {(2, node.site): put}):
                tap.edits = {**edits, (2, "z"): lambda z, seen=seen: seen.append(z.detach())}
                with torch.no_grad():
                    uncompiled(lm.model)(input_ids=torch.tensor([BASE]), use_cache=False)
            tap.edits = {}
            expected.append(((seen[1] - seen[0]) * grad).sum())
    torch.testing.assert_close(plain_signs[0], torch.stack(expected), rtol=1e-9, atol=1e-12)
    assert torch.equal(star.sign(), plain_signs[0].sign())
    cut = torch.stack(plain_signs[1:]).abs()
    assert len(cut) == lm.n_layers and (cut[2] == 0).all()
    torch.testing.assert_close(star.abs(), cut.sum(0) / 3)


def test_a_cut_block_passes_no_gradient(tiny_lm: Make) -> None:
    lm = double(tiny_lm)
    places = {(2, "resid_post"), (3, "resid_post"), (3, "mlp_out")}
    found = Gradients(lm, BASE, places, score, None, cut=3).grads
    torch.testing.assert_close(found[2, "resid_post"], found[3, "resid_post"])
    assert (found[3, "mlp_out"] == 0).all()
    whole = Gradients(lm, BASE, places, score, None).grads
    assert not torch.allclose(whole[2, "resid_post"], whole[3, "resid_post"])


def test_integrated_gradients_add_up(tiny_lm: Make) -> None:
    """Over all embeddings they are the difference of the metric, up to the sum for the integral."""
    lm = double(tiny_lm)
    wanted = [(Node("resid_pre", 0), t, t) for t in range(len(BASE))]
    ends = [score(read_values(lm, ids, [])[1][None])[0] for ids in (BASE, SOURCE)]
    total = float(ends[1] - ends[0])
    errors = []
    for steps in (20, 80):
        found = approximate(lm, BASE, SOURCE, wanted, score, "ig", ig_steps=steps)
        assert (found[:3] == 0).all()  # the same tokens
        errors.append(abs(float(found.sum()) - total))
    assert errors[1] < 0.03 * abs(total) and errors[1] < errors[0] + 1e-3
    with pytest.raises(UsageError, match="needs runs of one length, got 9 and 8 tokens; use atp"):
        approximate(lm, BASE, SOURCE[:8], wanted[:1], score, "ig")


def test_ig_of_one_step_is_the_gradient_half_way(tiny_lm: Make) -> None:
    lm = double(tiny_lm)
    embed = lm.model.get_input_embeddings().weight
    middle = (embed[BASE] + embed[SOURCE])[None] / 2
    found = Gradients(lm, BASE, {(1, "resid_post")}, score, None, start=middle).grads
    direct = middle.clone().requires_grad_(True)
    seen: list[Tensor] = []
    with hooked(resolve_site(lm, 1, "resid_post"), lambda h: seen.append(h)):
        logits = uncompiled(lm.model)(inputs_embeds=direct, use_cache=False).logits[:, -1]
    (expected,) = torch.autograd.grad(score(logits)[0], seen)
    torch.testing.assert_close(found[1, "resid_post"], expected)
