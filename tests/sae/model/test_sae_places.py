"""Where transcoders and crosscoders read and write in a model, and where they steer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.model.sae_places import is_plain, sae_places, steered

Shared = Callable[..., LanguageModel]
F = 12


def random_sae(
    lm: LanguageModel, places: int = 1, d_out: int | None = None, **metadata: Any
) -> SAE:
    rng = torch.Generator().manual_seed(1)
    D = places * lm.d_model
    out = D if d_out is None else d_out
    return SAE(
        spec=SAESpec(
            architecture="standard",
            d_model=D,
            d_sae=F,
            d_out=d_out,
            hook_name="blocks.1.hook_resid_mid" if places == 1 else "",
            metadata={
                "saesteer": {"model": {"name": lm.name, "hash": lm.fingerprint}},
                **metadata,
            },
        ),
        W_enc=torch.randn(D, F, generator=rng),
        b_enc=torch.zeros(F),
        W_dec=torch.randn(F, out, generator=rng),
        b_dec=torch.zeros(out),
    )


def crosscoder(lm: LanguageModel, hashes: tuple[str, str]) -> SAE:
    parts = [
        {
            "layer": layer,
            "site": "resid_post",
            "hook_name": f"blocks.{layer}.hook_resid_post",
            "d_model": lm.d_model,
            "input_scale": 2.0,
            "model": {"name": name, "hash": name},
        }
        for layer, name in zip((1, 2), hashes, strict=True)
    ]
    facts = {"model": {"name": hashes[0], "hash": hashes[0]}, "crosscoder": parts}
    return random_sae(lm, 2, saesteer=facts)


def test_an_sae_of_one_place(shared_lm: Shared) -> None:
    lm = shared_lm()
    sae = random_sae(lm)
    places = sae_places(sae, lm)
    assert places.reads == places.writes and places.reads[0].key == (1, "resid_mid")
    assert is_plain(sae) and steered(sae, lm)[1] is sae


def test_a_transcoder(shared_lm: Shared) -> None:
    lm = shared_lm()
    sae = random_sae(lm, d_out=lm.d_model, hook_name_out="blocks.1.hook_mlp_out")
    places = sae_places(sae, lm)
    assert [point.key for point in places.points] == [(1, "resid_mid"), (1, "mlp_out")]
    point, view = steered(sae, lm, layer=1, site="mlp_out")
    assert point.key == (1, "mlp_out") and view is sae and not is_plain(sae)
    with pytest.raises(UsageError, match="writes layer 1 mlp_out; asked: `layer` 2"):
        steered(sae, lm, layer=2)
    rows = {(1, "resid_mid"): torch.ones(3, lm.d_model), (1, "mlp_out"): torch.zeros(3, lm.d_model)}
    assert places.input(rows).sum() > 0 == places.target(rows).sum()
    with pytest.raises(UserError, match="names no hook, which is none of our sites"):
        steered(random_sae(lm, d_out=lm.d_model), lm)
    away = random_sae(lm, d_out=lm.d_model, hook_name_out="blocks.99.hook_mlp_out")
    with pytest.raises(UserError, match="has a place in layer 99"):
        steered(away, lm)


def test_a_crosscoder_over_layers(shared_lm: Shared) -> None:
    lm = shared_lm()
    sae = crosscoder(lm, (lm.fingerprint, lm.fingerprint))
    places = sae_places(sae, lm)
    assert [p.key for p in places.reads] == [(1, "resid_post"), (2, "resid_post")]
    assert places.reads == places.writes and places.scales == (2.0, 2.0)
    point, view = steered(sae, lm, layer=2)
    assert point.key == (2, "resid_post")
    assert torch.equal(view.W_dec, sae.W_dec[:, lm.d_model :])
    # What was cut out steers at the same place again.
    assert steered(view, lm)[0].key == point.key and torch.equal(
        steered(view, lm)[1].W_dec, view.W_dec
    )
    with pytest.raises(
        UsageError, match="writes layer 1 resid_post, layer 2 resid_post; asked: none"
    ):
        steered(sae, lm)


def test_a_crosscoder_over_models(shared_lm: Shared) -> None:
    """It is read by no hook, and steers each of its models with that model's part."""
    lm = shared_lm()
    sae = crosscoder(lm, ("another", lm.fingerprint))
    with pytest.raises(UserError, match="is a crosscoder over models .*: no hook of one of them"):
        sae_places(sae, lm)
    point, view = steered(sae, lm)
    assert point.key == (2, "resid_post")
    assert torch.equal(view.W_dec, sae.W_dec[:, lm.d_model :])
    with pytest.raises(UserError, match="was trained on a with weights a"):
        steered(crosscoder(lm, ("a", "b")), lm)
    assert steered(crosscoder(lm, ("a", "b")), lm, force=True)[0].key == (1, "resid_post")
