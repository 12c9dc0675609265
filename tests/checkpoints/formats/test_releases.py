"""Files of published releases: read from a folder, and through sae_lens with a Hub of local files.

sae_lens' own loaders are the other side: what `RELEASE:ID` gives and what a local copy gives must
be one SAE.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import load_sae
from saesteer.checkpoints.sparse_autoencoder import SAE

from .conftest import D_MODEL, D_OUT, D_SAE, K, activations, difference, make


def through_saelens(
    monkeypatch: pytest.MonkeyPatch, root: Path, loader: str, repo: str, folder: str, **changes: Any
) -> Any:
    """The SAE that one of sae_lens' Hub loaders makes of the files under `root`."""
    pytest.importorskip("sae_lens")
    from huggingface_hub.utils import EntryNotFoundError
    from sae_lens import SAE as TheirSAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def download(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        path = root / subfolder / filename
        if not path.exists():
            raise EntryNotFoundError(filename)
        return str(path)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        from saesteer.checkpoints.safe_reading import safetensors_header

        return {k: list(v.shape) for k, v in safetensors_header(root / filename).items()}

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    config, state, _ = getattr(loaders, loader)(
        repo, folder, device="cpu", force_download=False, cfg_overrides=changes or None
    )
    config = loaders.handle_config_defaulting(config)
    theirs = TheirSAE.get_sae_class_for_architecture(config["architecture"]).from_dict(config)
    theirs.process_state_dict_for_loading(state)
    theirs.load_state_dict(state)
    if config.get("normalize_activations") == "expected_average_only_in":
        average = json.loads(next(root.rglob("*.json")).read_text())
        norm = average["dataset_average_activation_norm"]["in"]
        theirs.fold_activation_norm_scaling_factor(D_MODEL**0.5 / norm)
    return theirs


def agree(ours: SAE, theirs: Any, tolerance: float = 1e-5) -> None:
    x = activations()
    with torch.no_grad():
        f = ours.encode(x)
        assert 0 < (f != 0).float().mean() < 0.9
        assert difference(f, theirs.encode(x)) < tolerance
        assert difference(ours.reconstruct(x), theirs(x)) < tolerance


def arrays(sae: SAE) -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.numpy() for name, tensor in sae.tensors().items()}


class TestTranscoderLayers:
    @pytest.mark.parametrize("config", ["wandb-config.yaml", "wanb-config.yaml"])
    def test_as_sae_lens_reads_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
    ) -> None:
        sae = make("standard", d_out=D_MODEL)
        for layer in (3, 4):
            turned = {**sae.tensors(), "W_enc": sae.W_enc.T.contiguous()}
            save_file(turned, tmp_path / f"layer_{layer}.safetensors")
        values = {"d_model": D_MODEL, "d_feature": D_SAE, "batch_size": 16}
        lines = [f"{key}:\n  value: {value}\n" for key, value in values.items()]
        (tmp_path / config).write_text("".join(lines))
        (tmp_path / "config.yaml").write_text("model_name: some/model\n")
        theirs = through_saelens(
            monkeypatch, tmp_path, "mwhanna_transcoder_huggingface_loader", "r",
            "layer_3.safetensors",
        )  # fmt: skip
        ours = load_sae(tmp_path / "layer_3.safetensors")
        agree(ours, theirs)
        assert ours.format == "transcoder-layers" and ours.spec.d_out == D_MODEL
        assert ours.spec.hook_name == theirs.cfg.metadata.hook_name == "blocks.3.mlp.hook_in"
        assert ours.spec.metadata["hook_name_out"] == theirs.cfg.metadata.hook_name_out
        assert ours.spec.model_name == "some/model"
        with pytest.raises(UserError, match="several SAEs"):
            load_sae(tmp_path)
        for bad in ("x: [", "a: &a [*a]"):
            (tmp_path / "config.yaml").write_text(bad)
            with pytest.raises(UserError, match="cannot be read"):
                load_sae(tmp_path / "layer_3.safetensors")


class TestGemmaScope:
    REPO = "google/gemma-scope-2b-pt-res"
    FOLDER = "layer_20/width_16k/average_l0_71"

    def folder(self, root: Path, folder: str, repository: str = "gemma-scope-2b-pt-res") -> Path:
        place = root / repository / folder
        place.mkdir(parents=True)
        return place

    @pytest.mark.parametrize("lower", [False, True])
    def test_residual(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lower: bool) -> None:
        place = self.folder(tmp_path, self.FOLDER)
        names = {
            k.replace("W_", "w_") if lower else k: v for k, v in arrays(make("jumprelu")).items()
        }
        np.savez(place / "params.npz", **names)
        ours = load_sae(place)
        theirs = through_saelens(
            monkeypatch, tmp_path / "gemma-scope-2b-pt-res", "gemma_2_sae_huggingface_loader",
            self.REPO, self.FOLDER, d_in=D_MODEL, d_sae=D_SAE,
        )  # fmt: skip
        agree(ours, theirs)
        assert ours.spec.hook_name == "blocks.20.hook_resid_post" == theirs.cfg.metadata.hook_name
        assert ours.spec.model_name == "google/gemma-2-2b" and ours.format == "gemma-scope"
        assert ours.spec.metadata["saesteer"]["published_l0"] == 71
        assert torch.equal(load_sae(place / "params.npz").W_dec, ours.W_dec)

    def test_embedding(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = "embedding/width_4k/average_l0_21"
        place = self.folder(tmp_path, folder)
        np.savez_compressed(place / "params.npz", **arrays(make("jumprelu")))
        theirs = through_saelens(
            monkeypatch, tmp_path / "gemma-scope-2b-pt-res", "gemma_2_sae_huggingface_loader",
            self.REPO, folder, d_in=D_MODEL, d_sae=D_SAE,
        )  # fmt: skip
        ours = load_sae(place)
        agree(ours, theirs)
        assert "sqrt(d_model)" in ours.notes[0] and ours.spec.site is None

    def test_attention_and_mlp(self, tmp_path: Path) -> None:
        for repository, hook, reshape in (
            ("gemma-scope-9b-pt-att", "blocks.3.attn.hook_z", "hook_z"),
            ("gemma-scope-9b-it-mlp", "blocks.3.hook_mlp_out", "none"),
        ):
            place = self.folder(tmp_path, "layer_3/width_16k/average_l0_5", repository)
            np.savez(place / "params.npz", **arrays(make("jumprelu")))
            spec = load_sae(place).spec
            assert (spec.hook_name, spec.reshape_activations) == (hook, reshape)
        assert spec.model_name == "google/gemma-2-9b-it"

    def test_transcoder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = "layer_4/width_16k/average_l0_9"
        place = self.folder(tmp_path, folder, "gemma-scope-2b-pt-transcoders")
        short = {"W_enc": "w_e", "W_dec": "w_d", "b_enc": "b_e", "b_dec": "b_d"}
        sae = make("jumprelu", d_out=D_OUT)
        np.savez(place / "params.npz", **{short.get(k, k): v for k, v in arrays(sae).items()})
        theirs = through_saelens(
            monkeypatch, tmp_path / "gemma-scope-2b-pt-transcoders",
            "gemma_2_transcoder_huggingface_loader", "google/gemma-scope-2b-pt-transcoders",
            folder, d_in=D_MODEL, d_sae=D_SAE, d_out=D_OUT,
        )  # fmt: skip
        ours = load_sae(place)
        agree(ours, theirs)
        assert ours.spec.d_out == D_OUT
        assert ours.spec.metadata["hook_name_out"] == "blocks.4.hook_mlp_out"

    @pytest.mark.parametrize("transcoder", [False, True])
    def test_second(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transcoder: bool
    ) -> None:
        kind = "transcoder" if transcoder else "resid_post"
        folder = f"{kind}/layer_12_width_16k_l0_medium" + ("_affine" if transcoder else "")
        place = self.folder(tmp_path, folder, "gemma-scope-2-1b-pt")
        sae = make("jumprelu", d_out=D_OUT if transcoder else None, skip=transcoder)
        tensors = {k.replace("W_", "w_"): v for k, v in sae.tensors().items()}
        config = {
            "architecture": "jump_relu", "model_name": "gemma-v3-1b-pt",
            "hf_hook_point_in": "model.layers.12.output", "affine_connection": transcoder,
        }  # fmt: skip
        if transcoder:
            tensors["affine_skip_connection"] = tensors.pop("w_skip").T.contiguous()
            config["hf_hook_point_in"] = "model.layers.12.pre_feedforward_layernorm.output"
        save_file(tensors, place / "params.safetensors")
        (place / "config.json").write_text(json.dumps(config))
        theirs = through_saelens(
            monkeypatch, tmp_path / "gemma-scope-2-1b-pt", "gemma_3_sae_huggingface_loader",
            "google/gemma-scope-2-1b-pt", folder,
        )  # fmt: skip
        ours = load_sae(place)
        agree(ours, theirs)
        assert ours.spec.hook_name == theirs.cfg.metadata.hook_name
        assert ours.spec.layer == 12 and ours.spec.model_name == "google/gemma-3-1b-pt"
        (place / "config.json").unlink()
        assert torch.equal(load_sae(place).W_enc, ours.W_enc)

    def test_a_cross_layer_transcoder(self, tmp_path: Path) -> None:
        sae = make("jumprelu")
        tensors = {k.replace("W_", "w_"): v for k, v in sae.tensors().items()}
        tensors["w_dec"] = tensors["w_dec"][:, None].repeat(1, 3, 1)
        save_file(tensors, tmp_path / "params.safetensors")
        with pytest.raises(UserError, match="cross-layer transcoder"):
            load_sae(tmp_path)


class TestLlamaScope:
    CONFIG = {
        "d_model": D_MODEL, "d_sae": D_SAE, "expansion_factor": 4, "jump_relu_threshold": 9.0,
        "dataset_average_activation_norm": {"in": 101.0, "out": 101.0},
        "hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post",
    }  # fmt: skip

    def tensors(self) -> dict[str, torch.Tensor]:
        sae = make("jumprelu")
        return {
            "encoder.weight": sae.W_enc.T.contiguous(), "encoder.bias": sae.b_enc / 30,
            "decoder.weight": sae.W_dec.T.contiguous(), "decoder.bias": sae.b_dec / 30,
        }  # fmt: skip

    def test_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        place = tmp_path / "L15R"
        (place / "checkpoints").mkdir(parents=True)
        save_file(self.tensors(), place / "checkpoints" / "final.safetensors")
        (place / "hyperparams.json").write_text(json.dumps(self.CONFIG))
        ours = load_sae(place)
        theirs = through_saelens(
            monkeypatch, tmp_path, "llama_scope_sae_huggingface_loader", "fnlp/x", "L15R",
            dtype="float32",
        )  # fmt: skip
        agree(ours, theirs)
        assert ours.format == "llama-scope" and ours.spec.layer == 15
        given = load_sae(place / "checkpoints" / "final.safetensors")
        assert torch.equal(given.W_enc, ours.W_enc)

    def test_r1_distill(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        place = tmp_path / "L15R"
        place.mkdir()
        threshold = {"log_jumprelu_threshold": torch.linspace(-1, 1, D_SAE)}
        save_file({**self.tensors(), **threshold}, place / "sae_weights.safetensors")
        (place / "config.json").write_text(
            json.dumps({**self.CONFIG, "expansion_factor": D_SAE / D_MODEL})
        )
        theirs = through_saelens(
            monkeypatch, tmp_path, "llama_scope_r1_distill_sae_huggingface_loader", "fnlp/x",
            "L15R", d_sae=D_SAE,
        )  # fmt: skip
        ours = load_sae(place)
        agree(ours, theirs)
        assert ours.format == "llama-scope-r1"

    @pytest.mark.parametrize("norm", [0, -1, "3", None, True, 1e40])
    def test_a_norm_that_cannot_be(self, tmp_path: Path, norm: Any) -> None:
        (tmp_path / "checkpoints").mkdir()
        save_file(self.tensors(), tmp_path / "checkpoints" / "final.safetensors")
        config = {**self.CONFIG, "dataset_average_activation_norm": {"in": norm}}
        (tmp_path / "hyperparams.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="in must be a positive number"):
            load_sae(tmp_path)


class TestOtherFiles:
    def test_goodfire(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sae, name = make("standard"), "Llama-3.1-8B-Instruct-SAE-l19.pth"
        torch.save(
            {
                "encoder_linear.weight": sae.W_enc.T, "encoder_linear.bias": sae.b_enc,
                "decoder_linear.weight": sae.W_dec.T, "decoder_linear.bias": sae.b_dec,
            },
            tmp_path / name,
        )  # fmt: skip
        ours = load_sae(tmp_path)
        theirs = through_saelens(
            monkeypatch, tmp_path, "get_goodfire_huggingface_loader",
            "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", name,
            d_in=D_MODEL, d_sae=D_SAE, dtype="float32",
        )  # fmt: skip
        agree(ours, theirs)
        assert ours.spec.layer == 19 and ours.format == "goodfire"
        assert ours.spec.model_name == "meta-llama/Llama-3.1-8B-Instruct"

    def test_deepseek(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sae, name = make("standard"), "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"
        torch.save(
            {
                "encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc,
                "decoder.weight": sae.W_dec.T, "decoder.bias": sae.b_dec,
            },
            tmp_path / name,
        )  # fmt: skip
        theirs = through_saelens(
            monkeypatch, tmp_path, "deepseek_r1_sae_huggingface_loader", "x", name,
            d_in=D_MODEL, d_sae=D_SAE, dtype="float32",
        )  # fmt: skip
        ours = load_sae(tmp_path / name)
        agree(ours, theirs)
        assert ours.spec.layer == 19 and ours.format == "deepseek-r1"

    def test_qwen(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sae, repo = make("topk"), f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"
        place = tmp_path / repo
        place.mkdir()
        turned = {**sae.tensors(), "W_enc": sae.W_enc.T, "W_dec": sae.W_dec.T}
        torch.save(turned, place / "layer4.sae.pt")
        theirs = through_saelens(
            monkeypatch, place, "qwen_scope_sae_huggingface_loader", f"Qwen/{repo}",
            "layer4.sae.pt", d_in=D_MODEL, d_sae=D_SAE,
        )  # fmt: skip
        ours = load_sae(place)
        agree(ours, theirs)
        assert ours.spec.layer == 4 and ours.spec.k == K and ours.format == "qwen-scope"
        shutil.move(place / "layer4.sae.pt", tmp_path / "layer4.sae.pt")
        with pytest.raises(UserError, match="holds no k"):
            load_sae(tmp_path / "layer4.sae.pt")

    def test_gpt2_attention(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sae = make("standard", apply_b_dec_to_input=True)
        torch.save(sae.tensors(), tmp_path / "gpt2_L5.pt")
        config = {"act_size": D_MODEL, "dict_size": D_SAE, "act_name": "blocks.5.attn.hook_z"}
        (tmp_path / "gpt2_L5_cfg.json").write_text(json.dumps(config))
        theirs = through_saelens(
            monkeypatch, tmp_path, "connor_rob_hook_z_huggingface_loader", "x", "gpt2_L5.pt"
        )
        theirs.turn_off_forward_pass_hook_z_reshaping()
        ours = load_sae(tmp_path)
        agree(ours, theirs)
        assert ours.spec.layer == 5 and ours.spec.reshape_activations == "hook_z"


class TestOpenAI:
    """Against the equations of its `Autoencoder`, written out."""

    def saved(self, folder: Path, topk: bool, tied: bool) -> SAE:
        sae = make("topk" if topk else "standard", normalize_activations="layer_norm")
        state: dict[str, Any] = {
            "pre_bias": sae.b_dec, "latent_bias": sae.b_enc, "encoder.weight": sae.W_enc.T,
            "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long),
            "latents_activation_frequency": torch.ones(D_SAE, dtype=torch.int64),
            "latents_mean_square": torch.zeros(D_SAE),
            "activation": "TopK" if topk else "ReLU",
        }  # fmt: skip
        state["decoder.linear.weight" if tied else "decoder.weight"] = (
            sae.W_enc.T if tied else sae.W_dec.T
        )
        if topk:
            state["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"}
        torch.save(state, folder / "autoencoder.pt")
        return sae

    @pytest.mark.parametrize("topk", [False, True])
    @pytest.mark.parametrize("tied", [False, True])
    def test_equations(self, tmp_path: Path, topk: bool, tied: bool) -> None:
        sae = self.saved(tmp_path, topk, tied)
        ours = load_sae(tmp_path)
        x = activations()
        mean, std = x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True)
        read = (x - mean) / (std + 1e-5) if topk else x
        pre = (read - sae.b_dec) @ sae.W_enc + sae.b_enc
        if topk:
            values, indices = pre.topk(K, dim=-1)
            latents = torch.zeros_like(pre).scatter(-1, indices, values.relu())
        else:
            latents = pre.relu()
        out = latents @ (sae.W_enc.T if tied else sae.W_dec) + sae.b_dec
        out = out * std + mean if topk else out
        assert difference(ours.encode(x), latents) < 1e-5
        assert difference(ours.reconstruct(x), out) < 1e-5
        assert ours.format == "openai" and ours.spec.apply_b_dec_to_input
        assert "names no layer" in ours.notes[0]


class TestOpenMOSS:
    """Against its equations; its own package is no dependency of ours."""

    def saved(self, folder: Path, act: str, norm: str, include: bool, out: bool) -> SAE:
        sae = make("jumprelu", d_out=D_OUT if out else None)
        hook_out = "blocks.2.hook_mlp_out" if out else "blocks.2.hook_resid_post"
        tensors = {
            "W_E": sae.W_enc, "b_E": sae.b_enc / 30, "W_D": sae.W_dec, "b_D": sae.b_dec / 30,
            "dataset_average_activation_norm.blocks.2.hook_resid_post": torch.tensor(110.0),
        }  # fmt: skip
        if out:
            tensors[f"dataset_average_activation_norm.{hook_out}"] = torch.tensor(40.0)
        if act == "jumprelu":
            tensors["activation_function.log_jumprelu_threshold"] = torch.linspace(-1, 1, D_SAE)
        save_file(tensors, folder / "sae_weights.safetensors")
        config = {
            "sae_type": "sae", "d_model": D_MODEL, "expansion_factor": D_SAE / D_MODEL,
            "act_fn": act, "top_k": K, "norm_activation": norm,
            "sparsity_include_decoder_norm": include, "use_decoder_bias": True,
            "hook_point_in": "blocks.2.hook_resid_post", "hook_point_out": hook_out,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        return sae

    @pytest.mark.parametrize("act", ["relu", "topk", "jumprelu"])
    @pytest.mark.parametrize("norm", ["dataset-wise", "token-wise", "inference"])
    @pytest.mark.parametrize("include", [False, True])
    @pytest.mark.parametrize("out", [False, True])
    def test_equations(self, tmp_path: Path, act: str, norm: str, include: bool, out: bool) -> None:
        sae = self.saved(tmp_path, act, norm, include, out)
        ours = load_sae(tmp_path)
        x = activations()
        scale_in, scale_out = torch.ones(()), torch.ones(())
        if norm == "dataset-wise":
            scale_in = torch.tensor(D_MODEL**0.5 / 110)
            scale_out = torch.tensor(D_OUT**0.5 / 40) if out else scale_in
        if norm == "token-wise":
            scale_in = D_MODEL**0.5 / x.norm(dim=-1, keepdim=True)
            scale_out = torch.ones(()) if out else scale_in
        pre = x * scale_in @ sae.W_enc + sae.b_enc / 30
        rows = sae.W_dec.norm(dim=1) if include else torch.ones(D_SAE)
        chosen = pre * rows
        if act == "topk":
            keep = torch.zeros_like(pre).scatter(-1, chosen.topk(K, dim=-1).indices, 1.0)
            latents = chosen.relu() * keep
        elif act == "jumprelu":
            latents = chosen.relu() * (chosen > torch.linspace(-1, 1, D_SAE).exp())
        else:
            latents = chosen.relu()
        reconstruction = ((latents / rows) @ sae.W_dec + sae.b_dec / 30) / scale_out
        # float32 products in another order, and one rounding of the folded weights.
        assert difference(ours.encode(x), latents) < 1e-5
        assert difference(ours.reconstruct(x), reconstruction) < 1e-5
        assert ours.format == "openmoss" and ours.spec.layer == 2
        assert ours.spec.d_out == (D_OUT if out else None)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"sae_type": "clt"}, "sae_type 'clt'"),
            ({"use_glu_encoder": True}, "a GLU encoder"),
            ({"norm_activation": "batch-wise"}, "norm_activation 'batch-wise'"),
            ({"act_fn": "batchtopk"}, "stores no threshold"),
            ({"act_fn": "gelu"}, "act_fn 'gelu'"),
            ({"top_k": None}, "k must be in"),
        ],
    )
    def test_refusals(self, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
        self.saved(tmp_path, "topk", "dataset-wise", True, False)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError, match=words):
            load_sae(tmp_path)
