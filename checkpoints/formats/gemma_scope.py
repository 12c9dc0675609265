"""Gemma Scope 1 (`params.npz`) and 2 (`params.safetensors`): JumpReLU SAEs and transcoders.

Version 1 gives width, layer and site only in its path; version 2 usually has a `config.json` too.
"""

import re
from collections.abc import Mapping
from typing import Any

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
    own_facts,
    spec_or_error,
    text,
)
from saesteer.checkpoints.sparse_autoencoder import SAE

CFG = "config.json"

_NAMES = {
    "w_enc": "W_enc",
    "w_dec": "W_dec",
    "b_enc": "b_enc",
    "b_dec": "b_dec",
    "w_e": "W_enc",
    "w_d": "W_dec",
    "b_e": "b_enc",
    "b_d": "b_dec",
    "threshold": "threshold",
    "scaling_factor": "scaling_factor",
    "affine_skip_connection": "W_skip",
}
_NEEDED = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def read(name: str, place: SAEFiles) -> SAE:
    """jumprelu; b_dec is not subtracted from the input; no normalisation."""
    where = place.folder.resolve().as_posix()
    first = name == "gemma-scope"
    path = place.weights_file()
    raw = safe_reading.read_npz(path) if first else safe_reading.read_safetensors(path)
    tensors = _renamed(place, raw)
    scaling = tensors.pop("scaling_factor", None)
    if scaling is not None and bool((scaling != 1).any()):
        raise UserError(f"`sae` {place.source} has a scaling_factor that is not 1: choose another")
    exactly(place, tensors, _NEEDED, ("W_skip",))
    all_float(place, tensors)
    if tensors["W_dec"].dim() == 3:
        raise UserError(
            f"`sae` {place.source} is a cross-layer transcoder, which writes to many layers and is "
            "not read: choose another SAE"
        )
    d_model, d_sae = matrix(place, tensors, "W_enc")
    _, d_out = matrix(place, tensors, "W_dec")
    notes = []
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T
    if first and "embedding" in where:
        # Trained on embeddings times sqrt(D), as the model's first block reads them.
        tensors["W_enc"] = tensors["W_enc"] / d_model**0.5
        tensors["W_dec"] = tensors["W_dec"] * d_model**0.5
        notes.append("an SAE of the embedding: folded the model's factor sqrt(d_model)")
    site = _first_site(where) if first else _second_site(place, where)
    if not site["hook_name"] and not site["hf_hook_name"]:
        notes.append("the path says no layer and site: give `layer` and `site`")
    transcoder = "transcoder" in where or "W_skip" in tensors or d_out != d_model
    transcoder = transcoder or "hook_name_out" in site["metadata"]
    spec = spec_or_error(
        place,
        architecture="jumprelu",
        d_model=d_model,
        d_sae=d_sae,
        d_out=d_out if transcoder else None,
        dtype=dtype_name(tensors["W_enc"]),
        **site,
    )
    return finish(place, name, spec, tensors, notes)


def _renamed(place: SAEFiles, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, tensor in raw.items():
        ours = _NAMES.get(key.lower(), key)
        if ours in renamed:
            raise UserError(f"`sae` {place.source}: {place.weights} has two tensors for {ours}")
        renamed[ours] = tensor
    return renamed


def _layer(where: str) -> int | None:
    numbers = re.findall(r"layer_(\d{1,4})(?!\d)", where)
    return int(numbers[-1]) if numbers else None


def _first_site(where: str) -> dict[str, Any]:
    """Fields of the spec from a path like
    `.../gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`."""
    layer = _layer(where)
    model = re.search(r"gemma-scope-(\d+b)-(pt|it)-(\w+)", where)
    suffix = "-it" if model and model.group(2) == "it" else ""
    kind = model.group(3) if model else ""
    metadata: dict[str, Any] = {"prepend_bos": True, "context_size": 1024}
    l0 = re.search(r"average_l0_(\d+)", where)
    if l0:
        metadata |= own_facts(published_l0=int(l0.group(1)))
    hook, reshape = "", "none"
    if layer is not None and "embedding" not in where:
        if kind.startswith("res"):
            hook = f"blocks.{layer}.hook_resid_post"
        elif kind.startswith("mlp"):
            hook = f"blocks.{layer}.hook_mlp_out"
        elif kind.startswith("att"):
            hook, reshape = f"blocks.{layer}.attn.hook_z", "hook_z"
        elif kind.startswith("transcoder"):
            hook = f"blocks.{layer}.ln2.hook_normalized"
            metadata["hook_name_out"] = f"blocks.{layer}.hook_mlp_out"
    return {
        "hook_name": "hook_embed" if "embedding" in where else hook,
        "hf_hook_name": "",
        "reshape_activations": reshape,
        "model_name": f"google/gemma-2-{model.group(1)}{suffix}" if model else "",
        "metadata": metadata,
    }


def _second_site(place: SAEFiles, where: str) -> dict[str, Any]:
    """Fields of the spec from the path, and from the config, which is more precise."""
    config = place.config(CFG, optional=True)
    architecture = config.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise UserError(f"`sae` {place.source} has architecture {architecture!r}, not jump_relu")
    layer, metadata = _layer(where), dict[str, Any](prepend_bos=True, context_size=1024)
    kinds = {
        "resid_post": "hook_resid_post",
        "mlp_out": "hook_mlp_out",
        "attn_out": "attn.hook_z",
        "transcoder": "hook_mlp_in",
    }
    kind = next((kind for kind in kinds if kind in where), None)
    hook = f"blocks.{layer}.{kinds[kind]}" if kind and layer is not None else ""
    if kind == "transcoder" and layer is not None:
        metadata["hook_name_out"] = f"blocks.{layer}.hook_mlp_out"
    if out := text(config, "hf_hook_point_out"):
        metadata["hf_hook_name_out"] = out
    model = text(config, "model_name").replace("-v3", "-3")
    return {
        "hook_name": hook,
        "hf_hook_name": text(config, "hf_hook_point_in").removesuffix(".output"),
        # SAELens calls it hook_z, but it reads the heads' outputs side by side already.
        "reshape_activations": "none",
        "model_name": model if "/" in model or not model else f"google/{model}",
        "metadata": metadata,
    }
