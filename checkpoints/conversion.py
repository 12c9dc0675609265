"""Convert an SAE of any format into one that we write, and measure how well the two agree.

The written files are read back and compared with the source before they get their final name.
"""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints import files, folds, formats
from saesteer.checkpoints.errors import UserError, none_of
from saesteer.checkpoints.model_files import quiet
from saesteer.checkpoints.sae_file import load_sae
from saesteer.checkpoints.sae_spec import DTYPES
from saesteer.checkpoints.saelens_releases import SAELensMissing, import_sae_lens
from saesteer.checkpoints.sparse_autoencoder import SAE

RANDOM_ROWS = 256
REAL_ROWS = 2048
# Most float64 latents held at once.
_CHUNK_NUMBERS = 2**23
# Folding rounds each weight once, so only rounding may differ: 1e-4 for float32, and for narrower
# dtypes a few of their own rounding steps.
_LEAST_TOLERANCE = 1e-4
_STEPS = 8


def convert(
    source: str | Path,
    target: str | Path | None,
    format: str = "saelens",
    *,
    dtype: str | None = None,
    canonical: bool = False,
    jumprelu: bool = False,
    activations: Float[Tensor, "rows d_model"] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Read an SAE, write it in another format, read that back and compare; returns the report.

    In format `saelens` the result is also opened with sae_lens, if that can be imported.

    `target` is a folder that is empty or does not exist yet; with None the conversion is only
    checked. `canonical` first folds to unit decoder rows and no input bias; `jumprelu` writes a
    gated or ReLU SAE in its exact form as a jumprelu. `activations` are real ones to compare on, in
    addition to random ones.

    The report holds `source`, `format_from`, `format_to`, `spec`, `tensors` (their map), `notes`
    (what was folded, assumed or lost) and, for `random` and `real` rows, what `compare` returns.

    Raises:
        UserError: a source that cannot be read, a format that cannot say what it computes, or files
            that do not agree with it (nothing is written then).
        UsageError: an unknown format or dtype.
    """
    if format not in formats.WRITERS:
        raise none_of("`format`", formats.WRITERS, format)
    before = load_sae(source)
    changed, units = before, torch.ones(before.spec.d_sae, dtype=torch.float64)
    if jumprelu:
        changed = folds.as_jumprelu(changed)
    if canonical:
        changed = folds.canonical(changed)
        if not before.spec.rescale_acts_by_decoder_norm:
            units = _row_lengths(before) / _row_lengths(changed)
    if dtype is not None:
        changed = changed.to(dtype=dtype)
    place = Path(target) if target is not None else None
    parent = place.parent if place is not None else Path(tempfile.gettempdir())
    with files.writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".convert.", suffix=".tmp", dir=parent))
    try:
        written = formats.write(format, changed, draft)
        after = load_sae(draft)
        tolerance = _tolerance(before, after)
        report = _describe(before, written, after, format)
        rows = random_rows(before, seed)
        report["random"] = compare(before, after, rows, units)
        if activations is not None:
            if activations.shape[-1] != before.spec.d_model:
                raise UserError(
                    f"`activations` have width {activations.shape[-1]} and `source` {source} reads "
                    f"{before.spec.d_model}: give activations of its own site"
                )
            report["real"] = compare(before, after, activations[:REAL_ROWS].double(), units)
        if format == "saelens":
            try:
                report["sae_lens"] = _as_saelens_reads(draft, after, rows)
            except SAELensMissing as error:
                report["notes"].append(f"not compared with sae_lens: {error}")
        report["tolerance"] = tolerance
        _refuse_differences(report, tolerance, source)
        if place is not None:
            _put(draft, place)
        return report
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def compare(
    before: SAE,
    after: SAE,
    x: Float[Tensor, "rows d_model"],
    units: Float[Tensor, " d_sae"] | None = None,
) -> dict[str, float]:
    """How far two SAEs differ on `x`, both computed in float64 so that only weights count.

    - `latents_max`, `latents_mean`: |delta f| where both or neither are active;
    - `latents_relative`: the same, each row divided by its largest pre-activation;
    - `flips`, `flips_share`: latents active in one of the two, and their share of the active;
    - `reconstruction_max`, `reconstruction_mean`: |delta x_hat|;
    - `reconstruction_relative`: the largest |delta x_hat| of a row without flips divided by the
      row's largest |x_hat|;
    - `l0_before`, `l0_after`; `rows`.

    `units` multiplies the latents of `before` first.
    """
    before, after = before.to(dtype="float64"), after.to(dtype="float64")
    units = torch.ones(before.spec.d_sae, dtype=torch.float64) if units is None else units
    largest = dict.fromkeys(("latents_max", "latents_relative"), 0.0)
    largest |= dict.fromkeys(("reconstruction_max", "reconstruction_relative"), 0.0)
    sums = dict.fromkeys(("latents", "reconstruction", "flips", "before", "after"), 0.0)
    step = max(1, _CHUNK_NUMBERS // before.spec.d_sae)
    for rows in x.double().split(step):
        acts, new_acts = before.encode(rows) * units, after.encode(rows)
        flipped = (acts != 0) != (new_acts != 0)
        acts_gap = torch.where(flipped, 0.0, (acts - new_acts).abs())
        scale = (before.pre_acts(rows) * units).abs().amax(dim=1).clamp(min=1e-30)
        output, new_output = before.reconstruct(rows), after.reconstruct(rows)
        output_gap = (output - new_output).abs()
        same_latents = ~flipped.any(dim=1)
        relative = output_gap.amax(dim=1) / output.abs().amax(dim=1).clamp(min=1e-30)
        chunk_largest = {
            "latents_max": acts_gap.max(),
            "latents_relative": (acts_gap.amax(dim=1) / scale).max(),
            "reconstruction_max": output_gap.max(),
            "reconstruction_relative": (
                relative[same_latents].max() if bool(same_latents.any()) else 0.0
            ),
        }
        largest = {name: max(value, float(chunk_largest[name])) for name, value in largest.items()}
        for name, value in (
            ("latents", acts_gap.sum()),
            ("reconstruction", output_gap.sum()),
            ("flips", flipped.sum()),
            ("before", (acts != 0).sum()),
            ("after", (new_acts != 0).sum()),
        ):
            sums[name] += float(value)
    count = max(1, len(x))
    width = before.spec.d_out or before.spec.d_model
    return {
        **largest,
        "latents_mean": sums["latents"] / (count * before.spec.d_sae),
        "reconstruction_mean": sums["reconstruction"] / (count * width),
        "flips": sums["flips"],
        "flips_share": sums["flips"] / max(1.0, sums["before"]),
        "l0_before": sums["before"] / count,
        "l0_after": sums["after"] / count,
        "rows": float(len(x)),
    }


def random_rows(sae: SAE, seed: int = 0, rows: int = RANDOM_ROWS) -> Float[Tensor, "rows d_model"]:
    """Gaussian rows around the SAE's bias, of four sizes from a tenth to a hundred times its own.

    The file does not say how large real activations are, so several sizes are tried.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, sae.spec.d_model, generator=generator, dtype=torch.float64)
    centre = torch.zeros(sae.spec.d_model, dtype=torch.float64)
    if not sae.spec.is_transcoder:
        centre = sae.b_dec.detach().cpu().double()
    size = float(centre.square().mean().sqrt()) or 1.0
    sizes = torch.tensor([0.1, 1.0, 10.0, 100.0], dtype=torch.float64).repeat(rows // 4 + 1)
    return centre + noise * size * sizes[:rows, None]


def _describe(before: SAE, written: SAE, after: SAE, format: str) -> dict[str, Any]:
    spec = after.spec
    return {
        "source": before.source,
        "sha256_from": before.sha256,
        "sha256_to": after.sha256,
        "format_from": before.format,
        "format_to": format,
        "dtype_from": before.spec.dtype,
        "dtype_to": spec.dtype,
        "spec": {
            name: value
            for name, value in dataclasses.asdict(spec).items()
            if name != "metadata" and value not in ("", None)
        },
        "tensors": {name: list(tensor.shape) for name, tensor in after.tensors().items()},
        "notes": list(written.notes),
    }


def _as_saelens_reads(folder: Path, after: SAE, x: Tensor) -> dict[str, Any]:
    """How far the written SAE, opened and computed by sae_lens, differs from ours on `x`."""
    sae_lens = import_sae_lens()
    with quiet():
        theirs = sae_lens.SAE.load_from_disk(folder, device="cpu", dtype="float64")
    if after.spec.reshape_activations != "none":
        # Our rows are flat already.
        theirs.turn_off_forward_pass_hook_z_reshaping()
    if after.spec.centers_input:
        x = x - x.mean(dim=-1, keepdim=True)
    ours = after.to(dtype="float64")
    with torch.no_grad():
        acts, their_acts = ours.encode(x), theirs.encode(x)
        scale = ours.pre_acts(x).abs().amax(dim=1).clamp(min=1e-30)
        output, their_output = ours.reconstruct(x), theirs(x)
        output_gap = (output - their_output).abs().amax(dim=1)
        relative = output_gap / output.abs().amax(dim=1).clamp(min=1e-30)
        return {
            "version": version("sae-lens"),
            "latents_relative": float(((acts - their_acts).abs().amax(dim=1) / scale).max()),
            "reconstruction_relative": float(relative.max()),
        }


def _tolerance(before: SAE, after: SAE) -> float:
    eps = max(torch.finfo(DTYPES[sae.spec.dtype]).eps for sae in (before, after))
    return max(_LEAST_TOLERANCE, _STEPS * eps)


def _refuse_differences(report: Mapping[str, Any], tolerance: float, source: str | Path) -> None:
    for part in ("random", "real", "sae_lens"):
        for name in ("latents_relative", "reconstruction_relative", "flips_share"):
            value = report.get(part, {}).get(name, 0.0)
            if not value <= tolerance:
                raise UserError(
                    f"`source` {source} and what {report['format_to']} makes of it differ: {name} "
                    f"is {value:.3g} on {part} rows and {tolerance:.3g} is allowed; nothing was "
                    "written: use another `format`, or a wider `dtype`"
                )


def _put(draft: Path, place: Path) -> None:
    """Rename the finished draft to its final name."""
    with files.writing(place):
        if place.is_dir():
            place.rmdir()  # only an empty folder is replaced
        draft.chmod(0o755)
        os.replace(draft, place)


def _row_lengths(sae: SAE) -> Float[Tensor, " d_sae"]:
    norms: Tensor = torch.linalg.vector_norm(sae.W_dec.detach().double(), dim=-1)
    return torch.where(norms > 0, norms, torch.ones_like(norms))
