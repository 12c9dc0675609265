"""sparsify (EleutherAI): `cfg.json` and `sae.safetensors`, a folder for each hook point.

The folder's name is the module, relative to the base model: `layers.10`, `h.3.mlp`. With several
seeds a `seedN` folder follows.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any, cast

from saesteer.checkpoints import files, folds, safe_reading
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
    with_notes,
)
from saesteer.checkpoints.sae_spec import DTYPES, Architecture
from saesteer.checkpoints.sparse_autoencoder import SAE

CFG = "cfg.json"
WEIGHTS = "sae.safetensors"

_NEEDED = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")


def read(name: str, place: SAEFiles) -> SAE:
    """x_hat = W_dec acts + b_dec (+ W_skip x); an SAE subtracts b_dec from its input first."""
    config = place.config(CFG)
    tensors = safe_reading.read_safetensors(place.weights_file())
    exactly(place, tensors, _NEEDED, ("W_skip",))
    all_float(place, tensors)
    d_sae, d_model = matrix(place, tensors, "encoder.weight")
    _check_widths(place, config, d_model, d_sae)
    activation = config.get("activation", "topk")
    if activation not in ("topk", "groupmax"):
        raise UserError(
            f"`sae` {place.source} has activation {activation!r}; topk and groupmax are read"
        )
    k = config.get("k")
    if isinstance(k, bool) or not isinstance(k, int):
        raise UserError(f"`sae` {place.source}: k in {CFG} must be a whole number, got {k!r}")
    transcode = bool(config.get("transcode", False))
    module = _module(place.folder.resolve())
    spec = spec_or_error(
        place,
        architecture=cast(Architecture, activation),
        d_model=d_model,
        d_sae=d_sae,
        d_out=int(tensors["b_dec"].numel()) if transcode else None,
        k=k,
        apply_b_dec_to_input=not transcode,
        dtype=dtype_name(tensors["encoder.weight"]),
        hook_name=module,
        model_name=_model(place),
        metadata=own_facts(sparsify=config),
    )
    renamed = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    if "W_skip" in tensors:
        renamed["W_skip"] = tensors["W_skip"]
    return finish(place, name, spec, renamed)


def write(name: str, sae: SAE, folder: Path) -> SAE:
    """Write what `sparsify.SparseCoder.load_from_disk` opens.

    Raises UserError for what the format cannot express: other activations than topk and groupmax,
    token-wise norms, centered input, an output of another width.
    """
    spec = sae.spec
    if spec.architecture not in ("topk", "groupmax"):
        raise UserError(
            f"sparsify has topk and groupmax, this SAE is {spec.architecture}: use another `format`"
        )
    for wrong, what in (
        (spec.scales_tokens, f"normalize_activations {spec.normalize_activations}"),
        (spec.centers_input, "input without its mean (center_writing_weights)"),
        (spec.reshape_activations != "none", "reshape_activations hook_z"),
        (spec.is_transcoder and spec.d_out != spec.d_model, "an output of another width"),
    ):
        if wrong:
            raise UserError(f"sparsify has no {what}: use another `format`")
    notes = []
    if spec.rescale_acts_by_decoder_norm:
        sae = folds.fold_decoder_norms(sae)
        notes.append("decoder rows were normalised, so that their lengths no longer matter")
    if not spec.is_transcoder and not spec.apply_b_dec_to_input:
        sae = folds.unfold_input_bias(sae)
        notes.append("sparsify subtracts b_dec from the input: b_enc was changed to make up for it")
    spec = sae.spec
    facts = (spec.metadata.get("saesteer") or {}).get("sparsify") or {}
    config: dict[str, Any] = {
        "activation": spec.architecture,
        "expansion_factor": max(1, spec.d_sae // spec.d_model),
        "normalize_decoder": bool(facts.get("normalize_decoder", False)),
        # Explicit: 0 would mean the expansion factor, which need not be whole.
        "num_latents": spec.d_sae,
        "k": spec.k,
        "multi_topk": bool(facts.get("multi_topk", False)),
        "skip_connection": sae.W_skip is not None,
        "transcode": spec.is_transcoder,
        "d_in": spec.d_model,
    }
    tensors = {
        "encoder.weight": sae.W_enc.T,
        "encoder.bias": sae.b_enc,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip
    folder.mkdir(parents=True, exist_ok=True)
    kind = DTYPES[spec.dtype]
    files.write_tensors(folder / WEIGHTS, {key: t.to(kind) for key, t in tensors.items()})
    files.write_json(folder / CFG, config)
    lost = "model, hook and other metadata are not written; the folder's name is the hook point"
    return with_notes(dataclasses.replace(sae, format=name), [*notes, lost])


def _check_widths(place: SAEFiles, config: dict[str, Any], d_model: int, d_sae: int) -> None:
    """Compare the widths that the config states with those of the weights. Raises UserError."""
    stated = config.get("num_latents") or None
    if stated is None and isinstance(config.get("expansion_factor"), int):
        stated = d_model * config["expansion_factor"]
    for key, declared, actual in (
        ("d_in", config.get("d_in", d_model), d_model),
        ("num_latents", d_sae if stated is None else stated, d_sae),
    ):
        if declared != actual:
            raise UserError(
                f"`sae` {place.source}: {CFG} says {key} {declared!r} and the weights have "
                f"{actual}; the config and the weights do not belong together"
            )


def _module(folder: Path) -> str:
    """The hook point in a folder's name; empty when the name is not that of a module."""
    if re.fullmatch(r"seed\d+", folder.name):
        folder = folder.parent
    named = re.fullmatch(r"(layers|h|blocks)\.\d{1,6}(\.[\w.]+)?", folder.name)
    return folder.name if named else ""


def _model(place: SAEFiles) -> str:
    """The model that the run's config.json, one or two folders up, names."""
    for folder in (place.folder.parent, place.folder.parent.parent):
        if (folder / "config.json").is_file():
            upper = SAEFiles(folder, "config.json", place.source)
            return text(upper.config("config.json"), "model")
    return ""
