"""Qwen Scope: `layerN.sae.pt` with both matrices turned; k stands in the repository's name."""

import re

from torch import Tensor

from saesteer.checkpoints import torch_files
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.formats.sae_files import (
    SAEFiles,
    all_float,
    dtype_name,
    exactly,
    finish,
    matrix,
    spec_or_error,
)
from saesteer.checkpoints.sparse_autoencoder import SAE


def read(name: str, place: SAEFiles) -> SAE:
    """topk; b_dec stays out of the input."""
    content = torch_files.read_pt(place.weights_file())
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    exactly(place, tensors, ("W_enc", "b_enc", "W_dec", "b_dec"))
    all_float(place, tensors)
    d_sae, d_model = matrix(place, tensors, "W_enc")
    where = place.folder.resolve().as_posix()
    repository = re.search(r"SAE-Res-([\w.-]+?)-W\w+-L0_(\d{1,6})", where)
    if not repository:
        raise UserError(
            f"`sae` {place.source} holds no k, and none of its folders is named like the "
            "repository (SAE-Res-MODEL-W32K-L0_50): put the file into a folder of that name"
        )
    layer = re.fullmatch(r"layer(\d{1,4})\.sae\.pt", place.weights)
    spec = spec_or_error(
        place,
        architecture="topk",
        d_model=d_model,
        d_sae=d_sae,
        k=int(repository.group(2)),
        dtype=dtype_name(tensors["W_enc"]),
        hook_name=f"blocks.{layer.group(1)}.hook_resid_post" if layer else "",
        hf_hook_name=f"model.layers.{layer.group(1)}" if layer else "",
        model_name=f"Qwen/{repository.group(1)}",
        metadata={"context_size": 1024, "prepend_bos": True},
    )
    turned = {**tensors, "W_enc": tensors["W_enc"].T, "W_dec": tensors["W_dec"].T}
    return finish(place, name, spec, turned)
