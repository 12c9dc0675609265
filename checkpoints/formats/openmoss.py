"""OpenMOSS (Language-Model-SAEs, llamascopium): `config.json` and `sae_weights.safetensors`.

A data-set-wise scale f = sqrt(width) / (average norm) of input and output is folded; so are the
decoder's norms where latents were chosen by them.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from saesteer.checkpoints import safe_reading
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.formats.sae_files import (
    SAEFiles,
    all_float,
    dtype_name,
    exactly,
    finish,
    matrix,
    scalar,
    spec_or_error,
    text,
)
from saesteer.checkpoints.sae_spec import Architecture
from saesteer.checkpoints.sparse_autoencoder import SAE

CFG = "config.json"
_NORM = "dataset_average_activation_norm."
_THRESHOLD = "activation_function.log_jumprelu_threshold"
_SIZES = ("W_E", "b_E", "W_D", "b_D")


def read(name: str, place: SAEFiles) -> SAE:
    """An SAE (`sae_type` "sae"), also one that writes to another hook point than it reads."""
    config = place.config(CFG)
    raw = safe_reading.read_safetensors(place.weights_file())
    _refuse(place, config, raw)
    norms = {key.removeprefix(_NORM): key for key in raw if key.startswith(_NORM)}
    exactly(place, raw, ("W_E", "b_E", "W_D"), ("b_D", _THRESHOLD, *norms.values()))
    averages = {hook: scalar(place, raw, key) for hook, key in norms.items()}
    all_float(place, raw)
    d_model, d_sae = matrix(place, raw, "W_E")
    _, d_out = matrix(place, raw, "W_D")
    wide = {key: raw[key].double() for key in raw if key in _SIZES}
    wide.setdefault("b_D", torch.zeros(d_out, dtype=torch.float64))
    hook, out = text(config, "hook_point_in"), text(config, "hook_point_out")
    transcoder = bool(out) and out != hook
    activation = config.get("act_fn", "relu")
    architecture = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu"}.get(str(activation))
    if architecture is None:
        why = (
            "stores no threshold to choose latents one token at a time"
            if activation == "batchtopk"
            else "is not read"
        )
        raise UserError(f"`sae` {place.source} has act_fn {activation!r}, which {why}")
    notes: list[str] = []
    mode = config.get("norm_activation", "dataset-wise")
    if mode == "dataset-wise":
        f_in = _factor(place, averages, hook, d_model)
        f_out = _factor(place, averages, out or hook, d_out)
        wide["W_E"] = wide["W_E"] * f_in
        notes.append(f"folded the scales of input and output, {f_in:.6g} and {f_out:.6g}")
    else:
        f_out = 1.0
    rows = torch.linalg.vector_norm(wide["W_D"], dim=1).clamp(min=1e-8)
    if config.get("sparsity_include_decoder_norm", True):
        # The norms are those of the rows as stored, before the output's scale.
        wide["W_E"], wide["b_E"] = wide["W_E"] * rows, wide["b_E"] * rows
        wide["W_D"] = wide["W_D"] / rows[:, None]
        notes.append("folded the decoder's row norms, by which latents were chosen")
    wide["W_D"], wide["b_D"] = wide["W_D"] / f_out, wide["b_D"] / f_out
    tensors = {
        "W_enc": wide["W_E"], "b_enc": wide["b_E"], "W_dec": wide["W_D"], "b_dec": wide["b_D"]
    }  # fmt: skip
    if architecture == "jumprelu":
        if _THRESHOLD not in raw:
            raise UserError(f"`sae` {place.source} is jumprelu and lacks {_THRESHOLD}")
        tensors["threshold"] = raw[_THRESHOLD].double().exp().expand(d_sae)
        if mode == "inference":
            notes.append(
                "OpenMOSS folds the scale of a jumprelu SAE without its threshold: compare L0 on "
                "real text with the published one"
            )
    k = config.get("top_k")
    spec = spec_or_error(
        place,
        architecture=cast(Architecture, architecture),
        d_model=d_model,
        d_sae=d_sae,
        d_out=d_out if transcoder else None,
        k=k if architecture == "topk" and type(k) is int else None,
        normalize_activations="constant_norm_rescale" if mode == "token-wise" else "none",
        dtype=dtype_name(raw["W_E"]),
        hook_name=hook,
        model_name=text(config, "model_name"),
        metadata={"hook_name_out": out} if transcoder else {},
    )
    return finish(place, name, spec, tensors, notes)


def _refuse(place: SAEFiles, config: Mapping[str, Any], raw: Mapping[str, Tensor]) -> None:
    mode = config.get("norm_activation", "dataset-wise")
    for wrong, what in (
        (config.get("sae_type", "sae") != "sae", f"sae_type {config.get('sae_type')!r}"),
        (bool(config.get("use_glu_encoder")) or "W_E_glu" in raw, "a GLU encoder"),
        (
            mode not in ("dataset-wise", "token-wise", "inference"),
            f"norm_activation {mode!r}, which depends on the batch or is unknown",
        ),
    ):
        if wrong:
            raise UserError(f"`sae` {place.source} has {what}, which is not read: choose another")


def _factor(place: SAEFiles, averages: Mapping[str, float], hook: str, width: int) -> float:
    if averages.get(hook, 0) <= 0:
        raise UserError(
            f"`sae` {place.source} lacks {_NORM}{hook}, the average norm that it divides by: "
            "restore the weights"
        )
    return float(width**0.5 / averages[hook])
