"""The state that `saesteer train` saves for `--resume`, opened as the SAE that training would have
written at that step.

A state holds the trained parameters of every SAE of the run, in units of the scaled input, and
their specs. The scale is folded as at the end of training, so the weights have the same bits.
Buffers and moments are not read.
"""

import dataclasses
from pathlib import Path
from typing import Any

from saesteer.checkpoints import folds, run_state, safe_reading
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.formats.sae_files import SAEFiles, exactly
from saesteer.checkpoints.sae_spec import SAESpec
from saesteer.checkpoints.sparse_autoencoder import SAE, tensors_sha256
from saesteer.checkpoints.strict_fields import read_fields

FOLDER = "state"
_CANONICAL = {"W_enc_rows": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
"""Which tensor of an SAE each trained parameter is, in states that do not say so: those from before
several architectures could be trained."""
_MORE = ((), ("threshold",), ("log_threshold",), ("b_mag", "r_mag"), ("W_skip", "threshold"))
"""What an SAE may have besides, by architecture."""
_NEWEST = "newest"


def find(path: Path, source: str) -> SAEFiles | None:
    """The state that a path refers to, or None.

    A path is a `state` folder or a file in it, perhaps followed by the name of one of several SAEs.
    A run's folder means its newest state; the folder of one of its SAEs, that SAE in it.
    """
    path = path.absolute()
    if run_state.is_state_file(path):
        return SAEFiles(path.parent, path.name, source)
    for folder in (path, path / FOLDER):
        if run_state.has_state(folder.parent) and folder.name == FOLDER:
            return SAEFiles(folder, _NEWEST, source)
    above = path.parent
    if run_state.is_state_file(above):
        return SAEFiles(above.parent, above.name, source, part=path.name)
    for folder in (above, above / FOLDER):
        # A run's folder also holds folders that are not SAEs: those of SAEs have a log.
        if run_state.has_state(folder.parent) and folder.name == FOLDER:
            if folder == above or (path / "metrics.jsonl").is_file():
                return SAEFiles(folder, _NEWEST, source, part=path.name)
    return None


def read(name: str, place: SAEFiles) -> SAE:
    """The SAE of a state, on raw activations.

    Raises UserError for a damaged state, one from before states named their SAEs, and where several
    SAEs are in it and the path names none.
    """
    path, meta = run_state.find_state(place.folder, place.weights)
    saes: Any = meta.get("saes")
    scales: Any = meta.get("scales")
    lists = isinstance(saes, dict) and isinstance(scales, list) and len(saes) == len(scales)
    if not lists or not all(isinstance(spec, dict) for spec in saes.values()):
        raise UserError(
            f"`sae` {place.source}: the state does not say what its SAEs are; resume its run with "
            "this saesteer, which saves a state that does"
        )
    names = list(saes)
    if place.part not in names and (place.part or len(names) != 1):
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        raise UserError(
            f"`sae` {place.source}: the state holds the SAEs {shown}: give one as "
            f"{place.folder}/NAME"
        )
    at = names.index(place.part) if place.part else 0
    spec = read_fields(SAESpec, saes[names[at]], f"`sae` {place.source}: the state's spec")
    canonical = _canonical_names(place, meta, names[at])
    factors = _factors(place, scales[at])
    means = [f"scale.mean.{i}" if i else "scale.mean" for i in range(len(factors))]
    wanted = {f"{at}/{tensor}": tensor for tensor in (*map(_saved_as, canonical), *means)}
    loaded = safe_reading.read_safetensors(path, wanted)
    tensors = {wanted[key]: tensor for key, tensor in loaded.items()}
    exactly(place, tensors, tuple(wanted.values()))
    widths = [tensors[name].numel() for name in means]
    read, write = _read_and_written(place, spec, widths)
    F, D, out = spec.d_sae, spec.d_model, spec.d_out or spec.d_model
    shapes = {"W_enc": (F, D), "W_dec": (F, out), "b_dec": (out,), "W_skip": (out, D)}
    trained = {ours: tensors[_saved_as(name)] for name, ours in canonical.items()}
    for ours, tensor in trained.items():
        if tuple(tensor.shape) != shapes.get(ours, (F,)) or not tensor.is_floating_point():
            raise UserError(f"`sae` {place.source}: the state's {ours} does not fit its spec")
    scaled = [(tensors[name], factor) for name, factor in zip(means, factors, strict=True)]
    folded: dict[str, Any] = folds.fold_centred_scale(
        trained, [scaled[i] for i in read], [scaled[i] for i in write]
    )
    step = meta.get("step")
    sae = SAE(
        spec=spec,
        **folded,
        source=place.source,
        format=name,
        notes=(f"the state of step {step} of its training", "folded the input's scale and mean"),
    )
    sae.check(f"`sae` {place.source}")
    return dataclasses.replace(sae, sha256=tensors_sha256(sae.tensors()))


def _saved_as(name: str) -> str:
    """The tensor of a parameter; what was measured and not optimised has the word in its name."""
    return name if name.startswith("buffer.") else f"param.{name}"


def _canonical_names(place: SAEFiles, meta: dict[str, Any], sae: str) -> dict[str, str]:
    """The tensor of an SAE that each trained parameter is, by the parameter's name."""
    stated = meta.get("canonical", {})
    names = stated.get(sae, _CANONICAL) if isinstance(stated, dict) else None
    needed = sorted(_CANONICAL.values())
    known = [sorted([*needed, *more]) for more in _MORE]
    if not isinstance(names, dict) or sorted(map(str, names.values())) not in known:
        raise UserError(f"`sae` {place.source}: the state's SAE has parameters not known here")
    return {str(name): str(ours) for name, ours in names.items()}


def _factors(place: SAEFiles, saved: Any) -> list[float]:
    """The input scale of each place that the SAE reads or writes."""
    factors = saved if isinstance(saved, list) and saved else [saved]
    for factor in factors:
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 1e30:
            raise UserError(f"`sae` {place.source}: the state's input scale is {factor!r}; refused")
    return [float(factor) for factor in factors]


def _read_and_written(
    place: SAEFiles, spec: SAESpec, widths: list[int]
) -> tuple[list[int], list[int]]:
    """The numbers of the state's places that the SAE reads, and of those that it writes.

    The places that it reads come first in the state. Raises UserError for widths that do not fit.
    """
    numbers = list(range(len(widths)))
    ends = [sum(widths[:i]) for i in range(1, len(widths) + 1)]
    split = ends.index(spec.d_model) + 1 if spec.d_model in ends else 0
    read, rest = numbers[:split], numbers[split:]
    write = rest if spec.is_transcoder else read
    if not read or sum(widths[i] for i in write) != (spec.d_out or spec.d_model):
        raise UserError(f"`sae` {place.source}: the state's input scales do not fit its spec")
    return read, write
