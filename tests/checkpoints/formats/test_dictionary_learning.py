"""dictionary_learning, both ways, against its own classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints import formats
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import load_sae
from saesteer.checkpoints.sparse_autoencoder import SAE

from .conftest import D_MODEL, D_SAE, K, activations, difference, make

KINDS = {
    "AutoEncoder": "standard",
    "AutoEncoderNew": "standard",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "jumprelu",
    "MatryoshkaBatchTopKSAE": "jumprelu",
}


def theirs_of(kind: str) -> Any:
    """One of their classes with weights and biases of ours."""
    pytest.importorskip("dictionary_learning")
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    homes = {
        "AutoEncoderTopK": top_k,
        "BatchTopKSAE": batch_top_k,
        "MatryoshkaBatchTopKSAE": matryoshka_batch_top_k,
    }
    maker = getattr(homes.get(kind, dictionary), kind)
    arguments: dict[str, Any] = {"k": K} if kind in homes else {}
    if kind.startswith("Matryoshka"):
        arguments["group_sizes"] = [10, 30]
    theirs = maker(D_MODEL, D_SAE, **arguments)
    ours = make(KINDS[kind])
    values = {
        "encoder.weight": ours.W_enc.T, "encoder.bias": ours.b_enc, "decoder.weight": ours.W_dec.T,
        "bias": ours.b_dec, "decoder.bias": ours.b_dec, "decoder_bias": ours.b_dec,
        "b_dec": ours.b_dec, "W_enc": ours.W_enc, "b_enc": ours.b_enc, "W_dec": ours.W_dec,
        "gate_bias": ours.b_enc, "mag_bias": ours.b_mag, "r_mag": ours.r_mag,
        "threshold": ours.threshold if kind == "JumpReluAutoEncoder" else torch.tensor(20.0),
    }  # fmt: skip
    state = theirs.state_dict()
    theirs.load_state_dict({name: values.get(name, state[name]) for name in state})
    return theirs


def saved(folder: Path, kind: str, theirs: Any, **trainer: Any) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    torch.save(theirs.state_dict(), folder / "ae.pt")
    config = {
        "trainer": {
            "dict_class": kind, "activation_dim": D_MODEL, "dict_size": D_SAE, "k": K, "layer": 8,
            "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_8", **trainer,
        },
        "buffer": {"ctx_len": 128},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def encoded(theirs: Any, x: torch.Tensor) -> torch.Tensor:
    return theirs.encode(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_we_read_theirs(tmp_path: Path, kind: str) -> None:
    theirs = theirs_of(kind)
    ours = load_sae(saved(tmp_path, kind, theirs))
    x = activations()
    with torch.no_grad():
        f = ours.encode(x)
        assert 0 < (f != 0).float().mean() < 0.9
        # The same float32 products in another order.
        assert difference(f, encoded(theirs, x)) < 1e-5
        assert difference(ours.reconstruct(x), theirs(x)) < 1e-5
    assert ours.spec.architecture == KINDS[kind] and ours.format == "dictionary_learning"
    assert ours.spec.layer == 8 and ours.spec.site == "resid_post"
    assert ours.spec.model_name == "EleutherAI/pythia-70m"
    assert ours.spec.metadata["context_size"] == 128
    if kind.startswith("Matryoshka"):
        assert ours.spec.metadata["saesteer"]["group_sizes"] == [10, 30]
    (tmp_path / "config.json").unlink()
    if kind not in ("AutoEncoderTopK", "BatchTopKSAE", "AutoEncoderNew"):
        assert torch.equal(load_sae(tmp_path / "ae.pt").encode(x), f)  # by the tensors' names


def test_two_classes_with_the_same_tensors(tmp_path: Path) -> None:
    folder = saved(tmp_path, "BatchTopKSAE", theirs_of("BatchTopKSAE"))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="fit AutoEncoderTopK and BatchTopKSAE: put the trainer"):
        load_sae(folder)


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_was_never_set(tmp_path: Path, kind: str) -> None:
    theirs = theirs_of(kind)
    theirs.threshold.fill_(-1.0)
    ours = load_sae(saved(tmp_path, kind, theirs))
    assert ours.spec.architecture == "standard" and "never set" in ours.notes[0]
    x = activations()
    with torch.no_grad():
        assert difference(ours.encode(x), theirs.encode(x, use_threshold=True)) < 1e-5


def test_a_backup_in_the_midst_of_training(tmp_path: Path) -> None:
    """Weights as saved at the end, but biases and threshold still divided by the norm factor."""
    theirs = theirs_of("BatchTopKSAE")
    folder = saved(tmp_path, "BatchTopKSAE", theirs)
    whole = load_sae(folder)
    state = dict(theirs.state_dict())
    for name in ("encoder.bias", "b_dec", "threshold"):
        state[name] = state[name] / 8.0
    torch.save({"step": 5, "ae": state, "config": {}, "norm_factor": 8.0}, folder / "ae.pt")
    ours = load_sae(folder)
    x = activations()
    assert torch.equal(ours.encode(x), whole.encode(x)) and "norm_factor" in ours.notes[0]


@pytest.mark.parametrize("input_bias", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "standard"},
        {"architecture": "gated"},
        {"architecture": "jumprelu"},
        {"architecture": "topk"},
        {"architecture": "topk", "rescale_acts_by_decoder_norm": True},
    ],
)
def test_they_read_ours(tmp_path: Path, options: dict[str, Any], input_bias: bool) -> None:
    pytest.importorskip("dictionary_learning")
    from dictionary_learning import dictionary
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    ours = make(apply_b_dec_to_input=input_bias, **options)
    formats.write("dictionary_learning", ours, tmp_path)
    named = json.loads((tmp_path / "config.json").read_text())["trainer"]["dict_class"]
    path = tmp_path / "ae.pt"
    theirs: Any
    if named == "AutoEncoderTopK":
        theirs = AutoEncoderTopK.from_pretrained(path)
    elif named == "AutoEncoder":
        theirs = dictionary.AutoEncoder.from_pretrained(path, normalize_decoder=False)
    else:
        theirs = getattr(dictionary, named).from_pretrained(path)
    x = activations()
    again = load_sae(tmp_path)
    with torch.no_grad():
        # One rounding of the folded bias on top of float32 products.
        assert difference(ours.encode(x), theirs.encode(x)) < 1e-5
        assert difference(ours.reconstruct(x), theirs(x)) < 1e-5
        assert difference(ours.encode(x), again.encode(x)) < 1e-5
    assert again.spec.layer == 3 and again.spec.site == "resid_post"


@pytest.mark.parametrize(
    "sae",
    [
        make("abstopk"),
        make("groupmax"),
        make("standard", d_out=9),
        make("topk", skip=True),
        make("standard", normalize_activations="constant_norm_rescale"),
    ],
)
def test_what_it_cannot_say(tmp_path: Path, sae: SAE) -> None:
    with pytest.raises(UserError, match="use another `format`"):
        formats.write("dictionary_learning", sae, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_unknown_class(tmp_path: Path) -> None:
    folder = saved(tmp_path, "Crosscoder", theirs_of("AutoEncoder"))
    with pytest.raises(UserError, match="dict_class 'Crosscoder'"):
        load_sae(folder)


@pytest.mark.parametrize(
    ("submodule", "place"),
    [
        ("model.layers.4.mlp", (4, "model.layers.4.mlp")),
        ("resid_post_layer_8", (8, "resid_post")),
        ("", (8, "resid_post")),
    ],
)
def test_the_submodule_is_the_true_site(
    tmp_path: Path, submodule: str, place: tuple[int, str]
) -> None:
    folder = saved(
        tmp_path, "AutoEncoder", theirs_of("AutoEncoder"), submodule_name=submodule, layer=8
    )
    spec = load_sae(folder).spec
    assert (spec.layer, spec.site) == place
