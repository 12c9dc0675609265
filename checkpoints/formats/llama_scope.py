"""Llama Scope: the first release, and the one on R1-Distill.

Both were trained on x * a with a = sqrt(d_model) / (average norm of the input), which is folded
here. They disagree on the threshold: the first keeps one number in units of the raw residual, which
is multiplied by a; the second one logarithm for each latent, in the latents' own units.
"""

from typing import Any

import torch

from saesteer.checkpoints import folds, safe_reading
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.formats.sae_files import (
    SAEFiles,
    all_float,
    dtype_name,
    exactly,
    finish,
    matrix,
    number,
    spec_or_error,
    text,
    with_notes,
)
from saesteer.checkpoints.sparse_autoencoder import SAE

HYPERPARAMS = "hyperparams.json"
CFG = "config.json"

_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def read(name: str, place: SAEFiles) -> SAE:
    """jumprelu; b_dec stays out of the input."""
    first = name == "llama-scope"
    config = place.config(HYPERPARAMS if first else CFG)
    tensors = safe_reading.read_safetensors(place.weights_file())
    exactly(place, tensors, _LINEAR if first else (*_LINEAR, "log_jumprelu_threshold"))
    all_float(place, tensors)
    d_sae, d_model = matrix(place, tensors, "encoder.weight")
    averages = config.get("dataset_average_activation_norm")
    if not isinstance(averages, dict):
        raise UserError(f"`sae` {place.source} lacks dataset_average_activation_norm; restore it")
    hook, out = text(config, "hook_point_in"), text(config, "hook_point_out")
    if out and hook and out != hook:
        raise UserError(f"`sae` {place.source} is a transcoder ({hook} to {out}); SAEs are read")
    scale = d_model**0.5 / number(place, averages, "in")
    if first:
        value = number(place, config, "jump_relu_threshold") * scale
        threshold = torch.full((d_sae,), value, dtype=tensors["encoder.bias"].dtype)
    else:
        threshold = tensors["log_jumprelu_threshold"].float().exp()
    spec = spec_or_error(
        place,
        architecture="jumprelu",
        d_model=d_model,
        d_sae=d_sae,
        dtype=dtype_name(tensors["encoder.weight"]),
        hook_name=hook,
        model_name=_model(place, config),
        metadata={"prepend_bos": True, "context_size": 1024},
    )
    renamed = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": tensors["decoder.bias"],
        "threshold": threshold,
    }
    sae = folds.fold_average_norm(finish(place, name, spec, renamed), scale)
    return with_notes(sae, [f"folded the input scale {scale:.6g}"])


def _model(place: SAEFiles, config: dict[str, Any]) -> str:
    named = text(config, "model_name")
    return named or ("meta-llama/Llama-3.1-8B" if "Llama3_1-8B" in str(place.folder) else "")
