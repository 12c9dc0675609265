"""dictionary_learning: `ae.pt`, a state dict, and `config.json`.

Training runs on `x / norm`, and saving multiplies every bias and threshold by that norm. They are
in raw units, so nothing is folded here.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from saesteer.checkpoints import files, folds, torch_files
from saesteer.checkpoints.durable import write_by
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.formats.sae_files import (
    SAEFiles,
    all_float,
    dtype_name,
    exactly,
    finish,
    matrix,
    number,
    own_facts,
    scalar,
    spec_or_error,
    text,
    with_notes,
)
from saesteer.checkpoints.sae_spec import DTYPES, Architecture, parse_hook_name
from saesteer.checkpoints.sparse_autoencoder import SAE

CFG = "config.json"
WEIGHTS = "ae.pt"

_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_JUMPRELU = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
CLASSES: dict[str, tuple[str, ...]] = {
    "AutoEncoder": (*_LINEAR, "bias"),
    "AutoEncoderNew": (*_LINEAR, "decoder.bias"),
    "GatedAutoEncoder": (
        "encoder.weight",
        "decoder.weight",
        "decoder_bias",
        "r_mag",
        "gate_bias",
        "mag_bias",
    ),
    "JumpReluAutoEncoder": _JUMPRELU,
    "AutoEncoderTopK": (*_LINEAR, "b_dec", "k", "threshold"),
    "BatchTopKSAE": (*_LINEAR, "b_dec", "k", "threshold"),
    "MatryoshkaBatchTopKSAE": (*_JUMPRELU, "k", "group_sizes"),
}
"""The tensors of each `dict_class`."""

# Tensors that a training run scales when it saves, except in the backups of `backup_steps`.
_BIASES = (
    "encoder.bias",
    "bias",
    "decoder.bias",
    "decoder_bias",
    "gate_bias",
    "mag_bias",
    "b_dec",
    "b_enc",
    "threshold",
)

_OUR_CLASS = {
    "standard": "AutoEncoder",
    "gated": "GatedAutoEncoder",
    "jumprelu": "JumpReluAutoEncoder",
    "topk": "AutoEncoderTopK",
}


def read(name: str, place: SAEFiles) -> SAE:
    """The SAE of a trainer folder, by the `dict_class` in its config or by its tensors' names."""
    content = torch_files.read_pt(place.weights_file())
    notes: list[str] = []
    scale = 1.0
    if isinstance(content.get("ae"), dict):
        scale = number(place, content, "norm_factor") if content.get("norm_factor") else 1.0
        notes.append(f"a backup made during training: biases times its norm_factor {scale:.6g}")
        content = content["ae"]
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    config = place.config(CFG, optional=True)
    trainer = config.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    kind = _dict_class(place, trainer, tensors)
    exactly(place, tensors, CLASSES[kind])
    counts: dict[str, Tensor] = {}
    for key in ("k", "group_sizes"):
        if key in tensors:
            counts[key] = tensors.pop(key)
    all_float(place, tensors)
    tensors = {key: t * scale if key in _BIASES else t for key, t in tensors.items()}
    renamed = _renamed(tensors)
    matrix(place, renamed, "W_enc")
    d_model, d_sae = (int(size) for size in renamed["W_enc"].shape)
    architecture, k = _activation(place, kind, counts, renamed, d_sae, notes)
    spec = spec_or_error(
        place,
        architecture=cast(Architecture, architecture),
        d_model=d_model,
        d_sae=d_sae,
        k=k,
        apply_b_dec_to_input=kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
        dtype=dtype_name(renamed["W_enc"]),
        model_name=text(trainer, "lm_name"),
        hook_name=_hook(trainer),
        metadata={
            **own_facts(
                dict_class=kind,
                trained_k=int(scalar(place, counts, "k")) if "k" in counts else None,
                group_sizes=counts["group_sizes"].tolist() if "group_sizes" in counts else None,
            ),
            **_context(config),
        },
    )
    return finish(place, name, spec, renamed, notes)


def write(name: str, sae: SAE, folder: Path) -> SAE:
    """Write `ae.pt` and `config.json` that the package's own classes load.

    Raises UserError for an SAE that none of its classes computes.
    """
    spec = sae.spec
    if spec.architecture not in _OUR_CLASS or spec.is_transcoder or sae.W_skip is not None:
        raise UserError(
            f"dictionary_learning has classes for {', '.join(_OUR_CLASS)} SAEs, and this is "
            f"{spec.architecture}{' with another output' if spec.is_transcoder else ''}: use "
            "another `format`"
        )
    if spec.scales_tokens or spec.centers_input or spec.reshape_activations != "none":
        raise UserError(
            "dictionary_learning cannot express what this SAE does to its input "
            f"(normalize_activations {spec.normalize_activations}, reshape_activations "
            f"{spec.reshape_activations}): use another `format`"
        )
    notes = []
    if spec.rescale_acts_by_decoder_norm:
        sae = folds.fold_decoder_norms(sae)
        notes.append("decoder rows were normalised, so that their lengths no longer matter")
    kind = _OUR_CLASS[spec.architecture]
    wants_input_bias = kind != "JumpReluAutoEncoder"
    if wants_input_bias and not spec.apply_b_dec_to_input:
        sae = folds.unfold_input_bias(sae)
        notes.append(f"{kind} subtracts b_dec from the input: b_enc was changed to make up for it")
    if not wants_input_bias and spec.apply_b_dec_to_input:
        sae = folds.fold_input_bias(sae)
        notes.append(f"{kind} does not subtract b_dec from the input: b_dec was folded into b_enc")
    if kind == "AutoEncoder":
        notes.append(
            "AutoEncoder.from_pretrained scales decoder rows to 1 unless normalize_decoder=False"
        )
    dtype = DTYPES[spec.dtype]
    tensors = {key: t.detach().to(dtype).contiguous() for key, t in _their_names(sae, kind).items()}
    if kind == "AutoEncoderTopK":
        assert spec.k is not None
        tensors["k"] = torch.tensor(spec.k, dtype=torch.int)
        tensors["threshold"] = torch.tensor(-1.0)
    layer, _ = parse_hook_name(spec.hook_name)
    trainer = {
        "dict_class": kind,
        "trainer_class": "",
        "activation_dim": spec.d_model,
        "dict_size": spec.d_sae,
        "k": spec.k,
        "layer": spec.layer if layer is None else layer,
        "lm_name": spec.model_name,
        "submodule_name": spec.hf_hook_name or spec.hook_name,
    }
    context = spec.metadata.get("context_size")
    config = {"trainer": trainer, "buffer": {"ctx_len": context or 1024}}
    folder.mkdir(parents=True, exist_ok=True)
    _write_pt(folder / WEIGHTS, tensors)
    files.write_json(folder / CFG, config)
    notes.append("metadata beyond model, layer and site is not written")
    return with_notes(dataclasses.replace(sae, format=name), notes)


def _dict_class(place: SAEFiles, trainer: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The class named in the config, else the only one with these tensors. Raises UserError."""
    named = trainer.get("dict_class")
    if isinstance(named, str) and named in CLASSES:
        return str(named)
    if named is not None:
        raise UserError(
            f"`sae` {place.source} has dict_class {named!r}; we read {', '.join(CLASSES)}"
        )
    fitting = [kind for kind, names in CLASSES.items() if set(names) == set(tensors)]
    if len(fitting) != 1:
        what = f"fit {' and '.join(fitting)}" if fitting else "fit none of its classes"
        raise UserError(
            f"`sae` {place.source} has no {CFG} with a dict_class, and its tensors {what}: put the "
            "trainer's config.json next to the file"
        )
    return fitting[0]


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under our names, matrices transposed where ours are."""
    names = {
        "encoder.bias": "b_enc",
        "gate_bias": "b_enc",
        "mag_bias": "b_mag",
        "bias": "b_dec",
        "decoder.bias": "b_dec",
        "decoder_bias": "b_dec",
    }
    renamed = {names.get(key, key): tensor for key, tensor in tensors.items()}
    for theirs, ours in (("encoder.weight", "W_enc"), ("decoder.weight", "W_dec")):
        if theirs in renamed:
            renamed[ours] = renamed.pop(theirs).T
    return renamed


def _activation(
    place: SAEFiles,
    kind: str,
    counts: Mapping[str, Tensor],
    renamed: dict[str, Tensor],
    d_sae: int,
    notes: list[str],
) -> tuple[str, int | None]:
    """The architecture and k; makes a threshold for each latent where there is one for all."""
    if kind == "AutoEncoderTopK":
        renamed.pop("threshold")  # for threshold encoding, which is not used here
        return "topk", int(scalar(place, counts, "k"))
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        threshold = scalar(place, renamed, "threshold")
        if threshold < 0:
            notes.append(
                f"its threshold is {threshold:g}, which means never set: read as a plain ReLU"
            )
            renamed.pop("threshold")
            return "standard", None
        renamed["threshold"] = torch.full((d_sae,), threshold, dtype=renamed["b_enc"].dtype)
        notes.append(f"the threshold {threshold:g} of the whole batch became each latent's")
        return "jumprelu", None
    architectures = {"GatedAutoEncoder": "gated", "JumpReluAutoEncoder": "jumprelu"}
    return architectures.get(kind, "standard"), None


def _their_names(sae: SAE, kind: str) -> dict[str, Tensor]:
    if kind == "JumpReluAutoEncoder":
        assert sae.threshold is not None
        return {
            "W_enc": sae.W_enc,
            "b_enc": sae.b_enc,
            "W_dec": sae.W_dec,
            "b_dec": sae.b_dec,
            "threshold": sae.threshold,
        }
    linear = {"encoder.weight": sae.W_enc.T, "decoder.weight": sae.W_dec.T}
    if kind == "GatedAutoEncoder":
        assert sae.r_mag is not None and sae.b_mag is not None
        return {
            **linear,
            "decoder_bias": sae.b_dec,
            "r_mag": sae.r_mag,
            "gate_bias": sae.b_enc,
            "mag_bias": sae.b_mag,
        }
    bias = "bias" if kind == "AutoEncoder" else "b_dec"
    return {**linear, "encoder.bias": sae.b_enc, bias: sae.b_dec}


def _write_pt(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A state dict as torch.save writes it, whole or not at all."""

    def write(temporary: Path) -> None:
        torch.save({key: tensor.cpu().clone() for key, tensor in tensors.items()}, temporary)

    write_by(path, write)


def _hook(trainer: Mapping[str, Any]) -> str:
    """The site: the submodule where it is named, else resid_post of the layer number."""
    module = text(trainer, "submodule_name")
    if re.search(r"\d", module) and "." in module:
        return module
    named = re.fullmatch(r"resid_post_layer_(\d{1,6})", module)
    layer = int(named.group(1)) if named else trainer.get("layer")
    if isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0:
        return f"blocks.{layer}.hook_resid_post" if not module or named else module
    return module


def _context(config: Mapping[str, Any]) -> dict[str, Any]:
    buffer = config.get("buffer")
    length = buffer.get("ctx_len") if isinstance(buffer, dict) else None
    return {"context_size": length} if isinstance(length, int) else {}
