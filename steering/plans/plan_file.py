"""Plans on disk: `plan.yaml` and `plan.safetensors` in one folder.

The first holds everything a person may read or edit. The second holds the decoder rows, and the
encoder columns where latents can be read one by one.

A plan of one part is written as schema 1, with the part's fields at the top; a plan of several
parts as schema 2, with a list `parts`; each names the prefix of its tensors in the second file.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from saesteer.checkpoints import files
from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.strict_fields import read_fields
from saesteer.checkpoints.yaml_text import parse_yaml
from saesteer.steering.hooking.gates import parse_gate
from saesteer.steering.plans.part import TENSORS, PlanPart
from saesteer.steering.plans.plan import (
    Condition,
    ModelIdentity,
    Plan,
    PlannedLatent,
    SAEIdentity,
    TaskIdentity,
)

_YAML = "plan.yaml"
_TENSORS = "plan.safetensors"
_WHEN = "when.weight"


def save_plan(plan: Plan, folder: str | Path) -> Path:
    """Write `plan.yaml` and `plan.safetensors` into a folder, made if missing; returns plan.yaml.

    Each file appears whole or not at all. Raises UserError when the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"part{number}" if len(plan.parts) > 1 else "" for number in range(len(plan.parts))]
    rows = [_part_row(part, name) for part, name in zip(plan.parts, names, strict=True)]
    document = {
        "schema_version": 1 if len(rows) == 1 else 2,
        "model": dataclasses.asdict(plan.model),
        **(rows[0] if len(rows) == 1 else {"parts": rows}),
        "task": None if plan.task is None else _task_row(plan.task),
        "metrics": plan.metrics,
        **({} if plan.when is None else {"when": _when_row(plan.when)}),
    }
    tensors, metadata = {}, {}
    if plan.when is not None:
        tensors[_WHEN] = plan.when.weight
    for part, name in zip(plan.parts, names, strict=True):
        prefix = name and f"{name}."
        tensors.update({f"{prefix}{key}": tensor for key, tensor in part.tensors().items()})
        # The ids tie the two files together: latents may be deleted from plan.yaml by hand.
        metadata[f"{prefix}ids"] = json.dumps(part.ids)
        if part.gate_ids:
            metadata[f"{prefix}gate_ids"] = json.dumps(part.gate_ids)
    files.write_tensors(folder / _TENSORS, tensors, metadata)
    text = yaml.safe_dump(files.plain(document), sort_keys=False, allow_unicode=True, width=100)
    files.write_text(folder / _YAML, text)
    return folder / _YAML


def load_plan(path: str | Path) -> Plan:
    """Read a plan: the folder that holds it, or its `plan.yaml`.

    Raises a one-line UserError, naming `plan`, for a file that is missing, cut short, has unknown
    or missing keys, or values that cannot be.
    """
    given = Path(path).expanduser()
    file = given / _YAML if given.is_dir() else given
    if given.is_dir() and not file.exists():
        raise UserError(f"`plan` {path} holds no {_YAML}: {_instead(given)}")
    try:
        document = _read_yaml(file)
        return _plan_from(document, *_read_plan_tensors(file.with_name(_TENSORS)))
    except UserError as error:
        kind = UsageError if isinstance(error, UsageError) else UserError
        raise kind(f"`plan` {path}: {error}") from error


def _instead(folder: Path) -> str:
    """What to give in place of a folder without a plan."""
    inner = sorted(str(file.parent) for file in folder.glob(f"*/{_YAML}"))
    if inner:
        return f"give one of the plans in it: {', '.join(inner[:4])}"
    if (folder / "cfg.json").is_file():
        return "it holds an SAE, which `sae` takes, with `latents` or for rank to make a plan of"
    return "give a folder that rank or sweep wrote"


def _part_row(part: PlanPart, tensors: str) -> dict[str, Any]:
    """The keys of one part; those it does not use are left out, as in older files."""
    sae = dataclasses.asdict(part.sae)
    if not part.sae.scales_tokens:
        del sae["normalize_activations"]
    return {
        **({"tensors": tensors} if tensors else {}),
        "sae": sae,
        "site": part.site,
        "layer": part.layer,
        "latents": [_latent_row(latent) for latent in part.latents],
        "method": part.method,
        "unit": part.unit,
        "scale": part.scale,
        "beta": part.beta,
        "scope": part.scope,
        **({} if part.schedule == "constant" else {"schedule": part.schedule}),
        **({"gate": part.gate} if part.gate else {}),
    }


def _when_row(when: Condition) -> dict[str, Any]:
    """The keys of the condition; its weight is in the other file."""
    keys = ("source", "layer", "site", "bias")
    return {key: getattr(when, key) for key in keys}


def _task_row(task: TaskIdentity) -> dict[str, Any]:
    """The keys of the task; wordings that are not known are left out."""
    row = {"name": task.name, "hash": task.hash}
    return {**row, "instructions": list(task.instructions)} if task.instructions else row


def _latent_row(latent: PlannedLatent) -> dict[str, Any]:
    """The keys of one latent; what was never measured is left out."""
    row = dataclasses.asdict(latent)
    return {
        key: value
        for key, value in row.items()
        if value is not None or key in ("score", "mu", "sigma")
    }


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        document = parse_yaml(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside = sorted(found.parent.name for found in file.parent.glob(f"*/{_YAML}"))
        if inside:
            raise UserError(
                f"there is no {file}, but plans lie in {', '.join(inside[:5])}"
                f"{', ...' if len(inside) > 5 else ''} below it: give one of these"
            ) from None
        raise UserError(
            f"there is no {file}: give a folder that rank wrote, or its plan.yaml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file} ({error}): check the path") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is not valid YAML ({reason}): restore it") from error
    if not isinstance(document, dict):
        raise UserError(f"{file} holds no mapping of keys: restore it")
    return document


@dataclass(frozen=True, kw_only=True)
class _PartRow:
    """The keys of a part in plan.yaml."""

    sae: SAEIdentity
    site: str
    layer: int
    latents: tuple[PlannedLatent, ...]
    method: str
    unit: str
    scale: float
    beta: float
    scope: str
    schedule: str | None = None
    gate: str | None = None


@dataclass(frozen=True, kw_only=True)
class _NamedPartRow(_PartRow):
    """The keys of a part in a plan of several."""

    tensors: str
    """The prefix of the names of its tensors."""


@dataclass(frozen=True, kw_only=True)
class _WhenRow:
    """The keys of the condition."""

    source: str
    layer: int
    site: str
    bias: float


@dataclass(frozen=True, kw_only=True)
class _About:
    """The keys of plan.yaml that are not those of a part."""

    schema_version: int
    model: ModelIdentity
    task: TaskIdentity | None = None
    metrics: Mapping[str, Any] | None = field(default_factory=dict)
    when: _WhenRow | None = None


@dataclass(frozen=True, kw_only=True)
class _Schema1(_About, _PartRow):
    pass


@dataclass(frozen=True, kw_only=True)
class _Schema2(_About):
    parts: tuple[_NamedPartRow, ...]


@dataclass(frozen=True)
class _PartTensors:
    """The tensors of a part, and the numbers of its latents and of its gate's."""

    tensors: Mapping[str, Tensor]
    ids: list[int]
    gate_ids: list[int]


def _plan_from(
    document: dict[str, Any], tensors: Mapping[str, _PartTensors], weight: Tensor | None
) -> Plan:
    version = document.get("schema_version")
    rows: list[tuple[_PartRow, str]]
    about: _About
    if version == 1:
        about = one = read_fields(_Schema1, document, _YAML)
        rows = [(one, "")]
    elif version == 2:
        about = many = read_fields(_Schema2, document, _YAML)
        rows = [(row, row.tensors) for row in many.parts]
    else:
        raise UserError(
            f"schema_version is {_shown(version)} and this saesteer reads 1 and 2: make the plan "
            "again"
        )
    if not rows:
        raise UserError(f"{_YAML} holds no part: restore it or make the plan again")
    for _, name in rows:
        if name not in tensors:
            what = f" {name!r}" if name else ""
            raise UserError(
                f"{_TENSORS} does not hold the tensors{what} of {_YAML}: make the plan again "
                "(parts can be deleted by hand, not added)"
            )
    when = None
    if about.when is not None:
        if weight is None:
            raise UserError(f"{_TENSORS} does not hold {_WHEN} of {_YAML}: make the plan again")
        when = Condition(weight=weight, **vars(about.when))
    return Plan(
        when=when,
        model=about.model,
        parts=[_part_from(row, tensors[name]) for row, name in rows],
        task=about.task,
        metrics=about.metrics,
    )


def _part_from(row: _PartRow, own: _PartTensors) -> PlanPart:
    places = {latent: place for place, latent in enumerate(own.ids)}
    absent = [latent.id for latent in row.latents if latent.id not in places]
    if absent:
        raise UserError(
            f"latent {absent[0]} is in {_YAML} and not in {_TENSORS}: make the plan again "
            "(latents can be deleted by hand, not added)"
        )
    picked = [places[latent.id] for latent in row.latents]
    tensors: dict[str, Any] = {
        # Latents are the first axis of `directions` and the last one of all other tensors.
        name: tensor[picked] if name == "directions" else tensor[..., picked]
        for name, tensor in own.tensors.items()
        if not name.startswith("gate_")
    }
    gate = row.gate or ""
    # Columns of a gate that was edited by hand belong to other latents: the SAE is read instead.
    if gate and own.gate_ids and parse_gate(gate).ids == tuple(own.gate_ids):
        tensors |= {n: tensor for n, tensor in own.tensors.items() if n.startswith("gate_")}
        tensors["gate_ids"] = tuple(own.gate_ids)
    return PlanPart(
        sae=row.sae,
        site=row.site,
        layer=row.layer,
        latents=row.latents,
        method=row.method,
        unit=row.unit,
        scale=row.scale,
        beta=row.beta,
        scope=row.scope,
        schedule=row.schedule or "constant",
        gate=gate,
        **tensors,
    )


def _read_plan_tensors(file: Path) -> tuple[dict[str, _PartTensors], Tensor | None]:
    """The tensors by the name of their part, which is empty for a plan of one part, and the weight
    of the condition."""
    # Reading maps the file. Copies let the same file be written while the plan is in use.
    tensors = {name: tensor.clone() for name, tensor in files.read_tensors(file).items()}
    weight = tensors.pop(_WHEN, None)
    found: dict[str, _PartTensors] = {}
    try:
        metadata = files.read_header(file)["metadata"]
        for key, tensor in tensors.items():
            part, dot, name = key.rpartition(".")
            if part not in found:
                ids = json.loads(metadata[f"{part}{dot}ids"])
                gate_ids = json.loads(metadata.get(f"{part}{dot}gate_ids", "[]"))
                found[part] = _PartTensors({}, ids, gate_ids)
            found[part] = dataclasses.replace(
                found[part], tensors={**found[part].tensors, name: tensor}
            )
        whole = bool(found) and all(_is_whole(part) for part in found.values())
    except (KeyError, ValueError):
        whole = False
    if not whole:
        raise UserError(f"{file} is not the tensor file of a plan: make the plan again")
    return found, weight


def _is_whole(part: _PartTensors) -> bool:
    """Whether a part's tensors have known names, hold floats, and match the number of latents."""
    rows, n = part.tensors.get("directions"), len(part.ids) if isinstance(part.ids, list) else -1
    return (
        all(
            isinstance(ids, list) and all(isinstance(i, int) for i in ids)
            for ids in (part.ids, part.gate_ids)
        )
        and not part.tensors.keys() - set(TENSORS)
        and all(tensor.is_floating_point() for tensor in part.tensors.values())
        and rows is not None
        and rows.dim() == 2
        and len(rows) == n
        and all(
            part.tensors[name].shape[-1:] == (n,)
            for name in ("W_enc", "b_enc", "threshold", "by_place")
            if name in part.tensors
        )
    )


def _shown(value: Any) -> str:
    """A value in an error message, cut after 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
