"""Where an SAE's files are, and the checks that all readers share."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saesteer.checkpoints import files, safe_reading
from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_spec import DTYPES, SAESpec
from saesteer.checkpoints.sparse_autoencoder import SAE, check_tensors

_NAMES = {kind: name for name, kind in DTYPES.items()}


@dataclass(frozen=True)
class SAEFiles:
    """A folder with an SAE in it, and which file of it holds the weights."""

    folder: Path
    weights: str
    """Name of the weights file, relative to the folder."""
    source: str
    """What the user wrote."""
    part: str = ""
    """Which SAE, where one file holds several."""

    def file(self, name: str) -> Path:
        """The path of a regular file in the folder; see `safe_reading.inner_file`."""
        return safe_reading.inner_file(self.folder, name)

    def has(self, name: str) -> bool:
        """Whether the folder has such an entry; a broken link counts."""
        path = self.folder / name
        return path.exists() or path.is_symlink()

    def config(self, name: str, optional: bool = False) -> dict[str, Any]:
        """The JSON object in a file; empty when it is `optional` and missing."""
        if optional and not self.has(name):
            return {}
        return safe_reading.read_config(self.file(name))

    def weights_file(self) -> Path:
        """The path of the weights file. Raises UserError; see `file`."""
        return self.file(self.weights)


def finish(
    place: SAEFiles,
    name: str,
    spec: SAESpec,
    tensors: Mapping[str, Tensor],
    notes: Iterable[str] = (),
) -> SAE:
    """The SAE of a spec and tensors that a reader made, in the spec's dtype and checked.

    Raises UserError for tensors that do not fit the spec, or hold NaN or infinity.
    """
    kind = DTYPES[spec.dtype]
    # Checked first, because SAE(**tensors) would fail on a wrong name.
    check_tensors(tensors, spec, f"`sae` {place.source}")
    sae = SAE(
        spec=spec,
        **{key: value.to(kind).contiguous() for key, value in tensors.items()},
        source=place.source,
        sha256=files.sha256_file(place.weights_file()),
        format=name,
        notes=tuple(notes),
    )
    return sae.check(f"`sae` {place.source}")


def spec_or_error(place: SAEFiles, **fields: Any) -> SAESpec:
    """`SAESpec(**fields)`; impossible values raise a UserError that names the source."""
    try:
        return SAESpec(**fields)
    except (UsageError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"`sae` {place.source}: its config is wrong: {error}") from error


def matrix(place: SAEFiles, tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """The shape of a float matrix of at least one row and column. Raises UserError."""
    tensor = tensors[name]
    if tensor.dim() != 2 or 0 in tensor.shape or not tensor.is_floating_point():
        raise UserError(
            f"`sae` {place.source}: {name} is {tensor.dtype} of shape {list(tensor.shape)}; a "
            "float matrix is needed"
        )
    return int(tensor.shape[0]), int(tensor.shape[1])


def exactly(
    place: SAEFiles,
    tensors: Mapping[str, Any],
    needed: Iterable[str],
    optional: Iterable[str] = (),
) -> None:
    """Raise UserError unless the names are the needed ones and some of the optional ones."""
    needed = list(needed)
    missing = [name for name in needed if name not in tensors]
    extra = sorted(str(name) for name in tensors if name not in {*needed, *optional})
    if missing or extra:
        raise UserError(
            f"`sae` {place.source}: {place.weights} needs the tensors {', '.join(needed)}; "
            f"missing: {', '.join(missing) or 'none'}; unexpected: "
            f"{', '.join(extra[:8]) or 'none'}"
        )


def all_float(place: SAEFiles, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError for a tensor that is not of one of our float dtypes."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise UserError(
                f"`sae` {place.source}: {name} is {str(tensor.dtype).removeprefix('torch.')}; "
                f"weights are {', '.join(DTYPES)}"
            )


def dtype_name(tensor: Tensor) -> str:
    """Our name of a float tensor's dtype; float32 for any other."""
    return _NAMES.get(tensor.dtype, "float32")


def number(place: SAEFiles, config: Mapping[str, Any], key: str) -> float:
    """A positive, finite number from a config. Raises UserError."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise UserError(f"`sae` {place.source}: {key} must be a positive number, got {value!r}")
    return float(value)


def text(config: Mapping[str, Any], key: str) -> str:
    """A string from a config; empty when it is missing or not a string."""
    value = config.get(key)
    return value if isinstance(value, str) else ""


def scalar(place: SAEFiles, tensors: Mapping[str, Tensor], name: str) -> float:
    """The value of a tensor of one finite number. Raises UserError."""
    tensor = tensors[name]
    if tensor.numel() != 1 or not bool(torch.isfinite(tensor).all()):
        raise UserError(f"`sae` {place.source}: {name} must be one finite number")
    return float(tensor.reshape(()))


def with_notes(sae: SAE, notes: Iterable[str]) -> SAE:
    """A copy that carries more notes."""
    return dataclasses.replace(sae, notes=(*sae.notes, *notes))


def own_facts(**facts: Any) -> dict[str, Any]:
    """Metadata with facts under our own name, those that are not None."""
    return {"saesteer": {key: value for key, value in facts.items() if value is not None}}
