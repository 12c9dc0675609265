"""Changed bytes, headers and configs of good files of every kind load, or end in one line."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import load_sae

from .bad_files import (
    openai_state,
    pt_members,
    refusal,
    set_entry,
    tensors,
    with_config,
    with_header,
)


def whole(kind: str) -> bytes:
    """The bytes of a good file of each kind."""
    buffer = io.BytesIO()
    if kind == "pt":
        torch.save(openai_state(), buffer)
    elif kind == "npz":
        np.savez(buffer, **{k: v.numpy() for k, v in tensors().items()})
    else:
        from safetensors.torch import save

        return save({k.replace("W_", "w_"): v for k, v in tensors().items()})
    return buffer.getvalue()


WHOLE = {kind: whole(kind) for kind in ("pt", "npz", "safetensors")}

NAMES = {"pt": "sae.pt", "npz": "params.npz", "safetensors": "params.safetensors"}

FUZZ = settings(
    deadline=None,
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 60)),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def survives(path: Path) -> None:
    """Loading gives an SAE of finite weights or a one-line UserError; nothing else."""
    try:
        sae = load_sae(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(bool(torch.isfinite(t).all()) for t in sae.tensors().values())


@pytest.mark.parametrize("kind", WHOLE)
@FUZZ
@given(data=st.data())
def test_changed_bytes(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    raw = bytearray(WHOLE[kind])
    places = st.integers(0, len(raw) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=8)):
        raw[place] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.one_of(st.just(len(raw)), places))]
    path = tmp_path / NAMES[kind]
    path.write_bytes(raw)
    survives(path)


@pytest.mark.parametrize("kind", WHOLE)
@FUZZ
@given(raw=st.binary(max_size=400))
def test_any_bytes(tmp_path: Path, kind: str, raw: bytes) -> None:
    path = tmp_path / NAMES[kind]
    path.write_bytes(raw)
    survives(path)


def test_an_archive_over_several_disks(tmp_path: Path) -> None:
    raw = bytearray(WHOLE["pt"])
    locator = raw.rindex(b"PK\x06\x07")
    raw[locator + 4] = 1
    (tmp_path / "sae.pt").write_bytes(raw)
    refusal(tmp_path / "sae.pt")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


@FUZZ
@given(
    changes=st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), JSON, min_size=1)
)
def test_any_header(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tmp_path / "sae"
    survives(with_header(set_entry("b_enc", **changes))(folder))


@FUZZ
@given(
    changes=st.dictionaries(
        st.sampled_from(
            ["architecture", "d_in", "d_sae", "d_out", "k", "dtype", "metadata", "hook_name",
             "normalize_activations", "reshape_activations", "apply_b_dec_to_input",
             "sae_lens_version", "activation_fn_kwargs", "rescale_acts_by_decoder_norm",
             "residual_threshold", "max_iterations", "stop_on_duplicate_support"]
        ),  # fmt: skip
        JSON | st.sampled_from(["matching_pursuit", "gated", "topk"]),
        min_size=1,
    )
)  # fmt: skip
def test_any_config(tmp_path: Path, changes: dict[str, Any]) -> None:
    survives(with_config(**changes)(tmp_path / "sae"))


def linear(decoder: bool = True) -> dict[str, torch.Tensor]:
    found = tensors()
    named = {"encoder.weight": found["W_enc"].T.contiguous(), "encoder.bias": found["b_enc"]}
    if not decoder:
        return {**named, "W_dec": found["W_dec"], "b_dec": found["b_dec"]}
    turned = {"decoder.weight": found["W_dec"].T.contiguous(), "decoder.bias": found["b_dec"]}
    return {**named, **turned}


def openmoss() -> dict[str, torch.Tensor]:
    names = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
    return {names[key]: value for key, value in tensors().items() if key in names}


def plain() -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors().items() if key != "threshold"}


# Config, weights, what is in them, and the keys that the reader asks for.
FOREIGN: dict[str, tuple[str, str, Callable[[], dict[str, torch.Tensor]], tuple[str, ...]]] = {
    "sparsify": (
        "cfg.json", "sae.safetensors", lambda: linear(decoder=False),
        ("activation", "k", "d_in", "num_latents", "transcode"),
    ),
    "dictionary_learning": ("config.json", "ae.pt", linear, ("trainer", "buffer")),
    "llama-scope": (
        "hyperparams.json", "checkpoints/final.safetensors", linear,
        ("dataset_average_activation_norm", "jump_relu_threshold", "hook_point_in"),
    ),
    "llama-scope-r1": (
        "config.json", "sae_weights.safetensors",
        lambda: {**linear(), "log_jumprelu_threshold": tensors()["b_enc"]},
        ("dataset_average_activation_norm", "hook_point_in", "act_fn", "d_model"),
    ),
    "openmoss": (
        "config.json", "sae_weights.safetensors", openmoss,
        ("sae_type", "act_fn", "top_k", "norm_activation", "sparsity_include_decoder_norm",
         "hook_point_in", "hook_point_out", "use_glu_encoder", "d_model"),
    ),
    "gemma-scope-2": (
        "config.json", "params.safetensors",
        lambda: {key.replace("W_", "w_"): value for key, value in tensors().items()},
        ("architecture", "model_name", "hf_hook_point_in", "hf_hook_point_out"),
    ),
    "transcoder-layers": ("config.yaml", "layer_3.safetensors", plain, ("model_name",)),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
@FUZZ
@given(data=st.data())
def test_any_config_of_other_formats(tmp_path: Path, name: str, data: st.DataObject) -> None:
    config_file, weights, build, keys = FOREIGN[name]
    (tmp_path / weights).parent.mkdir(exist_ok=True)
    if weights.endswith(".pt"):
        torch.save(build(), tmp_path / weights)
    else:
        save_file(build(), tmp_path / weights)
    if name == "transcoder-layers":
        (tmp_path / "wandb-config.yaml").write_text("")
    config = data.draw(st.dictionaries(st.sampled_from(keys), JSON))
    (tmp_path / config_file).write_text(json.dumps(config))
    survives(tmp_path)


@FUZZ
@given(
    scaler=st.dictionaries(st.sampled_from(["scaling_factor", "has_whitening"]), JSON),
    changes=st.dictionaries(
        st.sampled_from(["architecture", "normalize_activations", "rescale_acts_by_decoder_norm"]),
        st.sampled_from(["topk", "batchtopk", "expected_average_only_in", True]) | JSON,
    ),
)
def test_any_scaler_of_a_checkpoint(
    tmp_path: Path, scaler: dict[str, Any], changes: dict[str, Any]
) -> None:
    folder = tmp_path / "sae"
    with_config(**changes)(folder)
    (folder / "activation_scaler.json").write_text(json.dumps(scaler))
    survives(folder)


@FUZZ
@given(program=st.binary(max_size=200), protocol=st.booleans())
def test_any_pickle(tmp_path: Path, program: bytes, protocol: bool) -> None:
    """In a whole archive, so that the pickle itself is what is read."""
    program = b"\x80\x02" + program + b"." if protocol else program
    build = pt_members(
        lambda m: {k: program if k.endswith("data.pkl") else v for k, v in m.items()}
    )
    survives(build(tmp_path))
