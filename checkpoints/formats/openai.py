"""OpenAI's sparse_autoencoder: one `.pt` with the state dict of its `Autoencoder`.

v1 and v4 are ReLU on raw activations; v5 is TopK on layer-normalised ones.
"""

from typing import Any

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
    own_facts,
    spec_or_error,
)
from saesteer.checkpoints.sparse_autoencoder import SAE

_COUNTERS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_TIED = "decoder.linear.weight"
# Nothing in the file says where it reads.
_NO_SITE = "the file names no layer or site: give `layer` and `site`"


def read(name: str, place: SAEFiles) -> SAE:
    """b_dec is subtracted from the (normalised) input; a tied decoder is the encoder turned."""
    content = torch_files.read_pt(place.weights_file())
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    needed = ("pre_bias", "encoder.weight", "latent_bias")
    exactly(place, tensors, needed, ("decoder.weight", _TIED, *_COUNTERS))
    weights = {key: tensors[key] for key in tensors if key not in _COUNTERS}
    all_float(place, weights)
    d_sae, d_model = matrix(place, weights, "encoder.weight")
    # TiedTranspose keeps the encoder's own Linear under `decoder.linear`.
    decoder = (
        weights["decoder.weight"].T if "decoder.weight" in weights else weights["encoder.weight"]
    )
    if _TIED in weights and not bool((weights[_TIED] == weights["encoder.weight"]).all()):
        raise UserError(f"`sae` {place.source}: {_TIED} is not the encoder's weight, as a tied one")
    state = content.get("activation_state_dict")
    activation = content.get("activation", "ReLU")
    if activation not in ("ReLU", "TopK"):
        raise UserError(f"`sae` {place.source} has activation {activation!r}; ReLU, TopK are read")
    topk = activation == "TopK"
    spec = spec_or_error(
        place,
        architecture="topk" if topk else "standard",
        d_model=d_model,
        d_sae=d_sae,
        k=_k(place, state) if topk else None,
        apply_b_dec_to_input=True,
        normalize_activations="layer_norm" if topk else "none",
        dtype=dtype_name(weights["encoder.weight"]),
        metadata=own_facts(counters_left_out=[key for key in _COUNTERS if key in tensors]),
    )
    renamed = {
        "W_enc": weights["encoder.weight"].T,
        "b_enc": weights["latent_bias"],
        "W_dec": decoder,
        "b_dec": weights["pre_bias"],
    }
    notes = [_NO_SITE, *(["reads each token with layer norm, as v5 does"] if topk else [])]
    return finish(place, name, spec, renamed, notes)


def _k(place: SAEFiles, state: Any) -> int:
    k = state.get("k") if isinstance(state, dict) else None
    after = str(state.get("postact_fn", "ReLU")) if isinstance(state, dict) else "ReLU"
    if type(k) is not int or after.removesuffix("()") not in ("ReLU", "Identity"):
        raise UserError(
            f"`sae` {place.source}: activation_state_dict must hold a whole k and postact_fn ReLU, "
            f"got {k!r} and {after!r}"
        )
    if after.startswith("Identity"):
        raise UserError(f"`sae` {place.source} keeps negative values in its top k; ReLU is read")
    return k
