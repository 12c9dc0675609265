"""sparsify, both ways, against its own SparseCoder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints import formats
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import load_sae

from .conftest import D_MODEL, D_OUT, D_SAE, K, activations, difference, make


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their decoder for machines without one; an installed Triton makes them choose the other."""
    pytest.importorskip("sparsify")
    from sparsify import sparse_coder, utils

    monkeypatch.setattr(sparse_coder, "decoder_impl", utils.eager_decode)


def coder(tmp_path: Path, activation: str, transcode: bool, skip: bool, **config: Any) -> Any:
    """One of theirs, with biases and a skip connection that are not zero, saved by them."""
    sparsify = pytest.importorskip("sparsify")
    settings = {"num_latents": D_SAE, **config}
    theirs = sparsify.SparseCoder(
        D_MODEL,
        sparsify.SparseCoderConfig(
            activation=activation, k=K, transcode=transcode, skip_connection=skip, **settings
        ),
    )
    model = make("topk", skip=True)
    with torch.no_grad():
        theirs.encoder.weight.copy_(model.W_enc.T)
        theirs.encoder.bias.copy_(model.b_enc)
        theirs.W_dec.copy_(model.W_dec)
        theirs.b_dec.copy_(model.b_dec)
        if skip:
            assert model.W_skip is not None
            theirs.W_skip.copy_(model.W_skip)
    theirs.save_to_disk(tmp_path)
    return theirs


def latents(theirs: Any, x: torch.Tensor) -> torch.Tensor:
    acts, indices, _ = theirs.encode(x)
    return torch.zeros(len(x), D_SAE).scatter(1, indices, acts)


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
@pytest.mark.parametrize(("transcode", "skip"), [(False, False), (False, True), (True, True)])
def test_we_read_theirs_and_they_ours(
    tmp_path: Path, activation: str, transcode: bool, skip: bool
) -> None:
    place = tmp_path / "layers.7"
    theirs = coder(place, activation, transcode, skip)
    ours = load_sae(place)
    assert ours.format == "sparsify" and ours.spec.layer == 7 and ours.spec.site == "resid_post"
    x = activations()
    formats.write("sparsify", ours, tmp_path / "again")
    import sparsify

    again = sparsify.SparseCoder.load_from_disk(tmp_path / "again")
    with torch.no_grad():
        f = ours.encode(x)
        assert 0 < (f != 0).float().mean() < 0.9
        for coder_ in (theirs, again):
            # The same float32 products in another order.
            assert difference(f, latents(coder_, x)) < 1e-5
            assert difference(ours.reconstruct(x), coder_(x).sae_out) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"apply_b_dec_to_input": False},
        {"apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": True},
        {"apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True},
        {"d_out": D_MODEL},
    ],
)
def test_what_must_be_folded_first(tmp_path: Path, options: dict[str, Any]) -> None:
    sparsify = pytest.importorskip("sparsify")
    ours = make("topk", **options)
    formats.write("sparsify", ours, tmp_path)
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path)
    x = activations()
    with torch.no_grad():
        # One rounding of the folded weights on top of float32 products.
        assert difference(ours.encode(x), latents(theirs, x)) < 1e-5
        assert difference(ours.reconstruct(x), theirs(x).sae_out) < 1e-5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "jumprelu"}, "sparsify has topk and groupmax"),
        ({"normalize_activations": "layer_norm"}, "layer_norm"),
        ({"d_out": D_OUT}, "an output of another width"),
        ({"reshape_activations": "hook_z"}, "hook_z"),
    ],
)
def test_what_it_cannot_say(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        formats.write("sparsify", make(**options), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def written(folder: Path, **changes: Any) -> Path:
    formats.write("sparsify", make(apply_b_dec_to_input=True), folder)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_zero_latents_mean_the_expansion_factor(tmp_path: Path) -> None:
    sae = make(d_sae=36, apply_b_dec_to_input=True)
    formats.write("sparsify", sae, tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["num_latents"] == 36
    config.update(num_latents=0, expansion_factor=3, signed=False)
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert load_sae(tmp_path).spec.d_sae == 36
    config.update(expansion_factor=4)
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="num_latents 48 and the weights have 36"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_in": 13}, "d_in 13 and the weights have 12"),
        ({"activation": "relu"}, "activation 'relu'"),
        ({"k": "5"}, "k in cfg.json must be a whole number"),
        ({"k": 0}, "k must be in 1..40"),
        ({"activation": "groupmax", "k": 3}, "does not divide"),
    ],
)
def test_a_config_that_cannot_be(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_sae(written(tmp_path, **changes))


def test_names_of_folders(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "h.3.mlp" / "seed1").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"model": "gpt2"}))
    spec = load_sae(written(run / "h.3.mlp" / "seed1")).spec
    assert spec.hook_name == "h.3.mlp" and spec.layer == 3
    assert load_sae(written(run / "layers.2")).spec.model_name == "gpt2"
    with pytest.raises(UserError, match=r"its folders may \(layers.2\): give one of them"):
        load_sae(run)
