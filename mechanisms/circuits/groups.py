"""Groups of a circuit, from its end backwards: where heads send from, and what they reach."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UserError
from saesteer.steering.tasks.contents import read_text

LOGITS = "logits"
INPUTS = ("q", "k", "v")

_KEYS = ("name", "at", "to", "by", "source-at")


@dataclass(frozen=True)
class Group:
    """One group of heads to look for."""

    name: str
    at: str
    """Position name that its heads write at."""
    to: str
    """What they reach: `logits`, or an earlier group's heads."""
    by: str | None = None
    """Which input of those heads, at the same position: q, k or v."""
    source_at: str | None = None
    """Position in the corrupt run whose values are sent; None for `at`."""


BOXES = (
    Group("fetcher", "last", LOGITS),
    Group("transmitter", "last", "fetcher", "q"),
    Group("detector", "query-label", "transmitter", "v"),
    Group("reader", "prev-label", "detector", "v"),
)
"""The groups of Prakash et al. 2024 for scenes of boxes."""


def read_groups(path: str | Path) -> tuple[Group, ...]:
    """Groups of a YAML file: a list of mappings with name, at, to, by and source-at.

    Raises UserError that names the file and the entry.
    """
    import yaml

    from saesteer.checkpoints.yaml_text import parse_yaml

    text = read_text(Path(path), "`groups`")
    try:
        rows = parse_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"{path} is not valid YAML: write a list of groups") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} holds no list of groups")
    groups = [_read_group(row, f"{path}: group {number}") for number, row in enumerate(rows, 1)]
    check_groups(groups, str(path))
    return tuple(groups)


def _read_group(row: Any, where: str) -> Group:
    if not isinstance(row, dict):
        raise UserError(f"{where} is no mapping with {', '.join(_KEYS)}")
    for key, value in row.items():
        if key not in _KEYS:
            raise UserError(f"{where}: unknown key {key!r}; known are {', '.join(_KEYS)}")
        if not isinstance(value, str) or not value:
            raise UserError(f"{where}: {key} must be a text, got {value!r}")
    missing = [key for key in ("name", "at", "to") if key not in row]
    if missing:
        raise UserError(f"{where} lacks {missing[0]}")
    return Group(row["name"], row["at"], row["to"], row.get("by"), row.get("source-at"))


def check_groups(groups: Sequence[Group], where: str) -> None:
    """Raise UserError for a group that reaches no earlier one, or does not say by which input."""
    known: list[str] = []
    for group in groups:
        if group.name in (*known, LOGITS):
            raise UserError(f"{where}: the name {group.name!r} is taken; give each group its own")
        if group.to == LOGITS:
            if group.by is not None or group.at != "last":
                raise UserError(
                    f"{where}: {group.name} reaches the logits, so it is at last and has no by"
                )
        elif group.to not in known:
            names = ", ".join([LOGITS, *known])
            raise UserError(
                f"{where}: {group.name} reaches {group.to!r}, which must be one of {names}: groups "
                "come from the end backwards"
            )
        elif group.by not in INPUTS:
            raise UserError(
                f"{where}: {group.name} reaches {group.to} by {group.by!r}, which must be q, k or v"
            )
        known.append(group.name)
