"""SAE file formats: one module each, with `read` and, for formats that we write, `write`.

`read(place)` gives an `SAE` that computes what the format's own code computes. `write(folder, sae)`
first rewrites an SAE into the form that the format can express, by the identities of
`saesteer.checkpoints.folds`, and refuses one that it cannot express.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from saesteer.checkpoints.errors import none_of
from saesteer.checkpoints.formats.sae_files import SAEFiles
from saesteer.checkpoints.sparse_autoencoder import SAE

READERS: dict[str, str] = {
    "saelens": "saelens",
    "saelens-checkpoint": "saelens_checkpoint",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning",
    "gemma-scope": "gemma_scope",
    "gemma-scope-2": "gemma_scope",
    "llama-scope": "llama_scope",
    "llama-scope-r1": "llama_scope",
    "openmoss": "openmoss",
    "openai": "openai",
    "goodfire": "linear_layers",
    "deepseek-r1": "linear_layers",
    "qwen-scope": "qwen_scope",
    "gpt2-attention": "linear_layers",
    "transcoder-layers": "transcoder_layers",
    "saesteer-state": "training_state",
}
"""Each format, and the module in this folder that reads it."""

WRITERS: dict[str, str] = {
    "saelens": "saelens",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning",
    "saesteer": "saelens",
}
"""Each format that we write, and the module in this folder that does. `saesteer` is the layout of
SAELens, extended to the architectures that SAELens does not have."""


def read(name: str, place: SAEFiles) -> SAE:
    """Read the SAE in some files whose format is known; see `detection.detect`.

    Raises UserError for files that are damaged or that the format's reader does not accept.
    """
    reader: Callable[[str, SAEFiles], SAE] = import_module(f"{__name__}.{READERS[name]}").read
    return reader(name, place)


def write(name: str, sae: SAE, folder: Path) -> SAE:
    """Write an SAE in a format and return it as written, notes on what changed included.

    Raises UsageError for an unknown format and UserError for an SAE that it cannot express.
    """
    if name not in WRITERS:
        raise none_of("`format`", WRITERS, name)
    writer: Callable[[str, SAE, Path], SAE] = import_module(f"{__name__}.{WRITERS[name]}").write
    return writer(name, sae, folder)
