"""Plans on disk: `plan.yaml` beside `plan.safetensors`.

The first is everything a person may read or edit, the second the decoder rows, and the encoder
columns of SAEs whose latents can be read one by one.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from saesteer.checkpoints import files
from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.yaml_text import parse_yaml
from saesteer.steering.hooking.gates import parse_gate
from saesteer.steering.plans.plan import (
    SCHEMA_VERSION,
    ModelIdentity,
    Plan,
    PlannedLatent,
    SAEIdentity,
    TaskIdentity,
)

_YAML = "plan.yaml"
_TENSORS = "plan.safetensors"


def save_plan(plan: Plan, folder: str | Path) -> Path:
    """Write `plan.yaml` and `plan.safetensors` into a folder, made if missing; returns plan.yaml.

    Each file appears whole or not at all. Raises UserError when the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "schema_version": plan.schema_version,
        "model": dataclasses.asdict(plan.model),
        "sae": _sae_row(plan.sae),
        "site": plan.site,
        "layer": plan.layer,
        "latents": [_latent_row(latent) for latent in plan.latents],
        "method": plan.method,
        "unit": plan.unit,
        "scale": plan.scale,
        "beta": plan.beta,
        "scope": plan.scope,
        # What a plan does not use is left out, so that its file stays as it was before these were.
        **({} if plan.schedule == "constant" else {"schedule": plan.schedule}),
        **({"gate": plan.gate} if plan.gate else {}),
        "task": None if plan.task is None else _task_row(plan.task),
        "metrics": plan.metrics,
    }
    # The ids tie the two files together, so that latents may be deleted from plan.yaml by hand.
    ids = {"ids": json.dumps(plan.ids)}
    if plan.gate_ids:
        ids["gate_ids"] = json.dumps(plan.gate_ids)
    files.write_tensors(folder / _TENSORS, plan.tensors(), ids)
    text = yaml.safe_dump(files.plain(document), sort_keys=False, allow_unicode=True, width=100)
    files.write_text(folder / _YAML, text)
    return folder / _YAML


def load_plan(path: str | Path) -> Plan:
    """Read a plan: the folder that holds it, or its `plan.yaml`.

    Raises a one-line UserError, naming `--plan`, for a file that is missing, cut short, has unknown
    or missing keys, or values that cannot be.
    """
    given = Path(path).expanduser()
    file = given / _YAML if given.is_dir() else given
    try:
        document = _read_yaml(file)
        tensors = _read_plan_tensors(file.with_name(_TENSORS))
        return _plan_from(document, *tensors)
    except UserError as error:
        kind = UsageError if isinstance(error, UsageError) else UserError
        raise kind(f"`plan` {path}: {error}") from error


def _sae_row(sae: SAEIdentity) -> dict[str, Any]:
    row = dataclasses.asdict(sae)
    if not sae.scales_tokens:
        del row["normalize_activations"]
    return row


def _task_row(task: TaskIdentity) -> dict[str, Any]:
    """What the file says of the task; wordings that are not known are left out."""
    row = {"name": task.name, "hash": task.hash}
    return {**row, "instructions": list(task.instructions)} if task.instructions else row


def _latent_row(latent: PlannedLatent) -> dict[str, Any]:
    """What the file says of one latent; what was never measured is left out."""
    row = dataclasses.asdict(latent)
    return {
        key: value for key, value in row.items()
        if value is not None or key in ("score", "mu", "sigma")
    }  # fmt: skip


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        document = parse_yaml(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
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


def _read_plan_tensors(file: Path) -> tuple[dict[str, Tensor], list[int], list[int]]:
    """The tensors, the latents they are of, and those of the gate."""
    tensors = files.read_tensors(file)
    ids: list[int] = []
    gate_ids: list[int] = []
    try:
        metadata = files.read_header(file)["metadata"]
        ids, gate_ids = json.loads(metadata["ids"]), json.loads(metadata.get("gate_ids", "[]"))
        whole = all(
            isinstance(them, list) and all(isinstance(i, int) for i in them)
            for them in (ids, gate_ids)
        )
    except (KeyError, ValueError):
        whole = False
    unknown = tensors.keys() - {
        "directions", "W_enc", "b_enc", "threshold", "gate_W_enc", "gate_b_enc", "gate_threshold"
    }  # fmt: skip
    directions = tensors.get("directions")
    rows = len(directions) if directions is not None and directions.dim() == 2 else -1
    floats = all(tensor.is_floating_point() for tensor in tensors.values())
    if not whole or unknown or rows != len(ids) or not floats:
        raise UserError(f"{file} is not the tensor file of a plan: make the plan again")
    # Reading maps the file: own the memory, so that the plan may be written again meanwhile.
    return {name: tensor.clone() for name, tensor in tensors.items()}, ids, gate_ids


def _plan_from(
    document: dict[str, Any], tensors: dict[str, Tensor], ids: list[int], gate_ids: list[int]
) -> Plan:
    if document.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"schema_version is {_shown(document.get('schema_version'))} and this saesteer reads "
            f"{SCHEMA_VERSION}: make the plan again"
        )
    top = _fields("plan", document, {
        "schema_version": int, "model": dict, "sae": dict, "site": str, "layer": int,
        "latents": list, "method": str, "unit": str, "scale": float, "beta": float, "scope": str,
    }, {"task": dict, "metrics": dict, "schedule": str, "gate": str})  # fmt: skip
    model = _fields("model", top["model"], {
        "name": str, "hash": str, "n_layers": int, "d_model": int,
    })  # fmt: skip
    sae = _fields(
        "sae", top["sae"], {"source": str, "sha256": str},
        {"architecture": str, "k": int, "normalize_activations": str},
    )  # fmt: skip
    latents = tuple(_latent_from(row, i) for i, row in enumerate(top["latents"]))
    places = {latent: place for place, latent in enumerate(ids)}
    absent = [latent.id for latent in latents if latent.id not in places]
    if absent:
        raise UserError(
            f"latent {absent[0]} is in {_YAML} and not in {_TENSORS}: make the plan again "
            "(latents can be deleted by hand, not added)"
        )
    whole = Plan(
        model=ModelIdentity(**model),
        sae=SAEIdentity(**{key: value for key, value in sae.items() if value is not None}),
        site=top["site"],
        layer=top["layer"],
        latents=tuple(PlannedLatent(id=i, value=1.0) for i in ids),
        metrics=top["metrics"] or {},
        task=_task_from(top["task"]) if top["task"] else None,
        directions=tensors["directions"],
        W_enc=tensors.get("W_enc"),
        b_enc=tensors.get("b_enc"),
        threshold=tensors.get("threshold"),
    )
    kept = whole.select([places[latent.id] for latent in latents])
    gate = top["gate"] or ""
    # A gate that was changed by hand leaves its columns behind; the SAE is read instead.
    gated = bool(gate) and parse_gate(gate).ids == tuple(gate_ids)
    return dataclasses.replace(
        kept, latents=latents, method=top["method"], unit=top["unit"], scale=top["scale"],
        beta=top["beta"], scope=top["scope"], schedule=top["schedule"] or "constant", gate=gate,
        gate_ids=tuple(gate_ids) if gated else (),
        gate_W_enc=tensors.get("gate_W_enc") if gated else None,
        gate_b_enc=tensors.get("gate_b_enc") if gated else None,
        gate_threshold=tensors.get("gate_threshold") if gated else None,
    )  # fmt: skip


def _task_from(row: Any) -> TaskIdentity:
    values = _fields("task", row, {"name": str, "hash": str}, {"instructions": list})
    texts = values["instructions"] or []
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"task.instructions must be a list of texts, got {_shown(texts)}")
    return TaskIdentity(**{**values, "instructions": tuple(texts)})


def _latent_from(row: Any, number: int) -> PlannedLatent:
    where = f"latents[{number}]"
    numbers = {"score": float, "mu": float, "sigma": float, "value": float, "max": float}
    values = _fields(where, row, {"id": int}, {**numbers, "lens": list})
    lens = values["lens"] or []
    if not all(isinstance(token, str) for token in lens):
        raise UserError(f"{where}.lens must be a list of texts, got {_shown(lens)}")
    return PlannedLatent(**{**values, "lens": tuple(lens)})


def _fields(
    where: str,
    mapping: Any,
    required: Mapping[str, type],
    optional: Mapping[str, type] | None = None,
) -> dict[str, Any]:
    """The values of a mapping, each of its type; an optional one may be missing or null."""
    optional = optional or {}
    if not isinstance(mapping, dict):
        raise UserError(f"{where} must be a mapping of keys, got {_shown(mapping)}")
    unknown = sorted(str(key) for key in mapping.keys() - required.keys() - optional.keys())
    if unknown:
        allowed = ", ".join([*required, *optional])
        raise UserError(f"{where} has an unknown key {_shown(unknown[0])}; allowed are {allowed}")
    missing = [key for key in required if mapping.get(key) is None]
    if missing:
        raise UserError(f"{where} lacks the key {missing[0]!r}: restore it or make the plan again")
    values: dict[str, Any] = {}
    for key, kind in {**required, **optional}.items():
        value = mapping.get(key)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 2**53 else value
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UserError(f"{where}.{key} must be {_WORDS[kind]}, got {_shown(value)}")
        values[key] = value
    return values


def _shown(value: Any) -> str:
    """A value in an error message, cut where it grows long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


_WORDS: Mapping[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
}
