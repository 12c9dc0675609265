"""Two models by latents: nothing for equal ones, a planted latent first, and its scale."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.config import LatentConfig
from saesteer.mechanisms.data.encoding import EncodedPair, encode_pairs
from saesteer.mechanisms.latents.basis import LatentBasis, latent_basis
from saesteer.mechanisms.latents.comparing import (
    crosscoder_shares,
    latent_diff,
    latent_scaling,
    moved_by_models,
)
from saesteer.mechanisms.latents.effects import latent_effects
from saesteer.mechanisms.patching.reference import patched_logits
from saesteer.mechanisms.patching.sites import Patch, read_values
from saesteer.sae.model.language_model import LanguageModel, wrap_model

from ..patching.test_vectors import make_pairs
from .test_effects import make_sae

Make = Callable[..., tuple[Any, Any]]
PLANTED = 7


def model(tiny_lm: Make, basis_row: torch.Tensor | None = None) -> LanguageModel:
    """A tiny Llama; with a row, its MLP of block 1 writes so much of it at every token."""
    own, tokenizer = tiny_lm("llama")
    own = own.double()
    if basis_row is not None:
        module = own.model.layers[1].mlp
        module.register_forward_hook(lambda _, __, out: out + basis_row)
    return wrap_model(own, tokenizer, "tuned" if basis_row is not None else "base")


@pytest.fixture
def basis(tiny_lm: Make) -> LatentBasis:
    return latent_basis(model(tiny_lm), make_sae())


@pytest.fixture
def pairs(tiny_lm: Make) -> list[EncodedPair]:
    return encode_pairs(model(tiny_lm), make_pairs(), allow_copies=True)[0]


def test_a_model_is_like_itself(
    tiny_lm: Make, basis: LatentBasis, pairs: list[EncodedPair]
) -> None:
    one, other = model(tiny_lm), model(tiny_lm)
    found = latent_diff(one, other, basis, pairs)
    assert (found.change == 0).all() and (found.p == 1).all() and found.summary() == []
    assert found.unexplained[0] == found.unexplained[1] and found.warnings() == []
    np.testing.assert_array_equal(found.beta[0], found.beta[1])


def test_a_planted_latent_is_found_first(
    tiny_lm: Make, basis: LatentBasis, pairs: list[EncodedPair]
) -> None:
    row = 2 * basis.steps[PLANTED]
    base, tuned = model(tiny_lm), model(tiny_lm, row)
    found = latent_diff(base, tuned, basis, pairs)
    assert found.summary()[0]["latent"] == PLANTED
    assert found.p[PLANTED] < 0.05 and found.low[PLANTED] > 0 and found.rate[1][PLANTED] > 0.95
    assert found.change[PLANTED] == pytest.approx(
        found.rate[1][PLANTED] * found.mean[1][PLANTED]
        - found.rate[0][PLANTED] * found.mean[0][PLANTED]
    )
    # New, not louder: the base has little of what the tuned model's activations say.
    assert found.beta[0][PLANTED] < 0.5 * found.beta[1][PLANTED]
    assert found.n_tokens == sum(len(pair.clean) - 1 for pair in pairs)
    assert "base -> tuned" in repr(found) and len(found.to_frame()) == len(found.summary())
    assert set(found.document()) >= {"latents", "unexplained", "warnings"}


def test_the_effect_of_the_tuned_models_latents(
    tiny_lm: Make, basis: LatentBasis, pairs: list[EncodedPair]
) -> None:
    base, tuned = model(tiny_lm), model(tiny_lm, 2 * basis.steps[PLANTED])
    moved = moved_by_models(base, tuned, pairs, basis, "last")
    result = latent_effects(base, basis, moved, "logit-diff", LatentConfig(random=0))
    pair = pairs[2]
    (theirs,), _ = read_values(tuned, pair.clean, [(basis.node, len(pair.clean) - 1)])
    logits = patched_logits(base, pair.clean, [Patch(basis.node, len(pair.clean) - 1, theirs)])
    plain = read_values(base, pair.clean, [])[1]
    expected = [float(x[pair.answer] - x[pair.wrong]) for x in (logits, plain)]
    assert result.site[2] == pytest.approx(expected[0] - expected[1], abs=1e-10)
    effects = {row["latent"]: row["effect"] for row in result.summary}
    first = latent_diff(base, tuned, basis, pairs).summary(effects)[0]
    assert abs(first["effect"]) == max(map(abs, effects.values()))


def test_latent_scaling_is_least_squares() -> None:
    drawn = torch.Generator().manual_seed(0)
    f, acts = torch.rand(30, 3, generator=drawn), torch.rand(30, 3, generator=drawn)
    steps = torch.randn(3, 5, generator=drawn, dtype=torch.float64)
    error = torch.randn(30, 5, generator=drawn, dtype=torch.float64)
    f[:, 2] = 0
    found = latent_scaling(f, acts, error, steps)
    for j in (0, 1):
        left = (acts[:, j : j + 1].double() * steps[j] + error).reshape(-1, 1)
        along = (f[:, j : j + 1].double() * steps[j]).reshape(-1, 1)
        expected = torch.linalg.lstsq(along, left).solution.item()
        assert float(found[j]) == pytest.approx(expected)
    assert torch.isnan(found[2])
    # Activations that are the model's own and no error: exactly 1.
    assert float(latent_scaling(acts, acts, 0 * error, steps)[0]) == pytest.approx(1)


def test_shares_of_a_crosscoder() -> None:
    sae = make_sae(width=8, d_sae=3)
    rows = torch.zeros(3, 8, dtype=torch.float64)
    rows[0, 0], rows[1, 5], rows[2, 1], rows[2, 6] = 3.0, 2.0, 1.0, 0.5
    parts = [{"hook_name": "blocks.1.hook_resid_post", "d_model": 4, "input_scale": scale}
             for scale in (1.0, 2.0)]  # fmt: skip
    spec = replace(sae.spec, hook_name="", metadata={"saesteer": {"crosscoder": parts}})
    found = crosscoder_shares(replace(sae, W_dec=rows, spec=spec))
    assert found.tolist() == [[1, 0], [0, 1], [0.5, 0.5]]
    with pytest.raises(UsageError, match="is no crosscoder"):
        crosscoder_shares(sae)
