"""The state that `saesteer train` saves for `--resume`, opened as the SAE it would be, had training
ended there.

A state holds what the optimiser moves, in units of the scaled input, for every SAE of the run, and
their specs. The scale is folded as it is at the end of training, so the weights are to the bit
those that the run would have written at that step. Buffers and moments stay unread.
"""

import dataclasses
from pathlib import Path
from typing import Any

from saesteer.checkpoints import folds, run_state, safe_reading
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.formats.sae_files import SAEFiles, exactly, spec_or_error
from saesteer.checkpoints.sae_spec import ARCHITECTURES, SAESpec
from saesteer.checkpoints.sparse_autoencoder import SAE, tensors_sha256

FOLDER = "state"
_PARAMETERS = ("param.W_enc_rows", "param.b_enc", "param.W_dec", "param.b_dec", "scale.mean")
_NEWEST = "newest"


def find(path: Path, source: str) -> SAEFiles | None:
    """The state that a path means, or None.

    That is a `state` folder or a file in it; with the name of one of several SAEs after it, that
    one. A run's folder means its newest state, the folder of one SAE among several that one's.
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
        # A run's own folder holds other things that are no SAEs: only those there count.
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
    spec = _spec(place, saes[names[at]])
    wanted = {f"{at}/{tensor}": tensor for tensor in _PARAMETERS}
    found = safe_reading.read_safetensors(path, wanted)
    tensors = {wanted[key]: tensor for key, tensor in found.items()}
    exactly(place, tensors, _PARAMETERS)
    factor = scales[at]
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 1e30:
        raise UserError(f"`sae` {place.source}: the state's input scale is {factor!r}; refused")
    F, D = spec.d_sae, spec.d_model
    shapes = dict(zip(_PARAMETERS, [(F, D), (F,), (F, D), (D,), (D,)], strict=True))
    for key, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[key] or not tensor.is_floating_point():
            raise UserError(f"`sae` {place.source}: the state's {key} does not fit its spec")
    folded: dict[str, Any] = folds.fold_centred_scale(
        W_enc=tensors["param.W_enc_rows"].T,
        b_enc=tensors["param.b_enc"],
        W_dec=tensors["param.W_dec"],
        b_dec=tensors["param.b_dec"],
        mean=tensors["scale.mean"],
        factor=float(factor),
    )
    step = meta.get("step")
    sae = SAE(
        spec=spec, **folded, source=place.source, format=name,
        notes=(f"the state of step {step} of its training", "folded the input's scale and mean"),
    )  # fmt: skip
    sae.check(f"`sae` {place.source}")
    return dataclasses.replace(sae, sha256=tensors_sha256(sae.tensors()))


def _spec(place: SAEFiles, saved: dict[str, Any]) -> SAESpec:
    """The spec as it was saved."""
    like = SAESpec(architecture="topk", d_model=1, d_sae=1, k=1, d_out=1)
    for key, value in saved.items():
        empty = value is None and key in ("k", "d_out")
        if type(value) is not type(getattr(like, key, None)) and not empty:
            raise UserError(f"`sae` {place.source}: the state's spec has a wrong {key[:40]!r}")
    if saved.get("architecture") not in ARCHITECTURES:
        raise UserError(f"`sae` {place.source}: the state's SAE is of no architecture known here")
    return spec_or_error(place, **saved)
