"""SAELens: `cfg.json` and `sae_weights.safetensors`, from before version 6 and since.

Also our own format, which is the same layout with more architectures: a transcoder's name ends in
`_transcoder`, and `_skip` comes before it when there is a skip connection, as SAELens names the
ones that it has ("transcoder", "skip_transcoder", "jumprelu_skip_transcoder").
"""

import math
from collections.abc import Mapping
from importlib import metadata as installed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saesteer.checkpoints import files, safe_reading
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.formats.sae_files import (
    SAEFiles,
    all_float,
    finish,
    spec_or_error,
    with_notes,
)
from saesteer.checkpoints.sae_spec import ARCHITECTURES, DTYPES, TOPK_FAMILY, SAESpec
from saesteer.checkpoints.sparse_autoencoder import SAE, check_tensors

CFG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"

SAELENS_ARCHITECTURES = (
    "standard", "gated", "jumprelu", "topk", "abstopk", "matching_pursuit",
    "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder",
)  # fmt: skip
"""What `sae_lens.SAE.load_from_disk` opens and this package computes."""

BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
"""Training architectures whose finished SAE is a jumprelu."""

_REFUSED = {
    "temporal": "holds attention layers",
}

# The top-level keys of a file from before version 6 that SAELens keeps as metadata.
_OLD_METADATA = (
    "model_name", "hook_name", "model_class_name", "hook_head_index",
    "model_from_pretrained_kwargs", "prepend_bos", "exclude_special_tokens", "neuronpedia_id",
    "context_size", "seqpos_slice", "dataset_path", "sae_lens_version",
    "sae_lens_training_version", "hook_name_out", "hook_head_index_out", "hf_hook_name",
    "hf_hook_name_out",
)  # fmt: skip
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}


def read(name: str, place: SAEFiles) -> SAE:
    """A finished SAE. Every tensor is cast to the dtype that cfg.json states, as SAELens does."""
    config, notes = modern_config(place.config(CFG), place.source)
    tensors = safe_reading.read_safetensors(place.weights_file())
    return from_parts(name, place, config, tensors, notes)


def from_parts(
    name: str, place: SAEFiles, config: dict[str, Any], tensors: dict[str, Tensor], notes: list[str]
) -> SAE:
    """The SAE of a config in the manner of SAELens 6 and the tensors beside it."""
    all_float(place, tensors)
    spec = spec_from_config(config, place.source)
    return finish(place, name, spec, own_names(tensors, spec, place.source), notes)


def modern_config(config: dict[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """A config as SAELens 6 writes it, made of an older one the way SAELens does it; and notes."""
    metadata = config.get("metadata")
    version = config.get("sae_lens_version")
    if not version and isinstance(metadata, dict):
        version = metadata.get("sae_lens_version")
    major = str(version).split(".")[0]
    if major.isdigit() and int(major) >= 6:
        if metadata is not None and not isinstance(metadata, dict):
            raise UserError(f"`sae` {source}: metadata in {CFG} is no JSON object; restore it")
        return {**config, "metadata": dict(metadata or {})}, []
    new = {_OLD_NAMES.get(key, key): value for key, value in config.items()}
    arguments = new.get("activation_fn_kwargs")
    k = arguments.get("k") if isinstance(arguments, dict) else None
    new.setdefault("architecture", "standard")
    if new.get("activation_fn") == "topk" and k is not None:
        new["architecture"] = "topk"
    if new["architecture"] == "topk" and k is not None:
        new["k"] = k
    activation = new.get("activation_fn", "relu")
    if activation not in ("relu", "topk"):
        raise UserError(
            f"`sae` {source} has activation_fn {activation!r}; relu and topk are read: choose "
            "another SAE"
        )
    if isinstance(new.get("normalize_activations"), bool):
        new["normalize_activations"] = (
            "expected_average_only_in" if new["normalize_activations"] else "none"
        )
    if "reshape_activations" not in new:
        hook_z = "hook_z" in str(new.get("hook_name", ""))
        new["reshape_activations"] = "hook_z" if hook_z else "none"
    new.setdefault("prepend_bos", True)
    new["metadata"] = {key: new[key] for key in _OLD_METADATA if key in new}
    return new, [f"cfg.json is from SAELens {version or 'before 6'}, read by its older rules"]


def spec_from_config(config: Mapping[str, Any], source: str) -> SAESpec:
    """The spec of a config as SAELens 6 writes it. Raises UserError for what cannot be."""
    place = SAEFiles(Path(), WEIGHTS, source)
    named = config.get("architecture")
    for key in ("normalize_activations", "reshape_activations", "dtype"):
        if not isinstance(config.get(key) or "", str):
            raise UserError(
                f"`sae` {source}: {CFG} is wrong: {key} must be a text, got {config[key]!r:.60}"
            )
    if not isinstance(named, str):
        named = f"{named!r:.60}"
    if named in BATCH_TOPK:
        named = "jumprelu"
    if named in _REFUSED:
        raise UserError(
            f"`sae` {source} has architecture {named!r}, which {_REFUSED[named]} and is not "
            "read: choose another SAE"
        )
    architecture, transcoder = _base(str(named))
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"`sae` {source} has architecture {named!r}; we read {', '.join(ARCHITECTURES)} and "
            "their transcoders: choose another SAE"
        )
    absent = [key for key in ("d_in", "d_sae", "dtype") if key not in config]
    if transcoder and "d_out" not in config:
        absent.append("d_out")
    if absent:
        raise UserError(f"`sae` {source}: {CFG} lacks {', '.join(absent)}; restore the file")
    metadata = dict(config["metadata"])
    normalization = config.get("normalize_activations") or "none"
    if normalization == "covariance_whitening":
        normalization = "none"  # in training only, as the average norm is
    counted = architecture in (*TOPK_FAMILY, "groupmax")
    whole = {"d_model": config["d_in"], "d_sae": config["d_sae"]}
    whole |= {"d_out": config["d_out"]} if transcoder else {}
    whole |= {"k": config["k"]} if counted and config.get("k") is not None else {}
    pursuit = _pursuit(config, source) if architecture == "matching_pursuit" else {}
    if pursuit.get("max_iterations") is not None:
        whole["max_iterations"] = pursuit.pop("max_iterations")
    for key, value in whole.items():
        whole_float = isinstance(value, float) and value.is_integer()
        if isinstance(value, bool) or not (isinstance(value, int) or whole_float):
            raise UserError(
                f"`sae` {source}: {CFG} is wrong: {key} must be a whole number, got {value!r:.60}"
            )
    return spec_or_error(
        place,
        architecture=architecture,
        **{key: int(value) for key, value in whole.items()},
        **pursuit,
        apply_b_dec_to_input=bool(config.get("apply_b_dec_to_input", not transcoder)),
        normalize_activations=normalization,
        reshape_activations=config.get("reshape_activations") or "none",
        rescale_acts_by_decoder_norm=architecture in TOPK_FAMILY
        and bool(config.get("rescale_acts_by_decoder_norm", False)),
        dtype=str(config["dtype"]).removeprefix("torch."),
        hook_name=_popped(metadata, "hook_name"),
        hf_hook_name=_popped(metadata, "hf_hook_name"),
        model_name=_popped(metadata, "model_name"),
        metadata=metadata,
    )


def _pursuit(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """When a matching pursuit ends; SAELens' defaults where the file does not say."""
    threshold = config.get("residual_threshold", 1e-2)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise UserError(
            f"`sae` {source}: {CFG} is wrong: residual_threshold must be a number, got "
            f"{threshold!r:.60}"
        )
    return {
        "residual_threshold": float(threshold) if abs(threshold) < 1e300 else math.inf,
        "max_iterations": config.get("max_iterations"),
        "stop_on_duplicate_support": bool(config.get("stop_on_duplicate_support", True)),
    }


def own_names(tensors: Mapping[str, Tensor], spec: SAESpec, source: str) -> dict[str, Tensor]:
    """The tensors of a SAELens file by the names of our fields."""
    found = dict(tensors)
    scaling = found.pop("scaling_factor", None)
    if scaling is None:
        scaling = found.pop("finetuning_scaling_factor", None)
    if scaling is not None and not torch.allclose(scaling.float(), torch.ones(scaling.shape)):
        raise UserError(
            f"`sae` {source} has a scaling_factor for each latent that is not 1, which is not read:"
            " choose another SAE"
        )
    if spec.architecture == "jumprelu" and "log_threshold" in found and "threshold" not in found:
        found["threshold"] = found.pop("log_threshold").exp()
    tied = spec.architecture == "matching_pursuit" and not {"W_enc", "b_enc"} & found.keys()
    if tied and "W_dec" in found and found["W_dec"].dim() == 2:
        found["W_enc"] = found["W_dec"].T.contiguous()
        found["b_enc"] = found["W_dec"].new_zeros(len(found["W_dec"]))
        if not spec.apply_b_dec_to_input and "b_dec" in found:
            found["b_dec"] = torch.zeros_like(found["b_dec"])  # SAELens never adds it then
    if spec.architecture == "gated" and "b_gate" in found and "b_enc" not in found:
        found["b_enc"] = found.pop("b_gate")
    return found


def saelens_name(sae: SAE) -> str:
    """The architecture's name in cfg.json."""
    name = str(sae.spec.architecture)
    skip = "_skip" if sae.W_skip is not None else ""
    if not sae.spec.is_transcoder:
        return name + skip
    return f"{'' if name == 'standard' else name}{skip}_transcoder".removeprefix("_")


def write(name: str, sae: SAE, folder: Path) -> SAE:
    """Write the layout; for `saelens`, only what SAELens computes as we do."""
    notes: list[str] = []
    if name == "saelens":
        if saelens_name(sae) not in SAELENS_ARCHITECTURES:
            raise UserError(
                f"SAELens has no architecture for this SAE ({saelens_name(sae)}): use `format` "
                "saesteer"
            )
        if sae.spec.is_transcoder and sae.spec.reshape_activations != "none":
            raise UserError("SAELens reshapes no heads for transcoders: use `format` saesteer")
        if sae.spec.normalize_activations == "expected_average_only_in":
            notes.append("normalize_activations says expected_average_only_in: nothing is scaled")
        if sae.spec.centers_input:
            notes.append(
                "SAELens leaves it to the caller to subtract each token's mean "
                "(center_writing_weights)"
            )
    save(folder, sae)
    return with_notes(sae, notes)


def save(folder: Path, sae: SAE) -> str:
    """Write cfg.json and the weights of a checked SAE; returns the weights file's SHA-256."""
    spec = sae.spec
    tensors = {key: tensor.detach().to(DTYPES[spec.dtype]) for key, tensor in sae.tensors().items()}
    check_tensors(tensors, spec, f"the SAE for {folder}")
    config: dict[str, Any] = {
        "architecture": saelens_name(sae),
        "d_in": spec.d_model,
        "d_sae": spec.d_sae,
        "dtype": spec.dtype,
        "device": "cpu",
        "apply_b_dec_to_input": spec.apply_b_dec_to_input,
        "normalize_activations": spec.normalize_activations,
        "reshape_activations": spec.reshape_activations,
    }
    if spec.is_transcoder:
        config["d_out"] = spec.d_out
    if spec.architecture in (*TOPK_FAMILY, "groupmax"):
        config["k"] = spec.k
    if spec.architecture in TOPK_FAMILY:
        config["rescale_acts_by_decoder_norm"] = spec.rescale_acts_by_decoder_norm
    if spec.architecture == "matching_pursuit":
        for key in ("residual_threshold", "max_iterations", "stop_on_duplicate_support"):
            config[key] = getattr(spec, key)
        del tensors["W_enc"], tensors["b_enc"]  # they are the decoder's
    config["metadata"] = {
        "hook_head_index": None,
        **spec.metadata,
        # Without this key SAELens reads the file as one from before version 6.
        "sae_lens_version": installed.version("sae-lens"),
        "model_name": spec.model_name,
        "hook_name": spec.hook_name,
        "hf_hook_name": spec.hf_hook_name,
    }
    if spec.architecture == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
    folder.mkdir(parents=True, exist_ok=True)
    files.write_tensors(folder / WEIGHTS, tensors)
    files.write_json(folder / CFG, config)
    return files.sha256_file(folder / WEIGHTS)


def _base(name: str) -> tuple[str, bool]:
    """("jumprelu", True) of "jumprelu_skip_transcoder"; "standard" goes without saying there."""
    if name == "transcoder":
        return "standard", True
    transcoder = name.endswith("_transcoder")
    base = name.removesuffix("_transcoder")
    if base == "skip" and transcoder:
        return "standard", True
    return base.removesuffix("_skip"), transcoder


def _popped(metadata: dict[str, Any], key: str) -> str:
    value = metadata.pop(key, None)
    return value if isinstance(value, str) else ""
