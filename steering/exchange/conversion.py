"""Export of plans to the files of other tools, and import of their vectors as plans.

Those tools add one fixed vector per block at every position of a text (lm-eval can also clamp one
direction). Plans that do more are refused with the reason.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints import files, safe_reading, torch_files
from saesteer.checkpoints.errors import UsageError, UserError, none_of
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.exchange import lm_eval_files
from saesteer.steering.exchange.gguf_vectors import read_control_vectors, write_control_vectors
from saesteer.steering.exchange.lm_eval_files import SteeredBlock
from saesteer.steering.plans.methods import METHODS
from saesteer.steering.plans.part import PlanPart
from saesteer.steering.plans.plan import ModelIdentity, Plan, PlannedLatent, SAEIdentity
from saesteer.steering.plans.plan_file import save_plan

EXPORTS = {
    "gguf": "control_vector.gguf",
    "steering-vectors": "steering_vectors.safetensors",
    "lm-eval": "lm_eval.pt",
    "lm-eval-csv": "lm_eval.csv",
}
"""The name of the file for each format."""

_EVERYWHERE = (
    "the file steers every position, also the first and those of the chat template, which the "
    "scope `all` leaves out here"
)


def check_export(
    plan: Plan, format: str, as_scope: str | None = None, hookpoint: str | None = None
) -> None:
    """Raise UserError or UsageError when `export_plan` would refuse this plan."""
    if format not in EXPORTS:
        raise none_of("`format`", EXPORTS, format)
    if plan.when is not None:
        raise UserError(
            f"the plan acts only where its condition holds (`when`: {plan.when.source}), and "
            f"{format} steers every text: export plan.with_changes(when=None)"
        )
    for name, part in _named(plan):
        _check_part(name, part, format)
        _check_scope(name, part, format, as_scope)
    by_block = _by_block(plan, format)
    all_add = all(part.does.adds for part in plan.parts)
    for block, parts in by_block.items():
        if len(parts) > 1 and not all_add:
            raise UserError(
                f"{' and '.join(parts)} of the plan act on the output of block {block}, and "
                f"{format} holds one action a block unless all only add: choose one with plan.only"
            )
    if hookpoint is not None and len(by_block) > 1:
        raise UsageError(
            f"`hookpoint` {hookpoint} names one block and the plan acts on the blocks "
            f"{', '.join(map(str, sorted(by_block)))}: leave it out"
        )


def _named(plan: Plan) -> Iterator[tuple[str, PlanPart]]:
    """The parts, each with its name in error messages."""
    for number, part in enumerate(plan.parts):
        yield "the plan" if len(plan.parts) == 1 else f"part {number}", part


def _by_block(plan: Plan, format: str) -> dict[int, dict[str, PlanPart]]:
    """For each block, the parts that act on its output, by their names in error messages."""
    found: dict[int, dict[str, PlanPart]] = {}
    for name, part in _named(plan):
        found.setdefault(_place(part, format), {})[name] = part
    return found


def _check_scope(name: str, part: PlanPart, format: str, as_scope: str | None) -> None:
    if part.scope != "all" and as_scope != "all":
        raise UsageError(
            f"{name}'s scope is {part.scope} and {format} steers every position: add `as_scope` "
            "all to export it as that, or change the plan's scope"
        )


def _check_part(name: str, part: PlanPart, format: str) -> None:
    if format not in part.does.exports:
        held = [method for method, does in METHODS.items() if format in does.exports]
        raise UserError(
            f"{name} has method {part.method}, which {format} cannot hold; it holds "
            f"{', '.join(held)}: make a plan with one of these, or of the parts that are "
            "(plan.with_changes(parts=...))"
        )
    if format == "lm-eval-csv":
        lm_eval_files.source_of_clamp(part, name)
        return
    if not (format == "lm-eval" and lm_eval_files.clamps_exactly(part)):
        _check_adds_one_vector(part, name)
    if part.site not in ("resid_post", "resid_pre"):
        raise UserError(
            f"{name} steers {part.site}, and {format} adds to the output of a block: only "
            "resid_post and resid_pre are that"
        )
    block = _place(part, format)
    if block < 0 or (format == "gguf" and block == 0):
        raise UserError(
            f"{format} has no place for a vector at {part.site} of layer {part.layer}: choose a "
            "plan of a later layer"
        )


def _check_adds_one_vector(part: PlanPart, name: str) -> None:
    """Raise UserError for a part that does not add the same vector at every position."""
    for wrong, what in (
        (not part.does.adds_fixed_vector, f"method {part.method}, which does more than add"),
        (part.unit == "rel", "unit rel, whose vector grows with the activation"),
        (part.sae.scales_tokens, "an SAE that scales each token, and so what it adds there"),
        (bool(part.gate), f"the gate {part.gate!r}"),
        (part.schedule != "constant", f"the schedule {part.schedule!r}"),
        (part.by_place is not None, "doses by place in the prompt"),
    ):
        if wrong:
            raise UserError(
                f"{name} has {what}, and the file can only add one vector: make a plan with "
                "`method` add `unit` raw"
            )
    part.added_vector()  # raises where the directions cancel out


def export_plan(
    plan: Plan,
    folder: Path,
    format: str,
    *,
    as_scope: str | None = None,
    hookpoint: str | None = None,
) -> dict[str, Any]:
    """Write a plan's vectors into a folder; returns `files`, and `notes` on what changes.

    Parts that add at the same block become one vector. `as_scope` "all" allows a plan with a
    narrower scope. `hookpoint` is the module path of the block in lm-eval, `layers.L` by default.
    Raises UserError or UsageError for what the format cannot hold.
    """
    check_export(plan, format, as_scope, hookpoint)
    notes = [
        f"{name}'s scope {part.scope} is lost" for name, part in _named(plan) if part.scope != "all"
    ]
    notes.append(_EVERYWHERE)
    path = folder / EXPORTS[format]
    folder.mkdir(parents=True, exist_ok=True)
    by_block = {block: [*parts.values()] for block, parts in _by_block(plan, format).items()}
    points = {block: hookpoint or f"layers.{block}" for block in by_block}
    if format == "gguf":
        vectors = {block: _summed(parts) for block, parts in by_block.items()}
        write_control_vectors(path, vectors, plan.model.name)
    elif format == "steering-vectors":
        facts = {"layer_type": "decoder_block", "model": plan.model.name, "hash": plan.model.hash}
        named = {f"layer.{block}": _summed(parts) for block, parts in by_block.items()}
        files.write_tensors(path, named, facts)
        notes.append(
            "load it with safetensors and SteeringVector({N: tensor}, 'decoder_block'), N the "
            "number in layer.N"
        )
    elif format == "lm-eval":
        rows = {
            points[block]: lm_eval_files.clamped_row(parts[0])
            if lm_eval_files.clamps_exactly(parts[0])
            else lm_eval_files.added_row(_summed(parts))
            for block, parts in by_block.items()
        }
        lm_eval_files.write_dict(path, rows)
        what = (
            f"hook point is {points.popitem()[1]}, a module"
            if len(points) == 1
            else f"hook points are {', '.join(points.values())}, modules"
        )
        notes.append(f"the {what} of the base model: check it there")
    else:
        clamped = {points[block]: part for block, (part,) in by_block.items()}
        notes += lm_eval_files.write_csv(path, clamped, plan.task)
    notes.append("latents, scores and the task are not written: keep the plan")
    return {"files": [str(path)], "notes": notes}


def _summed(parts: list[PlanPart]) -> Float[Tensor, " d_model"]:
    return torch.stack([part.added_vector() for part in parts]).sum(dim=0).float()


def import_vectors(path: str | Path, lm: LanguageModel, folder: Path) -> dict[str, Any]:
    """Write the plan that does what another tool's file says; returns `files` and `notes`.

    It has a part for each block. The only latent of each is the vector itself, added; or, for
    lm-eval's clamps, the vector as a linear latent that is set. Raises UserError for vectors that
    do not fit the model.
    """
    steered, notes = read_blocks(path)
    source = str(Path(path).expanduser().absolute())
    parts: list[PlanPart] = []
    for row in sorted(steered, key=lambda row: row.block):
        if not 0 <= row.block < lm.n_layers or len(row.vector) != lm.d_model:
            raise UserError(
                f"`source` {path} has a vector of {len(row.vector)} numbers for block {row.block}, "
                f"and `model` {lm.name} has {lm.n_layers} blocks of width {lm.d_model}: give the "
                "model that it was made for"
            )
        parts.append(_part(row, source))
    model = ModelIdentity(lm.name, lm.fingerprint, lm.n_layers, lm.d_model)
    written = save_plan(Plan(model=model, parts=parts), folder)
    if len(parts) > 1:
        notes.append(f"one plan of {len(parts)} parts, a block each")
    notes.append("steered with scope all, which leaves out the first position and templates")
    return {"files": [str(written)], "notes": notes}


def _part(row: SteeredBlock, source: str) -> PlanPart:
    common: dict[str, Any] = {
        "site": "resid_post",
        "layer": row.block,
        "scope": "all",
    }
    if row.action == "add":
        return PlanPart(
            sae=SAEIdentity(row.source or source, "", "vector"),
            latents=(PlannedLatent(id=row.latent, value=1.0),),
            directions=(row.vector * row.coefficient)[None],
            **common,
        )
    wide = row.vector.double()
    direction = (wide / wide.norm()).float()
    bias = 0.0 if row.bias is None else -float(row.bias.double() @ direction.double())
    return PlanPart(
        sae=SAEIdentity(row.source or source, "", "linear"),
        latents=(PlannedLatent(id=row.latent, value=row.coefficient),),
        directions=direction[None],
        method="set",
        W_enc=direction[:, None].clone(),
        b_enc=torch.tensor([bias]),
        **common,
    )


def read_blocks(path: str | Path) -> tuple[list[SteeredBlock], list[str]]:
    """What a file does at the output of each block (0-based), and notes for its reader.

    Reads GGUF control vectors, safetensors with `layer.N`, `.pt` dicts of {N: tensor}, and
    lm-eval's `.pt` dicts and CSVs; `path` may be a folder that holds one of those `export_plan`
    writes. Raises a one-line UserError for anything else, pickled objects included.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        inside = [given / name for name in EXPORTS.values() if (given / name).is_file()]
        if len(inside) != 1:
            raise UserError(f"`source` {path} holds {len(inside)} files of vectors: give the file")
        given = inside[0]
    file = safe_reading.inner_file(given.parent, given.name)
    try:
        return _read_file(file, path)
    except UserError as error:
        if "`source`" in str(error):
            raise
        # What was given, and so what to give instead.
        begins = str(error).startswith(str(file))
        raise type(error)(f"`source` {error}" if begins else f"`source` {path}: {error}") from error


def _read_file(file: Path, path: str | Path) -> tuple[list[SteeredBlock], list[str]]:
    """`read_blocks` of a file; `path` is what was given."""
    if file.suffix == ".gguf":
        vectors, metadata = read_control_vectors(file)
        return _added(vectors), [
            f"for {metadata.get('controlvector.model_hint', 'an unnamed model')}"
        ]
    if file.suffix == ".safetensors":
        numbered = _numbered(file, safe_reading.read_safetensors(file))
        return _added(_checked(file, numbered)), []
    if file.suffix == ".csv":
        return _lm_eval(file, lm_eval_files.read_csv(file))
    if file.suffix in (".pt", ".pth"):
        content = torch_files.read_pt(file)
        if lm_eval_files.is_dict_of_vectors(content):
            return _lm_eval(file, lm_eval_files.read_dict(file, content))
        return _added(_checked(file, _numbered(file, content))), []
    raise UserError(
        f"`source` {path} ends in {file.suffix or 'nothing'}; vectors end in .gguf, .safetensors, "
        ".pt (a dict of {layer: tensor}; pickled objects are not opened) or .csv (lm-eval's)"
    )


def _added(vectors: Mapping[int, Tensor]) -> list[SteeredBlock]:
    return [SteeredBlock(block, "add", vector, 1.0) for block, vector in vectors.items()]


def _lm_eval(file: Path, rows: list[SteeredBlock]) -> tuple[list[SteeredBlock], list[str]]:
    blocks = [row.block for row in rows]
    twice = sorted({block for block in blocks if blocks.count(block) > 1})
    if twice:
        raise UserError(
            f"{file} has several rows for block {twice[0]}, of which lm-eval keeps the last: leave "
            "one"
        )
    return rows, [f"block {row.block}: {row.action}, read as the block's output" for row in rows]


def _place(part: PlanPart, format: str) -> int:
    """The block whose output the part edits; a CSV names the part's own layer."""
    inside = part.site == "resid_post" or format == "lm-eval-csv"
    return part.layer if inside else part.layer - 1


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
