"""Steering files of lm-evaluation-harness: a `.pt` dict of vectors, and a CSV of latents.

Its `add` adds coefficient * vector; its `clamp` moves x to x + d (value - (x - bias) d) with d the
vector at length 1, which is the method `set` of a linear latent with column d and bias -bias d.
"""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints import files, safe_reading
from saesteer.checkpoints.durable import write_by
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import load_sae
from saesteer.steering.plans.part import PlanPart
from saesteer.steering.plans.plan import TaskIdentity

COLUMNS = (
    "loader",
    "action",
    "sparse_model",
    "hookpoint",
    "feature_index",
    "steering_coefficient",
    "head_index",
    "sae_id",
    "description",
)
_MOST_ROWS = 1000
_SAME_CLAMP = "the clamp is of the projection on the direction, as in the plan"
_OTHER_CLAMP = (
    "lm-eval's clamp sets the projection of x - b_dec on the direction, not the latent's "
    "activation: the two agree only where the latent's encoder is its direction"
)


@dataclass(frozen=True, eq=False)
class SteeredBlock:
    """What a steering file does at the output of one block."""

    block: int
    action: str
    """`add` or `clamp`."""
    vector: Float[Tensor, " d_model"]
    coefficient: float
    bias: Float[Tensor, " d_model"] | None = None
    source: str = ""
    """The SAE that the vector is a row of; empty for a vector alone."""
    latent: int = 0


def is_dict_of_vectors(content: Mapping[Any, Any]) -> bool:
    """Whether the content of a `.pt` file has lm-eval's format."""
    return bool(content) and all(isinstance(row, dict) for row in content.values())


def read_dict(path: Path, content: Mapping[Any, Any]) -> list[SteeredBlock]:
    """The entries of a `.pt` dict. Raises UserError for those that lm-eval would not run."""
    return [
        _checked(
            path,
            SteeredBlock(
                block=_block(path, hookpoint),
                action=_action(path, hookpoint, row.get("action", "add")),
                vector=_vector(path, hookpoint, row.get("steering_vector")),
                coefficient=_number(path, hookpoint, row.get("steering_coefficient", 1.0)),
                bias=_bias(path, hookpoint, row.get("bias")),
            ),
            row.get("head_index"),
        )
        for hookpoint, row in content.items()
    ]


def read_csv(path: Path) -> list[SteeredBlock]:
    """The rows of a CSV, with the SAEs that they name opened.

    `sae_lens` rows name RELEASE and ID, `sparsify` rows a folder. lm-eval attaches the SAE's b_dec
    to a clamp. Its `add` asserts that there is no bias and so runs no such row, but the meaning is
    clear and the row is read. Raises UserError for rows that lm-eval does not know.
    """
    text = _text(path)
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        rows = [row for _, row in zip(range(_MOST_ROWS + 1), reader, strict=False)]
    except csv.Error as error:
        raise UserError(f"{path} is no CSV ({error}); write it again") from error
    needed = ("loader", "action", "sparse_model", "hookpoint", "feature_index")
    missing = [name for name in (*needed, "steering_coefficient") if name not in names]
    if missing or not rows or len(rows) > _MOST_ROWS:
        what = f"lacks the column {missing[0]}" if missing else f"has {len(rows)} rows"
        raise UserError(
            f"{path} {what}; lm-eval's has the columns {', '.join(COLUMNS)} and 1 to {_MOST_ROWS} "
            "rows"
        )
    return [_csv_row(path, {k: v for k, v in row.items() if k is not None}) for row in rows]


def _csv_row(path: Path, row: Mapping[str, Any]) -> SteeredBlock:
    cells = {name.strip(): value.strip() for name, value in row.items() if isinstance(value, str)}
    hookpoint, model = cells.get("hookpoint", ""), cells.get("sparse_model", "")
    loader, number = cells.get("loader", ""), cells.get("feature_index", "")
    block = _block(path, hookpoint)
    action = _action(path, hookpoint, cells.get("action"))
    if loader not in ("sae_lens", "sparsify") or not model:
        raise UserError(
            f"{path}: {hookpoint} has the loader {loader[:40]!r} and the model {model[:40]!r}; "
            "lm-eval knows sae_lens and sparsify"
        )
    if not (number.isascii() and number.isdigit() and len(number) <= 9):
        raise UserError(f"{path}: {hookpoint} has the feature_index {number[:40]!r}, no number")
    sae_id = cells.get("sae_id", "")
    source = f"{model}:{sae_id}" if loader == "sae_lens" else str(Path(model) / hookpoint)
    sae = load_sae(source)
    if int(number) >= sae.spec.d_sae:
        raise UserError(f"{path}: {source} has {sae.spec.d_sae} latents, and no number {number}")
    if sae.spec.is_transcoder:
        raise UserError(f"{path}: {source} is a transcoder, whose rows are not of what it reads")
    found = SteeredBlock(
        block=block,
        action=action,
        vector=sae.W_dec[int(number)].detach().float(),
        coefficient=_number(path, hookpoint, _float(cells.get("steering_coefficient"))),
        bias=sae.b_dec.detach().float() if action == "clamp" else None,
        source=source,
        latent=int(number),
    )
    return _checked(path, found, cells.get("head_index") or None)


def added_row(vector: Float[Tensor, " d_model"]) -> dict[str, Any]:
    """The entry of a `.pt` dict that adds a vector to a block."""
    return {
        "head_index": None,
        "bias": None,
        "action": "add",
        "steering_vector": vector,
        "steering_coefficient": 1.0,
    }


def clamped_row(part: PlanPart) -> dict[str, Any]:
    """The entry of a `.pt` dict that clamps the one direction of a part."""
    direction = part.directions[0].float()
    bias = None
    if part.does.reads_latents and part.b_enc is not None and bool(part.b_enc != 0):
        # A clamp depends only on the component of the bias along the direction.
        bias = -float(part.b_enc[0]) * direction / direction.norm().square()
    return {
        "head_index": None,
        "bias": bias,
        "action": "clamp",
        "steering_vector": direction.clone(),
        "steering_coefficient": part.doses()[0],
    }


def write_dict(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a `.pt` dict of entries by their hook points."""
    write_by(path, lambda temporary: torch.save(dict(rows), temporary))


def clamps_exactly(part: PlanPart) -> bool:
    """Whether lm-eval's clamp does what the part does: one linear latent set, or projected out."""
    exports = "lm-eval" in part.does.exports and not part.does.adds
    if not exports or len(part.latents) != 1 or part.gate or part.schedule != "constant":
        return False
    if not part.does.reads_latents:
        return True
    direction = part.directions[0].float()
    return (
        part.sae.architecture == "linear"
        and part.W_enc is not None
        and torch.equal(part.W_enc[:, 0], direction)
        # Length 1, up to float32 rounding.
        and abs(float(direction.norm()) - 1) < 1e-5
    )


def source_of_clamp(part: PlanPart, name: str) -> tuple[str, str]:
    """RELEASE and ID of the SAE of a part that sets one latent.

    Raises UserError, which calls the part `name`, for parts that a CSV row cannot describe.
    """
    source = part.sae.source
    release, colon, sae_id = source.partition(":")
    for wrong, what in (
        (len(part.latents) != 1, "has several latents: lm-eval keeps one a site, the last"),
        (bool(part.gate), f"has the gate {part.gate!r}"),
        (part.schedule != "constant", f"has the schedule {part.schedule!r}"),
        (
            not colon or Path(source).exists(),
            f"comes from {source}, not from RELEASE:ID of sae_lens",
        ),
    ):
        if wrong:
            raise UserError(f"{name} {what}, so it cannot be lm-eval's CSV: use `format` lm-eval")
    return release, sae_id


def write_csv(path: Path, parts: Mapping[str, PlanPart], task: TaskIdentity | None) -> list[str]:
    """Write a CSV with one clamped latent at each hook point; returns notes for the user."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for hookpoint, part in parts.items():
        release, sae_id = source_of_clamp(part, hookpoint)
        latent, value = part.latents[0], part.doses()[0]
        label = json.dumps({"task": task.name if task else "", "lens": latent.lens[:3]})
        writer.writerow(
            ["sae_lens", "clamp", release, hookpoint, latent.id, repr(value), "", sae_id, label]
        )
    files.write_text(path, text.getvalue())
    notes = [_SAME_CLAMP if clamps_exactly(part) else _OTHER_CLAMP for part in parts.values()]
    return list(dict.fromkeys(notes))


def _text(path: Path) -> str:
    if path.stat().st_size > safe_reading.MAX_CONFIG_BYTES:
        raise UserError(f"{path} is too large for a CSV of steered latents; write it again")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path} is no text in UTF-8; write it again") from error


def _checked(path: Path, row: SteeredBlock, head: Any) -> SteeredBlock:
    if head is not None:
        raise UserError(f"{path}: block {row.block} has a head_index, which is not read")
    if row.action == "add" and row.bias is not None:
        raise UserError(f"{path}: block {row.block} adds and has a bias, which lm-eval refuses")
    if row.bias is not None and row.bias.shape != row.vector.shape:
        raise UserError(f"{path}: the bias of block {row.block} is not as wide as its vector")
    if row.action == "clamp" and not float(row.vector.norm()) > 0:
        raise UserError(f"{path}: block {row.block} is clamped along a vector of length 0")
    return row


def _block(path: Path, hookpoint: Any) -> int:
    number = str(hookpoint).rpartition(".")[2]
    if not (number.isascii() and number.isdigit() and len(number) <= 6):
        raise UserError(
            f"{path}: {str(hookpoint)[:60]!r} is not a block, such as layers.3: only steering of a "
            "block's output is read"
        )
    return int(number)


def _action(path: Path, hookpoint: Any, action: Any) -> str:
    if action not in ("add", "clamp"):
        raise UserError(
            f"{path}: {str(hookpoint)[:60]} has the action {str(action)[:40]!r}; lm-eval knows add "
            "and clamp"
        )
    return str(action)


def _vector(path: Path, hookpoint: Any, vector: Any) -> Float[Tensor, " d_model"]:
    floats = isinstance(vector, Tensor) and vector.is_floating_point()
    if not floats or vector.numel() == 0 or vector.numel() != vector.shape[-1:].numel():
        raise UserError(f"{path}: the vector of {str(hookpoint)[:60]!r} is not one row of floats")
    if not bool(torch.isfinite(vector).all()):
        raise UserError(f"{path}: the vector of {str(hookpoint)[:60]!r} holds NaN or infinity")
    row: Tensor = vector.flatten().float()
    return row


def _bias(path: Path, hookpoint: Any, bias: Any) -> Float[Tensor, " d_model"] | None:
    return None if bias is None else _vector(path, f"{hookpoint} (bias)", bias)


def _number(path: Path, hookpoint: Any, value: Any) -> float:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not abs(value) < 1e30:
        raise UserError(
            f"{path}: the steering_coefficient of {str(hookpoint)[:60]} is {str(value)[:40]!r}, "
            "which is no number"
        )
    return float(value)


def _float(text: str | None) -> float | str | None:
    try:
        return float(text) if text else None
    except ValueError:
        return text
