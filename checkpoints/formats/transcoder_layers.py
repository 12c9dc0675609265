"""ReLU transcoders, one file per layer: `layer_N.safetensors` with the encoder transposed.

Next to it lie a `wandb-config.yaml` (some call it `wanb-config.yaml`) and a `config.yaml`.
"""

import re
from typing import Any

import yaml

from saesteer.checkpoints import safe_reading
from saesteer.checkpoints.errors import UserError, reason_of
from saesteer.checkpoints.formats.sae_files import (
    SAEFiles,
    all_float,
    dtype_name,
    exactly,
    finish,
    matrix,
    spec_or_error,
    text,
)
from saesteer.checkpoints.sparse_autoencoder import SAE
from saesteer.checkpoints.yaml_text import parse_yaml

CONFIGS = ("wandb-config.yaml", "wanb-config.yaml")
_MODEL = "config.yaml"


def is_here(place: SAEFiles) -> bool:
    """Whether a config of this format lies next to the weights."""
    return any(place.has(name) for name in CONFIGS)


def read(name: str, place: SAEFiles) -> SAE:
    """A transcoder from the MLP's input to its output; the file's name gives the layer."""
    tensors = safe_reading.read_safetensors(place.weights_file())
    exactly(place, tensors, ("W_enc", "b_enc", "W_dec", "b_dec"))
    all_float(place, tensors)
    d_sae, d_model = matrix(place, tensors, "W_enc")
    _, d_out = matrix(place, tensors, "W_dec")
    layer = re.search(r"_(\d{1,4})\.safetensors$", place.weights)
    metadata: dict[str, Any] = {"prepend_bos": True}
    if layer:
        metadata["hook_name_out"] = f"blocks.{layer.group(1)}.hook_mlp_out"
    spec = spec_or_error(
        place,
        architecture="standard",
        d_model=d_model,
        d_sae=d_sae,
        d_out=d_out,
        dtype=dtype_name(tensors["W_enc"]),
        hook_name=f"blocks.{layer.group(1)}.mlp.hook_in" if layer else "",
        model_name=text(_yaml(place, _MODEL), "model_name") if place.has(_MODEL) else "",
        metadata=metadata,
    )
    notes = [] if layer else ["the file's name says no layer: give `layer` and `site`"]
    return finish(place, name, spec, {**tensors, "W_enc": tensors["W_enc"].T}, notes)


def _yaml(place: SAEFiles, name: str) -> dict[str, Any]:
    """The mapping in a YAML file; empty for any other content. Raises UserError."""
    path = place.file(name)
    try:
        if path.stat().st_size > safe_reading.MAX_CONFIG_BYTES:
            raise UserError(f"{path} is too large for a config; download it again")
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}); download it again") from error
    return content if isinstance(content, dict) else {}
