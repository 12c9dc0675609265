"""Masses of latents, constant and error add up to the logit; edges to the pre-activation."""

from collections.abc import Callable
from typing import Any

import pytest

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.data.encoding import encode_pairs
from saesteer.mechanisms.latents.basis import latent_basis
from saesteer.mechanisms.latents.tracing import latent_edges, latent_trace
from saesteer.mechanisms.patching.sites import Node, read_values
from saesteer.sae.model.language_model import LanguageModel, wrap_model

from ..patching.test_vectors import make_pairs
from .test_effects import make_sae, planted

Make = Callable[..., tuple[Any, Any]]


@pytest.fixture
def lm(tiny_lm: Make) -> LanguageModel:
    model, tokenizer = tiny_lm("llama")
    return wrap_model(model.double(), tokenizer)


def test_masses_add_up_to_the_logit(lm: LanguageModel) -> None:
    pair = encode_pairs(lm, make_pairs(), allow_copies=True)[0][1]
    basis = latent_basis(lm, make_sae())
    found = latent_trace(lm, basis, pair)
    logits = read_values(lm, pair.clean, [])[1]
    # Norms of the library compute in float32, the frozen network in float64.
    assert found.total == pytest.approx(float(logits[pair.answer] - logits[pair.wrong]), abs=1e-5)
    # A Llama has no biases: nothing is left.
    assert found.rest == pytest.approx(0, abs=1e-10)
    assert found.error.abs().sum() > 1e-4 and found.latents.abs().sum() > 1e-3
    frame = found.to_frame()
    assert float(frame["mass"].sum()) == pytest.approx(float(found.latents.sum()), abs=1e-10)
    assert "rest" in repr(found) and len(found.largest(3)) == 3
    # By token, too: the mass of a token is that of its state.
    by_token = found.latents.sum(1) + found.constant + found.error
    assert by_token.shape == (len(pair.clean),)


def test_edges_add_up_to_the_pre_activation(lm: LanguageModel) -> None:
    ids = encode_pairs(lm, make_pairs(), allow_copies=True)[0][0].clean
    first, second = (latent_basis(lm, make_sae(layer=layer)) for layer in (1, 3))
    edges = latent_edges(lm, ids, first, second, target=5, at=4)
    (h,), _ = read_values(lm, ids, [(Node("resid_post", 3), 4)])
    assert edges.pre_act == pytest.approx(float(second.sae.pre_acts(h)[5]), abs=1e-5)
    total = float(edges.latents.sum() + edges.error.sum()) + edges.constant
    assert total == pytest.approx(edges.pre_act, abs=1e-10)
    assert not edges.latents[5:].any()  # later tokens cannot be looked at
    # The constant is what the biases of both SAEs give, and no more: a Llama has none.
    fixed = second.sae.b_enc[5] - second.sae.b_dec @ second.sae.W_enc[:, 5]
    own = edges.constant - float(fixed)
    assert abs(own) < 0.2
    for args in ((second, first, 0), (first, first, 0), (first, second, 40)):
        with pytest.raises(UsageError, match="later block|no linear pre-activation"):
            latent_edges(lm, ids, args[0], args[1], args[2], 4)


def test_a_latent_that_is_read_by_nothing_has_no_mass(toy: LanguageModel) -> None:
    sae, moved, _ = planted(toy)
    trace = latent_trace(toy, latent_basis(toy, sae, layer=1, site="resid_post"), moved[0].pair)
    assert trace.total == pytest.approx(10, abs=1e-3)
    assert not trace.latents.any()  # both planted latents are silent in the clean prompt
    assert float(trace.error[-1]) == pytest.approx(10, abs=1e-3)
    assert float(trace.error[:-1].abs().max()) == pytest.approx(0, abs=1e-6)
