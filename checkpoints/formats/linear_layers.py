"""Plain ReLU SAEs stored as one `.pt` of linear layers that contains nothing but the tensors.

Goodfire (`encoder_linear.weight`), DeepSeek-R1 8B (`encoder.weight`, `decoder.bias`), and the GPT-2
attention SAEs (`W_enc`, with `NAME_cfg.json` next to `NAME.pt`), which read the concatenated heads.
"""

import re

from torch import Tensor

from saesteer.checkpoints import torch_files
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

_PREFIXES = {
    "goodfire": ("encoder_linear", "decoder_linear"),
    "deepseek-r1": ("encoder", "decoder"),
}


def read(name: str, place: SAEFiles) -> SAE:
    """ReLU; b_dec is not subtracted from the input, except for GPT-2's attention."""
    content = torch_files.read_pt(place.weights_file())
    raw = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if name == "gpt2-attention":
        needed = ("W_enc", "b_enc", "W_dec", "b_dec")
        exactly(place, raw, needed)
        tensors = dict(raw)
    else:
        encoder, decoder = _PREFIXES[name]
        exactly(place, raw, [f"{e}.{k}" for e in (encoder, decoder) for k in ("weight", "bias")])
        tensors = {
            "W_enc": raw[f"{encoder}.weight"].T,
            "b_enc": raw[f"{encoder}.bias"],
            "W_dec": raw[f"{decoder}.weight"].T,
            "b_dec": raw[f"{decoder}.bias"],
        }
    all_float(place, tensors)
    d_model, d_sae = matrix(place, tensors, "W_enc")
    hook, model, notes = _site(name, place)
    if not hook:
        notes.append("the file names no layer or site: give `layer` and `site`")
    attention = name == "gpt2-attention"
    spec = spec_or_error(
        place,
        architecture="standard",
        d_model=d_model,
        d_sae=d_sae,
        apply_b_dec_to_input=attention,
        reshape_activations="hook_z" if attention else "none",
        dtype=dtype_name(tensors["W_enc"]),
        hook_name=hook,
        model_name=model,
    )
    return finish(place, name, spec, tensors, notes)


def _site(name: str, place: SAEFiles) -> tuple[str, str, list[str]]:
    """Hook and model from the file's name, or from the config next to it."""
    if name == "gpt2-attention":
        config = place.config(re.sub(r"\.pt$", "", place.weights) + "_cfg.json", optional=True)
        return text(config, "act_name"), "gpt2" if config else "", []
    layer = re.search(r"(?:^|[^a-z])l(\d{1,4})(?!\d)", place.weights)
    named = re.match(r"(Llama-3\.\d-\d+B-Instruct)-SAE", place.weights)
    model = f"meta-llama/{named.group(1)}" if named else ""
    if not layer:
        return "", model, []
    note = f"layer {layer.group(1)} and resid_post are taken from the file's name"
    return f"blocks.{layer.group(1)}.hook_resid_post", model, [note]
