"""SAE folders: the equation, the round trip, and agreement with SAELens."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from saesteer.checkpoints import files, model_files
from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import (
    SAE,
    SAESpec,
    load_sae,
    save_sae,
)
from saesteer.checkpoints.sae_spec import hook_name_for, parse_hook_name

D_MODEL, D_SAE, K = 12, 40, 5
ARCHITECTURES = ("topk", "standard", "jumprelu")


def spec_for(architecture: str = "topk", **changes: Any) -> SAESpec:
    options: dict[str, Any] = {
        "architecture": architecture,
        "d_model": D_MODEL,
        "d_sae": D_SAE,
        "k": K if architecture == "topk" else None,
        "hook_name": "blocks.3.hook_resid_post",
        "hf_hook_name": "model.layers.3",
        "model_name": "tiny",
        "metadata": {"context_size": 64, "prepend_bos": False, "saesteer": {"seed": 1}},
    }
    return SAESpec(**{**options, **changes})


def weights_for(spec: SAESpec, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights at the scale of raw activations: biases far from zero, rows of different length."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weights = {
        "W_enc": noise(spec.d_model, spec.d_sae),
        "b_enc": 30 * noise(spec.d_sae),
        "W_dec": noise(spec.d_sae, spec.d_model) * (0.5 + noise(spec.d_sae, 1).abs()),
        "b_dec": 20 * noise(spec.d_model),
    }
    if spec.architecture == "jumprelu":
        weights["threshold"] = 20 * noise(spec.d_sae).abs()
    return weights


def raw_activations(rows: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return 30 * torch.randn(rows, D_MODEL, generator=generator) + 15


def saved(folder: Path, architecture: str = "topk", **changes: Any) -> Path:
    spec = spec_for(architecture, **changes)
    save_sae(folder, spec, **weights_for(spec))
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    config.update(changes)
    (folder / "cfg.json").write_text(json.dumps(config))


def refused(path: Path | str) -> str:
    with pytest.raises(UserError) as error:
        load_sae(path)
    text = str(error.value)
    assert "\n" not in text and text.startswith(f"`sae` {path}")
    return text


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("input_bias", [False, True])
def test_saelens_agrees(tmp_path: Path, architecture: str, input_bias: bool) -> None:
    """SAELens opens what we write and computes the same on raw-scale activations."""
    sae_lens = pytest.importorskip("sae_lens")
    saved(tmp_path, architecture, apply_b_dec_to_input=input_bias)
    ours, theirs = load_sae(tmp_path), sae_lens.SAE.load_from_disk(tmp_path)
    x = raw_activations()
    with torch.no_grad():
        f = ours.encode(x)
        assert 0 < (f > 0).float().mean() < 0.9
        # Both run the same float32 products, so only their order may differ; formats.md asks 1e-4.
        limit = 1e-4 * f.abs().max()
        assert (theirs.encode(x) - f).abs().max() < limit
        assert (theirs.decode(f) - ours.decode(f)).abs().max() < limit
        assert (theirs(x) - ours.decode(f)).abs().max() < limit
    assert theirs.cfg.architecture() == architecture
    metadata = theirs.cfg.metadata
    assert metadata.hook_name == "blocks.3.hook_resid_post" and metadata.model_name == "tiny"
    assert metadata.hf_hook_name == "model.layers.3" and metadata.context_size == 64
    assert metadata.saesteer == {"seed": 1} and metadata.prepend_bos is False


def test_saelens_agrees_with_norm_gating(tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    saved(tmp_path, rescale_acts_by_decoder_norm=True)
    ours, theirs = load_sae(tmp_path), sae_lens.SAE.load_from_disk(tmp_path)
    x = raw_activations()
    with torch.no_grad():
        f = ours.encode(x)
        assert (theirs.encode(x) - f).abs().max() < 1e-4 * f.max()
        assert (theirs.decode(f) - ours.decode(f)).abs().max() < 1e-4 * f.max()
        plain = load_sae(saved(tmp_path / "plain"))
        assert not torch.equal(plain.encode(x) > 0, f > 0)  # the gating matters here


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_we_read_what_saelens_writes(tmp_path: Path, architecture: str) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    theirs = sae_lens.SAE.load_from_disk(saved(tmp_path / "ours", architecture))
    theirs.save_model(tmp_path / "theirs")
    ours = load_sae(tmp_path / "theirs")
    x = raw_activations(16)
    assert torch.equal(ours.encode(x), load_sae(tmp_path / "ours").encode(x))
    assert ours.spec.layer == 3 and ours.spec.metadata["saesteer"] == {"seed": 1}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_round_trip(tmp_path: Path, architecture: str, dtype: str) -> None:
    spec = spec_for(architecture, dtype=dtype, apply_b_dec_to_input=True)
    weights = weights_for(spec)
    sha256 = save_sae(tmp_path, spec, **weights)
    sae = load_sae(tmp_path)
    assert sae.sha256 == sha256 == files.sha256_file(tmp_path / "sae_weights.safetensors")
    assert sae.source == str(tmp_path)
    for name, tensor in sae.tensors().items():
        assert torch.equal(tensor, weights[name].to(getattr(torch, dtype))), name
    assert sae.spec.metadata.pop("sae_lens_version") >= "6.0.0"
    assert sae.spec.metadata.pop("hook_head_index") is None
    assert sae.spec == spec
    again = save_sae(tmp_path / "again", sae.spec, **sae.tensors())
    assert again == sha256
    assert load_sae(tmp_path / "again").spec == load_sae(tmp_path).spec


def test_config_is_explicit(tmp_path: Path) -> None:
    config = json.loads((saved(tmp_path) / "cfg.json").read_text())
    metadata = config.pop("metadata")
    assert config == {
        "architecture": "topk",
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "k": K,
        "rescale_acts_by_decoder_norm": False,
    }
    assert int(metadata["sae_lens_version"].split(".")[0]) >= 6
    assert set(load_file(tmp_path / "sae_weights.safetensors")) == {
        "W_enc", "b_enc", "W_dec", "b_dec"
    }  # fmt: skip


def test_saving_names_the_folder_when_values_are_not_finite(tmp_path: Path) -> None:
    weights = weights_for(spec_for())
    weights["b_enc"][3] = torch.nan
    with pytest.raises(UserError, match="b_enc holds NaN or infinity"):
        save_sae(tmp_path / "a", spec_for(), **weights)
    assert not (tmp_path / "a").exists()
    # float16 cannot hold this value: it would be written as infinity.
    weights["b_enc"][3] = 1e6
    with pytest.raises(UserError, match="b_enc holds NaN or infinity"):
        save_sae(tmp_path / "a", spec_for(dtype="float16"), **weights)


def test_tied_weights_can_be_saved(tmp_path: Path) -> None:
    spec = spec_for()
    weights = weights_for(spec)
    weights["W_enc"] = weights["W_dec"].T
    save_sae(tmp_path, spec, **weights)
    assert torch.equal(load_sae(tmp_path).W_enc, weights["W_dec"].T)


class TestEquation:
    """Against a loop over tokens and latents written from the formula."""

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize("input_bias", [False, True])
    def test_encode_and_decode(self, architecture: str, input_bias: bool) -> None:
        spec = spec_for(architecture, apply_b_dec_to_input=input_bias)
        sae = SAE(spec=spec, **weights_for(spec)).to(dtype=torch.float64)
        x = raw_activations(8).double()
        acts = sae.encode(x)
        for row, found in zip(x, acts, strict=True):
            shifted = row - sae.b_dec if input_bias else row
            q = [float(shifted @ sae.W_enc[:, i] + sae.b_enc[i]) for i in range(D_SAE)]
            expected = [max(value, 0.0) for value in q]
            if architecture == "topk":
                kept = sorted(range(D_SAE), key=lambda i: (-q[i], i))[:K]
                expected = [expected[i] if i in kept else 0.0 for i in range(D_SAE)]
            if architecture == "jumprelu":
                assert sae.threshold is not None
                cut = sae.threshold.tolist()
                expected = [e if v > c else 0.0 for e, v, c in zip(expected, q, cut, strict=True)]
            # float64 sums of 12 products
            assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-9)
            recon = sum(value * sae.W_dec[i] for i, value in enumerate(expected)) + sae.b_dec
            assert sae.decode(found).tolist() == pytest.approx(recon.tolist(), rel=1e-12, abs=1e-9)

    def test_any_leading_axes(self) -> None:
        spec = spec_for()
        sae = SAE(spec=spec, **weights_for(spec))
        x = raw_activations(12)
        folded = sae.encode(x.reshape(3, 4, D_MODEL))
        assert torch.allclose(folded.reshape(12, D_SAE), sae.encode(x), atol=1e-3)
        assert sae.encode(x[0]).shape == (D_SAE,)
        assert sae.decode(folded).shape == (3, 4, D_MODEL)

    def test_threshold_is_strict(self) -> None:
        spec = spec_for("jumprelu", d_model=1, d_sae=3)
        one = torch.ones(1, 3)
        sae = SAE(spec, one, torch.zeros(3), one.T, torch.zeros(1), torch.tensor([1.0, 2.0, 3.0]))
        assert sae.encode(torch.tensor([[2.0]])).tolist() == [[2.0, 0.0, 0.0]]

    @settings(deadline=None)
    @given(
        rows=st.lists(
            st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]), min_size=6, max_size=6),
            min_size=1,
            max_size=4,
        ),
        k=st.integers(1, 6),
    )
    def test_ties_go_to_the_lowest_index(self, rows: list[list[float]], k: int) -> None:
        spec = spec_for(d_model=6, d_sae=6, k=k)
        sae = SAE(spec, torch.eye(6), torch.zeros(6), torch.eye(6), torch.zeros(6))
        found = sae.encode(torch.tensor(rows))
        for row, kept in zip(rows, found.tolist(), strict=True):
            best = sorted(range(6), key=lambda i: (-row[i], i))[:k]
            assert kept == [max(row[i], 0.0) if i in best else 0.0 for i in range(6)]

    def test_nan_is_never_chosen(self) -> None:
        spec = spec_for(d_model=3, d_sae=3, k=2)
        sae = SAE(spec, torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3))
        bias = torch.tensor([torch.nan, 0.0, 0.0])
        found = SAE(spec, sae.W_enc, bias, sae.W_dec, sae.b_dec).encode(
            torch.tensor([1.0, 2.0, 3.0])
        )
        assert found.tolist() == [0.0, 2.0, 3.0]

    def test_half_precision_input(self) -> None:
        spec = spec_for()
        sae = SAE(spec=spec, **weights_for(spec))
        assert sae.encode(raw_activations(2).bfloat16()).dtype == torch.float32
        half = sae.to(dtype="bfloat16")
        assert half.spec.dtype == "bfloat16" and half.W_dec.dtype == torch.bfloat16
        assert half.encode(raw_activations(2)).dtype == torch.bfloat16
        assert sae.W_dec.dtype == torch.float32

    def test_centered_models(self) -> None:
        kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
        centered, plain = spec_for(metadata=kwargs), spec_for()
        x = raw_activations(4)
        moved = x - x.mean(dim=-1, keepdim=True)
        weights = weights_for(plain)
        assert torch.equal(SAE(centered, **weights).encode(x), SAE(plain, **weights).encode(moved))
        assert not torch.equal(SAE(plain, **weights).encode(x), SAE(plain, **weights).encode(moved))


class TestSpec:
    @pytest.mark.parametrize(
        ("hook_name", "place"),
        [
            ("blocks.12.hook_resid_post", (12, "resid_post")),
            ("blocks.0.hook_mlp_out", (0, "mlp_out")),
            ("blocks.7.attn.hook_z", (7, None)),
            ("model.layers.12", (12, "resid_post")),
            ("transformer.h.3", (3, "resid_post")),
            ("model.layers.3.mlp", (3, "model.layers.3.mlp")),
            ("custom", (None, "custom")),
            ("", (None, None)),
            (None, (None, None)),
        ],
    )
    def test_hook_names(self, hook_name: str | None, place: tuple[int | None, str | None]) -> None:
        assert parse_hook_name(hook_name) == place

    @pytest.mark.parametrize(
        "site", ["resid_post", "resid_pre", "resid_mid", "attn_out", "mlp_out"]
    )
    def test_hook_name_round_trip(self, site: str) -> None:
        assert parse_hook_name(hook_name_for(4, site)) == (4, site)
        assert hook_name_for(4, "model.layers.4.mlp") == "model.layers.4.mlp"

    def test_the_module_path_fills_in(self) -> None:
        assert spec_for(hook_name="").layer == 3
        assert spec_for(hook_name="", hf_hook_name="").layer is None

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"k": 0}, "k must be in 1..40"),
            ({"k": None}, "k must be in 1..40"),
            ({"k": 41}, "k must be in 1..40"),
            ({"d_model": 0}, "must be positive"),
            ({"dtype": "int8"}, "dtype must be one of float32"),
            ({"normalize_activations": "batch"}, "normalize_activations must be one of"),
            ({"reshape_activations": "heads"}, "reshape_activations must be one of"),
            ({"d_out": 0}, "d_out must be positive"),
            ({"d_out": 3, "apply_b_dec_to_input": True}, "b_dec is for its output"),
            ({"architecture": "groupmax", "k": 3}, "does not divide"),
        ],
    )
    def test_values_that_cannot_be(self, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(UsageError, match=words):
            spec_for(**changes)

    def test_rescaling_is_for_topk(self) -> None:
        with pytest.raises(UsageError, match="topk only"):
            spec_for("standard", rescale_acts_by_decoder_norm=True)


class TestRefusals:
    def test_nothing_there(self, tmp_path: Path) -> None:
        assert "does not exist" in refused(tmp_path / "none")
        (tmp_path / "file").touch()
        assert "is a file" in refused(tmp_path / "file")

    @pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
    def test_a_missing_file(self, tmp_path: Path, name: str) -> None:
        (saved(tmp_path) / name).unlink()
        assert f"holds no {name}" in refused(tmp_path)

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        assert "holds no cfg.json and no sae_weights.safetensors" in refused(tmp_path)

    @pytest.mark.parametrize("keep", [3, 100, -1])
    def test_truncated_weights(self, tmp_path: Path, keep: int) -> None:
        path = saved(tmp_path) / "sae_weights.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        assert "sae_weights.safetensors is damaged or cut short" in refused(tmp_path)

    @pytest.mark.parametrize("content", ["[]", "{"])
    def test_broken_config(self, tmp_path: Path, content: str) -> None:
        (saved(tmp_path) / "cfg.json").write_text(content)
        with pytest.raises(UserError, match="cfg.json is not"):
            load_sae(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"architecture": "temporal"}, "has architecture 'temporal', which holds attention"),
            ({"architecture": None}, "cfg.json: key 'architecture' is missing"),
            ({"normalize_activations": "batch"}, "normalize_activations must be one of"),
            ({"reshape_activations": "heads"}, "reshape_activations must be one of"),
            ({"architecture": "gated"}, "needs the tensors W_enc, b_enc, W_dec, b_dec, b_mag"),
            ({"d_sae": D_SAE + 1}, "W_enc has shape [12, 40]"),
            ({"d_in": "many"}, "cfg.json: key 'd_in' must be a whole number, got 'many'"),
            ({"k": D_SAE + 1}, "k must be in 1..40"),
            ({"k": None}, "k must be in 1..40"),
            ({"dtype": "int8"}, "dtype must be one of"),
        ],
    )
    def test_a_config_we_cannot_use(
        self, tmp_path: Path, changes: dict[str, Any], words: str
    ) -> None:
        edit_config(saved(tmp_path), **changes)
        assert words in refused(tmp_path)

    @pytest.mark.parametrize("key", ["d_in", "dtype"])
    def test_a_missing_key(self, tmp_path: Path, key: str) -> None:
        config = json.loads((saved(tmp_path) / "cfg.json").read_text())
        del config[key]
        (tmp_path / "cfg.json").write_text(json.dumps(config))
        assert f"cfg.json: key {key!r} is missing" in refused(tmp_path)

    def test_tensors_that_do_not_belong(self, tmp_path: Path) -> None:
        path = saved(tmp_path) / "sae_weights.safetensors"
        tensors = load_file(path)
        save_file({**tensors, "topk_threshold": torch.zeros(1)}, path)
        assert "topk_threshold; the config and the weights do not" in refused(tmp_path)
        save_file({**tensors, "W_more": torch.zeros(1)}, path)
        assert "unexpected: W_more" in refused(tmp_path)
        del tensors["b_enc"]
        save_file(tensors, path)
        assert "missing: b_enc" in refused(tmp_path)

    def test_values_that_are_not_finite(self, tmp_path: Path) -> None:
        path = saved(tmp_path) / "sae_weights.safetensors"
        tensors = load_file(path)
        tensors["W_dec"][0, 0] = torch.inf
        save_file(tensors, path)
        assert "W_dec holds NaN or infinity" in refused(tmp_path)

    def test_a_wrong_dtype_flag(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="`dtype` must be one of"):
            load_sae(saved(tmp_path), dtype="int8")


def test_old_defaults_on_reading(tmp_path: Path) -> None:
    """Absent keys mean what SAELens makes of them: input bias on, norm gating off."""
    config = json.loads((saved(tmp_path) / "cfg.json").read_text())
    for key in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "normalize_activations"):
        del config[key]
    config["dtype"] = "torch.float32"
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    spec = load_sae(tmp_path).spec
    assert spec.apply_b_dec_to_input and not spec.rescale_acts_by_decoder_norm
    assert spec.normalize_activations == "none" and spec.dtype == "float32"


def test_the_file_may_be_replaced_after_loading(tmp_path: Path) -> None:
    sae = load_sae(saved(tmp_path))
    before = sae.W_dec.clone()
    path = tmp_path / "sae_weights.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)  # in place, as a careless copy would
    assert torch.equal(sae.W_dec, before)


class TestReleases:
    """`RELEASE:ID`, with SAELens' loader replaced: what we make of what it returns."""

    def fake(self, monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
        module = ModuleType("sae_lens")
        module.SAE = SimpleNamespace(from_pretrained=load)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "sae_lens", module)

    def test_a_release_becomes_our_sae(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sae_lens = pytest.importorskip("sae_lens")
        asked: list[Any] = []

        def load(release: str, sae_id: str, device: str) -> Any:
            asked.append((release, sae_id, device))
            return sae_lens.SAE.load_from_disk(saved(tmp_path / "sae", "jumprelu"))

        local = load_sae(saved(tmp_path / "sae", "jumprelu"))
        self.fake(monkeypatch, load)
        sae = load_sae("gemma-scope:layer_3/width_16k:a", dtype=torch.float64)
        assert asked == [("gemma-scope", "layer_3/width_16k:a", "cpu")]
        assert sae.source == "gemma-scope:layer_3/width_16k:a" and len(sae.sha256) == 64
        assert sae.spec.layer == 3 and sae.spec.metadata["saesteer"] == {"seed": 1}
        x = raw_activations(4)
        assert torch.equal(sae.encode(x), local.to(dtype=torch.float64).encode(x))
        assert load_sae("gemma-scope:x").sha256 == sae.sha256  # whatever the dtype asked for

    def test_an_unknown_release(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(*_: Any, **__: Any) -> Any:
            raise ValueError("Release nope not found in pretrained SAEs directory.\nAnd more")

        self.fake(monkeypatch, load)
        monkeypatch.setattr(model_files, "hub_reachable", lambda timeout=3.0: True)
        text = refused("nope:a")
        assert "lists no release nope" in text and "give a folder" in text

    def test_no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(*_: Any, **__: Any) -> Any:
            from huggingface_hub import hf_hub_download

            return hf_hub_download("nobody/nothing-of-this-name", "cfg.json")

        self.fake(monkeypatch, load)
        monkeypatch.setattr(model_files, "hub_reachable", lambda timeout=3.0: False)
        text = refused("nobody/nothing-of-this-name:a")
        assert "the Hub cannot be reached: connect to the network" in text

    def test_an_architecture_we_do_not_compute(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Config:
            def to_dict(self) -> dict[str, Any]:
                return {"architecture": "temporal", "d_in": 2, "d_sae": 2, "dtype": "float32"}

        self.fake(monkeypatch, lambda *_, **__: SimpleNamespace(cfg=Config()))
        assert "has architecture 'temporal'" in refused("release:a")
