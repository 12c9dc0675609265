"""SAELens, both ways, for every architecture it loads; older files; training checkpoints."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saesteer.checkpoints import formats
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import load_sae
from saesteer.checkpoints.sparse_autoencoder import SAE

from .conftest import D_MODEL, D_OUT, K, activations, difference, make

CASES: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard"},
    "gated": {"architecture": "gated"},
    "jumprelu": {"architecture": "jumprelu"},
    "topk": {"architecture": "topk"},
    "topk, rescaled": {"architecture": "topk", "rescale_acts_by_decoder_norm": True},
    "abstopk": {"architecture": "abstopk"},
    "abstopk, rescaled": {"architecture": "abstopk", "rescale_acts_by_decoder_norm": True},
    "matching_pursuit": {"architecture": "matching_pursuit", "residual_threshold": 0.5},
    "matching_pursuit, rounds": {
        "architecture": "matching_pursuit",
        "max_iterations": 4,
        "stop_on_duplicate_support": False,
    },
    "transcoder": {"architecture": "standard", "d_out": D_OUT},
    "skip_transcoder": {"architecture": "standard", "d_out": D_OUT, "skip": True},
    "jumprelu_transcoder": {"architecture": "jumprelu", "d_out": D_OUT},
    "jumprelu_skip_transcoder": {"architecture": "jumprelu", "d_out": D_OUT, "skip": True},
}
NORMS = ("none", "layer_norm", "constant_norm_rescale")


def agree(ours: SAE, theirs: Any, x: torch.Tensor) -> None:
    """float32 products in another order; formats promise each other 1e-4."""
    with torch.no_grad():
        f, g = ours.encode(x), theirs.encode(x)
        assert 0 < (f != 0).float().mean() < 0.9
        assert difference(f, g) < 1e-4
        assert difference(ours.reconstruct(x), theirs(x)) < 1e-4


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", CASES)
def test_both_ways(tmp_path: Path, case: str, norm: str) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    options = dict(CASES[case])
    options["apply_b_dec_to_input"] = "d_out" not in options
    written = make(normalize_activations=norm, **options)
    formats.write("saelens", written, tmp_path / "ours")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    x = activations()
    agree(written, theirs, x)
    if norm == "none" and case.endswith("rescaled"):
        plain = make(**{**options, "rescale_acts_by_decoder_norm": False})
        assert not torch.equal(plain.encode(x) != 0, written.encode(x) != 0)  # it matters here
    theirs.save_model(tmp_path / "theirs")
    again = load_sae(tmp_path / "theirs")
    assert again.spec.normalize_activations == norm and again.format == "saelens"
    for name, tensor in written.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name
    agree(again, theirs, x)


@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "groupmax"},
        {"architecture": "topk", "d_out": D_OUT, "skip": True},
        {"architecture": "topk", "skip": True},
        {"architecture": "gated", "d_out": D_OUT},
    ],
)
def test_our_own_architectures(tmp_path: Path, options: dict[str, Any]) -> None:
    sae = make(**options)
    with pytest.raises(UserError, match="SAELens has no architecture.*`format` saesteer"):
        formats.write("saelens", sae, tmp_path / "a")
    formats.write("saesteer", sae, tmp_path / "b")
    again = load_sae(tmp_path / "b")
    x = activations()
    assert torch.equal(again.reconstruct(x), sae.reconstruct(x))
    assert again.spec.d_out == sae.spec.d_out and again.spec.k == sae.spec.k


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("temporal", "choose another SAE"),
        ("nonsense", "choose another SAE"),
        (None, "key 'architecture' is missing"),
        (3, "key 'architecture' must be a text, got 3"),
    ],
)
def test_architectures_we_do_not_compute(tmp_path: Path, name: Any, words: str) -> None:
    formats.write("saelens", make(), tmp_path)
    edit(tmp_path, architecture=name)
    with pytest.raises(UserError, match=words):
        load_sae(tmp_path)


def test_hook_z(tmp_path: Path) -> None:
    """SAELens flattens the heads; we take them flat."""
    sae_lens = pytest.importorskip("sae_lens")
    sae = make("standard", reshape_activations="hook_z", hook_name="blocks.3.attn.hook_z")
    formats.write("saelens", sae, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    x = activations()
    heads = x.reshape(-1, 3, D_MODEL // 3)
    with torch.no_grad():
        assert difference(sae.encode(x), theirs.encode(heads)) < 1e-4
        assert difference(sae.reconstruct(x), theirs(heads).reshape(x.shape)) < 1e-4
    assert load_sae(tmp_path).spec.reshape_activations == "hook_z"


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    config.update(changes)
    (folder / "cfg.json").write_text(json.dumps(config))


class TestOlderFiles:
    OLD = {
        "d_in": D_MODEL,
        "d_sae": 40,
        "dtype": "torch.float32",
        "device": "cpu",
        "model_name": "gpt2-small",
        "hook_point": "blocks.5.hook_resid_pre",
        "context_size": 128,
        "lr": 0.1,
        "metadata": {"model_name": "dropped"},
    }

    def folder(self, tmp_path: Path, sae: SAE, **config: Any) -> Path:
        formats.write("saelens", sae, tmp_path)
        (tmp_path / "cfg.json").write_text(json.dumps({**self.OLD, **config}))
        return tmp_path

    @pytest.mark.parametrize(
        ("architecture", "config"),
        [
            ("standard", {}),
            ("standard", {"architecture": "standard", "normalize_activations": True}),
            ("gated", {"architecture": "gated", "apply_b_dec_to_input": False}),
            ("jumprelu", {"architecture": "jumprelu", "normalize_activations": None}),
            ("topk", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}),
            ("topk", {"architecture": "topk", "activation_fn_kwargs": {"k": K}}),
            ("standard", {"normalize_activations": "layer_norm", "sae_lens_version": "5.1.0"}),
        ],
    )
    def test_as_saelens_reads_them(
        self, tmp_path: Path, architecture: str, config: dict[str, Any]
    ) -> None:
        sae_lens = pytest.importorskip("sae_lens")
        self.folder(tmp_path, make(architecture), **config)
        ours, theirs = load_sae(tmp_path), sae_lens.SAE.load_from_disk(tmp_path)
        agree(ours, theirs, activations())
        assert ours.spec.architecture == architecture
        assert ours.spec.model_name == "gpt2-small" == theirs.cfg.metadata.model_name
        assert ours.spec.layer == 5 and ours.spec.site == "resid_pre"
        assert ours.spec.metadata["context_size"] == 128 and "older rules" in ours.notes[0]

    def test_a_scaling_factor(self, tmp_path: Path) -> None:
        self.folder(tmp_path, make("standard"))
        path = tmp_path / "sae_weights.safetensors"
        tensors = load_file(path)
        save_file({**tensors, "scaling_factor": torch.ones(40)}, path)
        assert load_sae(tmp_path).spec.d_sae == 40
        save_file({**tensors, "scaling_factor": torch.full((40,), 2.0)}, path)
        with pytest.raises(UserError, match="scaling_factor"):
            load_sae(tmp_path)

    def test_a_logarithm_of_the_threshold(self, tmp_path: Path) -> None:
        sae = make("jumprelu")
        assert sae.threshold is not None
        self.folder(tmp_path, sae, architecture="jumprelu")
        path = tmp_path / "sae_weights.safetensors"
        tensors = load_file(path)
        tensors["log_threshold"] = tensors.pop("threshold").log()
        save_file(tensors, path)
        found = load_sae(tmp_path).threshold
        assert found is not None
        assert torch.allclose(found, sae.threshold, rtol=1e-5)  # exp and log in float32

    @pytest.mark.parametrize("activation", ["tanh-relu", 3])
    def test_another_activation(self, tmp_path: Path, activation: Any) -> None:
        self.folder(tmp_path, make("standard"), activation_fn=activation)
        with pytest.raises(UserError, match="activation_fn"):
            load_sae(tmp_path)


class TestCheckpoints:
    """Against what SAELens' own training class saves at the end of training."""

    def trained(self, kind: str, norm: str, rescale: bool) -> Any:
        sae_lens = pytest.importorskip("sae_lens")
        from sae_lens.saes.sae import TrainingSAE

        options: dict[str, Any] = {"architecture": kind, "d_in": D_MODEL, "d_sae": 40}
        options |= {"dtype": "float32", "device": "cpu", "normalize_activations": norm}
        options |= {"apply_b_dec_to_input": True}
        if "topk" in kind:
            options |= {"k": K, "rescale_acts_by_decoder_norm": rescale}
        if kind == "matryoshka_batchtopk":
            options["matryoshka_widths"] = [10, 40]
        assert sae_lens
        theirs = TrainingSAE.from_dict(options)
        model = make("gated")
        with torch.no_grad():
            for name in ("W_enc", "W_dec", "b_dec", "b_mag", "r_mag"):
                if hasattr(theirs, name):
                    # Scaled activations are about 1 in size.
                    scale = 1.0 if name in ("W_enc", "W_dec", "r_mag") else 1 / 30
                    getattr(theirs, name).copy_(getattr(model, name) * scale)
            bias = theirs.b_gate if kind == "gated" else theirs.b_enc
            bias.copy_(model.b_enc / 30)
            if hasattr(theirs, "topk_threshold"):
                theirs.topk_threshold.fill_(2.5)
            if hasattr(theirs, "log_threshold"):
                theirs.log_threshold.copy_(torch.linspace(-1, 1, 40))
        return theirs

    @pytest.mark.parametrize("scale", [None, 0.037])
    @pytest.mark.parametrize(
        ("kind", "rescale"),
        [
            ("standard", False),
            ("gated", False),
            ("jumprelu", False),
            ("topk", False),
            ("topk", True),
            ("batchtopk", False),
            ("batchtopk", True),
            ("matryoshka_batchtopk", True),
        ],
    )
    def test_scaled(self, tmp_path: Path, kind: str, rescale: bool, scale: float | None) -> None:
        import sae_lens

        norm = "none" if scale is None else "expected_average_only_in"
        theirs = self.trained(kind, norm, rescale)
        theirs.save_model(tmp_path / "checkpoint")
        scaler = {"scaling_factor": scale, "has_whitening": False}
        (tmp_path / "checkpoint" / "activation_scaler.json").write_text(json.dumps(scaler))
        (tmp_path / "checkpoint" / "trainer_state.pt").write_bytes(b"a pickle that nobody opens")
        if scale is not None:
            theirs.fold_activation_norm_scaling_factor(scale)
        theirs.save_inference_model(tmp_path / "final")
        ours = load_sae(tmp_path / "checkpoint")
        final = sae_lens.SAE.load_from_disk(tmp_path / "final")
        assert ours.format == "saelens-checkpoint"
        assert ours.spec.architecture == final.cfg.architecture()
        agree(ours, final, activations() * (1 if scale else 0.05))
        agree(load_sae(tmp_path / "final"), final, activations() * (1 if scale else 0.05))

    def test_whitened(self, tmp_path: Path) -> None:
        sae_lens = pytest.importorskip("sae_lens")
        theirs = self.trained("standard", "covariance_whitening", False)
        theirs.cfg.apply_b_dec_to_input = False
        theirs.save_model(tmp_path / "checkpoint")
        generator = torch.Generator().manual_seed(1)
        matrix = torch.randn(D_MODEL, D_MODEL, generator=generator) / 30
        whitening = {
            "mean": torch.full((D_MODEL,), 15.0),
            "matrix": matrix,
            "inverse_matrix": torch.linalg.inv(matrix).contiguous(),
        }
        place = tmp_path / "checkpoint"
        save_file(whitening, place / "activation_whitening.safetensors")
        (place / "activation_scaler.json").write_text('{"scaling_factor": null}')
        theirs.fold_activation_whitening(*whitening.values())
        theirs.save_inference_model(tmp_path / "final")
        ours = load_sae(place)
        # Theirs is folded in float32, with a matrix whose condition is about 100.
        x, final = activations(), sae_lens.SAE.load_from_disk(tmp_path / "final")
        with torch.no_grad():
            assert difference(ours.encode(x), final.encode(x)) < 1e-3
            assert difference(ours.reconstruct(x), final(x)) < 1e-3

    def test_a_threshold_without_its_architecture(self, tmp_path: Path) -> None:
        formats.write("saelens", make(), tmp_path)
        path = tmp_path / "sae_weights.safetensors"
        save_file({**load_file(path), "topk_threshold": torch.tensor(1.0)}, path)
        with pytest.raises(UserError, match="do not belong together"):
            load_sae(tmp_path)


def test_notes_and_dtype_survive(tmp_path: Path) -> None:
    sae = make("jumprelu").to(dtype="bfloat16")
    formats.write("saelens", dataclasses.replace(sae, notes=("one",)), tmp_path)
    again = load_sae(tmp_path)
    assert again.spec.dtype == "bfloat16" and torch.equal(again.W_dec, sae.W_dec)
