"""Steering plans in the files of other tools, and their vectors as plans.

All of them add a fixed vector at every position of a text, so only plans that come down to that can
be exported; the rest are refused with the reason.
"""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints import files, safe_reading, torch_files
from saesteer.checkpoints.durable import write_by
from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.models import LanguageModel
from saesteer.steering.gguf_vectors import read_control_vectors, write_control_vectors
from saesteer.steering.plan import ModelIdentity, Plan, PlannedLatent, SAEIdentity
from saesteer.steering.plan_file import save_plan

EXPORTS = {
    "gguf": "control_vector.gguf",
    "steering-vectors": "steering_vectors.safetensors",
    "lm-eval": "lm_eval.pt",
    "lm-eval-csv": "lm_eval.csv",
}
"""Format to the name of the file it is written as."""

_CSV_COLUMNS = (
    "loader", "action", "sparse_model", "hookpoint", "feature_index", "steering_coefficient",
    "head_index", "sae_id", "description",
)  # fmt: skip
_EVERYWHERE = (
    "the file steers every position, also the first and those of the chat template, which the "
    "scope `all` leaves out here"
)


def plan_vector(plan: Plan) -> Float[Tensor, " d_model"]:
    """sum_j alpha_j d_j of a plan that adds a fixed vector, in float32.

    Raises UserError for any other method, unit, gate or schedule.
    """
    gate, schedule = getattr(plan, "gate", ""), getattr(plan, "schedule", "constant")
    for wrong, what in (
        (plan.method != "add", f"method {plan.method}, which depends on the activation"),
        (plan.unit == "rel", "unit rel, whose vector grows with the activation"),
        (bool(gate), f"the gate {gate!r}"),
        (schedule != "constant", f"the schedule {schedule!r}"),
    ):
        if wrong:
            raise UserError(
                f"the plan has {what}, and the file can only add one vector: make a plan with "
                "--method add --unit raw"
            )
    doses = torch.tensor(plan.doses(), dtype=torch.float64)
    return (doses @ plan.directions.double()).float()


def check_export(plan: Plan, format: str, as_scope: str | None = None) -> None:
    """Raise UserError or UsageError when `export_plan` would refuse this plan."""
    if format not in EXPORTS:
        raise UsageError(f"--format must be one of {', '.join(EXPORTS)} for a plan, got {format!r}")
    if plan.scope != "all" and as_scope != "all":
        raise UsageError(
            f"the plan's scope is {plan.scope} and {format} steers every position: add --as-scope "
            "all to export it as that, or change the plan's scope"
        )
    if format == "lm-eval-csv":
        _clamp(plan)
        return
    plan_vector(plan)
    if plan.site not in ("resid_post", "resid_pre"):
        raise UserError(
            f"the plan steers {plan.site}, and {format} adds to the output of a block: only "
            "resid_post and resid_pre are that"
        )
    if _block(plan) < 0 or (format == "gguf" and _block(plan) == 0):
        raise UserError(
            f"{format} has no place for a vector at {plan.site} of layer {plan.layer}: choose a "
            "plan of a later layer"
        )


def export_plan(
    plan: Plan,
    folder: Path,
    format: str,
    *,
    as_scope: str | None = None,
    hookpoint: str | None = None,
) -> dict[str, Any]:
    """Write a plan's vector into a folder; returns `files` and `notes` on what changes.

    `as_scope` "all" lets a plan of a narrower scope pass. `hookpoint` is lm-eval's name of the
    block, `layers.L` by default. Raises UserError for what the format cannot say.
    """
    check_export(plan, format, as_scope)
    notes = [_EVERYWHERE]
    if plan.scope != "all":
        notes.insert(0, f"the plan's scope {plan.scope} is lost")
    path = folder / EXPORTS[format]
    folder.mkdir(parents=True, exist_ok=True)
    block = _block(plan)
    hookpoint = hookpoint or f"layers.{plan.layer if format == 'lm-eval-csv' else block}"
    if format == "gguf":
        write_control_vectors(path, {block: plan_vector(plan)}, plan.model.name)
    elif format == "steering-vectors":
        facts = {"layer_type": "decoder_block", "model": plan.model.name, "hash": plan.model.hash}
        files.write_tensors(path, {f"layer.{block}": plan_vector(plan)}, facts)
        notes.append(
            "load it with safetensors and SteeringVector({N: tensor}, 'decoder_block'), N the "
            "number in layer.N"
        )
    elif format == "lm-eval":
        row = {
            "steering_vector": plan_vector(plan),
            "steering_coefficient": 1.0,
            "action": "add",
            "bias": None,
            "head_index": None,
        }
        write_by(path, lambda temporary: torch.save({hookpoint: row}, temporary))
        notes.append(f"the hook point is {hookpoint}, a module of the base model: check it there")
    else:
        notes.append(_write_clamp(plan, path, hookpoint))
    notes.append("latents, scores and the task are not written: keep the plan")
    return {"files": [str(path)], "notes": notes}


def read_vectors(path: str | Path) -> tuple[dict[int, Float[Tensor, " d_model"]], list[str]]:
    """Vectors by the 0-based block whose output they are added to, and notes on them.

    Reads GGUF control vectors, safetensors with `layer.N`, `.pt` dicts of {N: tensor}, and the
    `.pt` dicts of lm-eval. Raises a one-line UserError for anything else, pickled objects included.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        inside = [given / name for name in EXPORTS.values() if (given / name).is_file()]
        if len(inside) != 1:
            raise UserError(f"--from {path} holds {len(inside)} files of vectors: give the file")
        given = inside[0]
    file = safe_reading.inner_file(given.parent, given.name)
    if file.suffix == ".gguf":
        vectors, metadata = read_control_vectors(file)
        return vectors, [f"for {metadata.get('controlvector.model_hint', 'an unnamed model')}"]
    if file.suffix == ".safetensors":
        return _checked(file, _numbered(file, safe_reading.read_safetensors(file))), []
    if file.suffix in (".pt", ".pth"):
        content = torch_files.read_pt(file)
        if content and all(isinstance(row, dict) for row in content.values()):
            return _from_lm_eval(file, content)
        return _checked(file, _numbered(file, content)), []
    raise UserError(
        f"--from {path} ends in {file.suffix or 'nothing'}; vectors end in .gguf, .safetensors or "
        ".pt (a dict of {layer: tensor}; pickled objects are not opened)"
    )


def import_vectors(path: str | Path, lm: LanguageModel, folder: Path) -> dict[str, Any]:
    """Write plans that add the vectors of another tool's file; returns `files` and `notes`.

    One vector makes a plan in `folder`, several make one in `folder/layer-N` each. A plan's only
    latent, 0, is the vector itself. Raises UserError for vectors that do not fit the model.
    """
    vectors, notes = read_vectors(path)
    plans = {}
    for block, vector in sorted(vectors.items()):
        if not 0 <= block < lm.n_layers or len(vector) != lm.d_model:
            raise UserError(
                f"--from {path} has a vector of {len(vector)} numbers for block {block}, and "
                f"--model {lm.name} has {lm.n_layers} blocks of width {lm.d_model}: give the model "
                "that it was made for"
            )
        plans[block] = Plan(
            model=ModelIdentity(lm.name, lm.fingerprint, lm.n_layers, lm.d_model),
            sae=SAEIdentity(str(Path(path).expanduser().absolute()), "", "vector"),
            site="resid_post",
            layer=block,
            latents=(PlannedLatent(id=0, value=1.0),),
            directions=vector[None],
            scope="all",
        )
    many = len(plans) > 1
    written = [
        save_plan(plan, folder / f"layer-{block}" if many else folder)
        for block, plan in plans.items()
    ]
    notes.append("steered with scope all, which leaves out the first position and templates")
    return {"files": [str(file) for file in written], "notes": notes}


def _block(plan: Plan) -> int:
    """The block whose output the plan's site is."""
    return plan.layer if plan.site == "resid_post" else plan.layer - 1


def _numbered(path: Path, content: Mapping[Any, Any]) -> dict[int, Tensor]:
    found = {}
    for key, tensor in content.items():
        number = str(key).removeprefix("layer.")
        whole = number.isascii() and number.isdigit() and len(number) <= 6
        if not whole or not isinstance(tensor, Tensor) or int(number) in found:
            raise UserError(
                f"{path} holds {str(key)[:60]!r}; vectors are named by their layer (N or layer.N)"
            )
        found[int(number)] = tensor
    return found


def _checked(path: Path, vectors: dict[int, Tensor]) -> dict[int, Tensor]:
    for number, vector in vectors.items():
        if vector.dim() != 1 or not vector.is_floating_point() or not len(vector):
            raise UserError(f"{path}: the vector of layer {number} is not one row of floats")
        if not bool(torch.isfinite(vector).all()):
            raise UserError(f"{path}: the vector of layer {number} holds NaN or infinity")
    if not vectors:
        raise UserError(f"{path} holds no vector")
    return {number: vector.float() for number, vector in vectors.items()}


def _from_lm_eval(path: Path, content: Mapping[Any, Any]) -> tuple[dict[int, Tensor], list[str]]:
    vectors, notes = {}, []
    for hookpoint, row in content.items():
        vector, coefficient = row.get("steering_vector"), row.get("steering_coefficient", 1.0)
        number = str(hookpoint).rpartition(".")[2]
        plain = row.get("action", "add") == "add" and not isinstance(coefficient, bool)
        named = number.isascii() and number.isdigit() and len(number) <= 6
        if not plain or not named or not isinstance(vector, Tensor) or vector.numel() == 0:
            raise UserError(
                f"{path}: {str(hookpoint)[:60]!r} is not a vector added to a block's output, the "
                "one thing of lm-eval's that is read"
            )
        if row.get("bias") is not None or row.get("head_index") is not None:
            raise UserError(f"{path}: {hookpoint} has a bias or a head, which are not read")
        if not isinstance(coefficient, int | float) or int(number) in vectors:
            raise UserError(f"{path}: {hookpoint} has no coefficient, or comes twice")
        vectors[int(number)] = vector.flatten() * float(coefficient)
        notes.append(f"{hookpoint} was read as the output of block {number}")
    return _checked(path, vectors), notes


def _clamp(plan: Plan) -> tuple[str, str]:
    """RELEASE and ID of the SAE of a plan that clamps one latent; UserError for any other."""
    release, colon, sae_id = plan.sae.source.partition(":")
    local = Path(plan.sae.source).exists()
    for wrong, what in (
        (plan.method != "set", f"has method {plan.method}: the CSV's clamps are method set"),
        (len(plan.latents) != 1, "has several latents: lm-eval keeps one a site, the last"),
        (not colon or local, f"comes from {plan.sae.source}, not from RELEASE:ID of sae_lens"),
    ):
        if wrong:
            raise UserError(f"the plan {what}, so it cannot be lm-eval's CSV: use --format lm-eval")
    return release, sae_id


def _write_clamp(plan: Plan, path: Path, hookpoint: str) -> str:
    release, sae_id = _clamp(plan)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    latent, value = plan.latents[0], plan.doses()[0]
    label = json.dumps({"task": plan.task.name if plan.task else "", "lens": latent.lens[:3]})
    writer.writerow(
        ["sae_lens", "clamp", release, hookpoint, latent.id, repr(value), "", sae_id, label]
    )
    files.write_text(path, text.getvalue())
    return (
        "lm-eval's clamp sets the projection of x - b_dec on the direction, not the latent's "
        "activation: the two agree only where the latent's encoder is its direction"
    )
