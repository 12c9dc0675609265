"""SAELens: `cfg.json` and `sae_weights.safetensors`, of version 6 and of older ones.

Also our own format, which is the same layout with more architectures: a transcoder's name ends in
`_transcoder`, and `_skip` comes before it when there is a skip connection, as SAELens names the
ones that it has ("transcoder", "skip_transcoder", "jumprelu_skip_transcoder").
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
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
from saesteer.checkpoints.strict_fields import read_fields

CFG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"

SAELENS_ARCHITECTURES = (
    "standard",
    "gated",
    "jumprelu",
    "topk",
    "abstopk",
    "matching_pursuit",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)
"""What `sae_lens.SAE.load_from_disk` opens and this package computes."""

BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
"""Training architectures whose finished SAE is a jumprelu."""

_REFUSED = {
    "temporal": "holds attention layers",
}

# The top-level keys of a file from before version 6 that SAELens keeps as metadata.
_OLD_METADATA = (
    "model_name",
    "hook_name",
    "model_class_name",
    "hook_head_index",
    "model_from_pretrained_kwargs",
    "prepend_bos",
    "exclude_special_tokens",
    "neuronpedia_id",
    "context_size",
    "seqpos_slice",
    "dataset_path",
    "sae_lens_version",
    "sae_lens_training_version",
    "hook_name_out",
    "hook_head_index_out",
    "hf_hook_name",
    "hf_hook_name_out",
)
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
    """The SAE of a config as SAELens 6 writes it and its tensors."""
    all_float(place, tensors)
    spec = spec_from_config(config, place.source)
    return finish(place, name, spec, own_names(tensors, spec, place.source), notes)


def modern_config(config: dict[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """The config as SAELens 6 writes it (an older one is converted as SAELens does), and notes."""
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


@dataclass(frozen=True, kw_only=True)
class _Config:
    """The fields of a cfg.json that are read; the defaults are those of SAELens."""

    architecture: str
    d_in: int
    d_sae: int
    dtype: str
    d_out: int | None = None
    k: int | None = None
    apply_b_dec_to_input: bool | None = None
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    rescale_acts_by_decoder_norm: bool = False
    residual_threshold: float = 1e-2
    max_iterations: int | None = None
    stop_on_duplicate_support: bool = True


def spec_from_config(config: Mapping[str, Any], source: str) -> SAESpec:
    """The spec of a config as SAELens 6 writes it. Raises UserError for impossible values."""
    known = [field.name for field in fields(_Config)]
    given = {key: config[key] for key in known if config.get(key) is not None}
    for key, value in given.items():
        if isinstance(value, float) and value.is_integer() and key != "residual_threshold":
            given[key] = int(value)
    read = read_fields(_Config, given, f"`sae` {source}: {CFG}")
    named = "jumprelu" if read.architecture in BATCH_TOPK else read.architecture
    if named in _REFUSED:
        raise UserError(
            f"`sae` {source} has architecture {named!r}, which {_REFUSED[named]} and is not "
            "read: choose another SAE"
        )
    architecture, transcoder = _base(named)
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"`sae` {source} has architecture {named!r:.60}; we read {', '.join(ARCHITECTURES)} "
            "and their transcoders: choose another SAE"
        )
    if transcoder and read.d_out is None:
        raise UserError(f"`sae` {source}: {CFG}: key 'd_out' is missing; a transcoder has one")
    pursuit = {}
    if architecture == "matching_pursuit":
        names = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")
        pursuit = {name: getattr(read, name) for name in names}
    metadata = dict(config["metadata"])
    own_input = read.apply_b_dec_to_input
    # Whitening happens in training only, as the average norm does.
    whitened = read.normalize_activations == "covariance_whitening"
    return spec_or_error(
        SAEFiles(Path(), WEIGHTS, source),
        architecture=architecture,
        d_model=read.d_in,
        d_sae=read.d_sae,
        d_out=read.d_out if transcoder else None,
        k=read.k if architecture in (*TOPK_FAMILY, "groupmax") else None,
        **pursuit,
        apply_b_dec_to_input=not transcoder if own_input is None else own_input,
        normalize_activations="none" if whitened else read.normalize_activations,
        reshape_activations=read.reshape_activations,
        rescale_acts_by_decoder_norm=architecture in TOPK_FAMILY
        and read.rescale_acts_by_decoder_norm,
        dtype=read.dtype.removeprefix("torch."),
        hook_name=_popped(metadata, "hook_name"),
        hf_hook_name=_popped(metadata, "hf_hook_name"),
        model_name=_popped(metadata, "model_name"),
        metadata=metadata,
    )


def own_names(tensors: Mapping[str, Tensor], spec: SAESpec, source: str) -> dict[str, Tensor]:
    """The tensors of a SAELens file by the names of our fields."""
    renamed = dict(tensors)
    scaling = renamed.pop("scaling_factor", None)
    if scaling is None:
        scaling = renamed.pop("finetuning_scaling_factor", None)
    if scaling is not None and not torch.allclose(scaling.float(), torch.ones(scaling.shape)):
        raise UserError(
            f"`sae` {source} has a scaling_factor for each latent that is not 1, which is not read:"
            " choose another SAE"
        )
    if (
        spec.architecture == "jumprelu"
        and "log_threshold" in renamed
        and "threshold" not in renamed
    ):
        renamed["threshold"] = renamed.pop("log_threshold").exp()
    tied = spec.architecture == "matching_pursuit" and not {"W_enc", "b_enc"} & renamed.keys()
    if tied and "W_dec" in renamed and renamed["W_dec"].dim() == 2:
        renamed["W_enc"] = renamed["W_dec"].T.contiguous()
        renamed["b_enc"] = renamed["W_dec"].new_zeros(len(renamed["W_dec"]))
        if not spec.apply_b_dec_to_input and "b_dec" in renamed:
            renamed["b_dec"] = torch.zeros_like(renamed["b_dec"])  # SAELens does not add it then
    if spec.architecture == "gated" and "b_gate" in renamed and "b_enc" not in renamed:
        renamed["b_enc"] = renamed.pop("b_gate")
    return renamed


def saelens_name(sae: SAE) -> str:
    """The architecture's name in cfg.json."""
    name = str(sae.spec.architecture)
    skip = "_skip" if sae.W_skip is not None else ""
    if not sae.spec.is_transcoder:
        return name + skip
    return f"{'' if name == 'standard' else name}{skip}_transcoder".removeprefix("_")


def write(name: str, sae: SAE, folder: Path) -> SAE:
    """Write an SAE in this layout; as `saelens` only if SAELens computes the same.

    Raises UserError for an SAE that SAELens does not compute.
    """
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
    """The architecture, and whether it is a transcoder: ("jumprelu", True) for
    "jumprelu_skip_transcoder", ("standard", True) for "transcoder"."""
    if name == "transcoder":
        return "standard", True
    transcoder = name.endswith("_transcoder")
    base = name.removesuffix("_transcoder")
    if base == "skip" and transcoder:
        return "standard", True
    return base.removesuffix("_skip"), transcoder


def _popped(metadata: dict[str, Any], key: str) -> str:
    """Remove a key; returns its value if that is a string, else an empty string."""
    value = metadata.pop(key, None)
    return value if isinstance(value, str) else ""
