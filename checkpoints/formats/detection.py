"""Finds the format of a folder or file from file names and the tensor names in its header.

No tensor is loaded here.
"""

from collections.abc import Mapping
from pathlib import Path

from saesteer.checkpoints import safe_reading, torch_files
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.formats import (
    dictionary_learning,
    llama_scope,
    saelens,
    saelens_checkpoint,
    sparsify,
    training_state,
    transcoder_layers,
)
from saesteer.checkpoints.formats.sae_files import SAEFiles
from saesteer.checkpoints.safe_reading import TensorInfo

_SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")
# Files that lie next to an SAE but are not one.
_COMPANIONS = {
    "sparsity.safetensors",
    "activation_whitening.safetensors",
    "activations_store_state.safetensors",
    "trainer_state.pt",
    "plan.safetensors",
    "state.pt",
}
_COMPANION_STARTS = ("optimizer", "lr_scheduler", "rank_", "state-", "shard-", "model")
_LLAMA_WEIGHTS = "checkpoints/final.safetensors"
_MOST_NAMES = 10_000

SHAPE = (
    "give a folder with cfg.json and sae_weights.safetensors (SAELens), another format's folder or "
    "weights file, or RELEASE:ID of sae_lens"
)


def detect(path: Path, source: str) -> tuple[str, SAEFiles]:
    """The format of a folder or weights file, and where its files lie.

    Raises UserError when nothing there is an SAE, or when several things are.
    """
    state = training_state.find(path, source)
    if path.is_dir():
        candidates = _candidates(path)
        if state and (not candidates or state.folder == path):
            return "saesteer-state", state
    elif state:
        return "saesteer-state", state
    else:
        # A file in Llama Scope's `checkpoints` belongs to the folder above.
        up = path.parent.name == "checkpoints" and path.parent.parent / llama_scope.HYPERPARAMS
        path, name = (
            (path.parent.parent, _LLAMA_WEIGHTS)
            if up and up.is_file()
            else (path.parent, path.name)
        )
        candidates = [name]
    matches: list[tuple[str, SAEFiles]] = []
    problems: list[UserError] = []
    for name in candidates:
        place = SAEFiles(path, name, source)
        try:
            if kind := _format(place):
                matches.append((kind, place))
        except UserError as error:
            problems.append(error)
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(f"{place.weights} ({kind})" for kind, place in matches[:6])
        raise UserError(f"`sae` {source} holds several SAEs: {names}: give one of the files")
    if problems:
        raise problems[0]
    raise UserError(f"`sae` {source} {_nothing(path, candidates)}")


def _candidates(folder: Path) -> list[str]:
    """Names of files that could hold an SAE's weights."""
    try:
        entries = sorted(
            entry.name
            for _, entry in zip(range(_MOST_NAMES), folder.iterdir(), strict=False)
            if entry.name.endswith(_SUFFIXES) and not entry.is_dir()
        )
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; check the path") from error
    names = [
        name
        for name in entries
        if name not in _COMPANIONS and not name.startswith((*_COMPANION_STARTS, "."))
    ]
    if (folder / llama_scope.HYPERPARAMS).is_file() and (folder / _LLAMA_WEIGHTS).exists():
        names.append(_LLAMA_WEIGHTS)
    return names


def _format(place: SAEFiles) -> str | None:
    """The format of one weights file; None when its tensors are not those of a format we know."""
    path = place.weights_file()
    if path.suffix == ".npz":
        names = {name.lower() for name in safe_reading.npz_header(path)}
        return "gemma-scope" if names & {"w_enc", "w_e"} else None
    if path.suffix == ".safetensors":
        return _safetensors(place, safe_reading.safetensors_header(path))
    if path.suffix in (".pt", ".pth"):
        return _torch(place)
    raise UserError(
        f"`sae` {place.source} is a file that ends in {path.suffix or 'nothing'}; weights end in "
        f"{', '.join(_SUFFIXES)}: {SHAPE}"
    )


def _safetensors(place: SAEFiles, header: Mapping[str, TensorInfo]) -> str | None:
    if place.weights == sparsify.WEIGHTS:
        return "sparsify"
    if "w_enc" in header:
        return "gemma-scope-2"
    if "encoder.weight" in header:
        if "log_jumprelu_threshold" in header:
            return "llama-scope-r1"
        if place.has(llama_scope.HYPERPARAMS):
            return "llama-scope"
        return "sparsify" if "W_dec" in header else None
    if "W_E" in header:
        return "openmoss"
    if "W_dec" not in header and place.weights != saelens.WEIGHTS:
        return None
    if not place.has(saelens.CFG):
        if "W_enc" in header and transcoder_layers.is_here(place):
            return "transcoder-layers"
        raise UserError(
            f"`sae` {place.source} holds no {saelens.CFG}: give a folder in SAELens format "
            f"({saelens.CFG} and {saelens.WEIGHTS})"
        )
    training = "topk_threshold" in header or place.has(saelens_checkpoint.SCALER)
    return "saelens-checkpoint" if training else "saelens"


def _torch(place: SAEFiles) -> str | None:
    content = torch_files.describe_pt(place.weights_file())
    if isinstance(content.get("ae"), dict):
        return "dictionary_learning"
    names = {str(key) for key, value in content.items() if isinstance(value, TensorInfo)}
    if {"pre_bias", "latent_bias"} <= names:
        return "openai"
    if "encoder_linear.weight" in names:
        return "goodfire"
    if {"W_enc", "W_dec"} <= names and not names & {"threshold", "group_sizes"}:
        # A GPT-2 attention SAE has a config next to it; Qwen's has W_enc [d_sae, d_model].
        config_name = place.weights.removesuffix(".pt") + "_cfg.json"
        wide = content["W_enc"].shape
        tall = len(wide) == 2 and wide[0] > wide[1]
        return "gpt2-attention" if place.has(config_name) or not tall else "qwen-scope"
    if names == {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}:
        # The same tensors as dictionary_learning's AutoEncoderNew, which has a config.
        return "dictionary_learning" if place.has(dictionary_learning.CFG) else "deepseek-r1"
    known = {name for class_names in dictionary_learning.CLASSES.values() for name in class_names}
    return "dictionary_learning" if names and names & known else None


def _nothing(folder: Path, candidates: list[str]) -> str:
    """Why a folder is not an SAE, for an error; names sub-folders that may hold SAEs."""
    below = []
    for _, entry in zip(range(_MOST_NAMES), sorted(folder.iterdir()), strict=False):
        if entry.is_dir() and not entry.is_symlink() and _candidates(entry):
            below.append(entry.name)
    if below:
        names = ", ".join(below[:8]) + (", ..." if len(below) > 8 else "")
        return (
            f"holds no SAE itself, but its folders may ({names}): give one of them, such as "
            f"{folder / below[0]}"
        )
    if candidates:
        return f"holds {candidates[0]}, whose tensors are not those of an SAE: {SHAPE}"
    needed = (saelens.CFG, saelens.WEIGHTS)
    missing = [name for name in needed if not (folder / name).exists()]
    return f"holds no {' and no '.join(missing)}: {SHAPE}"
