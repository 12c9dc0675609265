"""Pairs of prompts that differ in what is studied, from a JSONL file or a built-in maker."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.data.boxes import box_desiderata, box_scenes
from saesteer.mechanisms.data.contrasts import CONTRASTS, contrast_rows
from saesteer.steering.tasks.contents import read_text
from saesteer.steering.tasks.task import compose, load_task

Span = tuple[int, int]


@dataclass(frozen=True)
class Pair:
    """Two prompts and the answer that the first one asks for."""

    clean: str
    corrupt: str
    answer: str | None = None
    """What follows `clean`, its leading space included; None takes the model's own next token."""
    wrong: str | None = None
    """An alternative answer; None, when `answer` is None as well, takes the model's own next token
    after `corrupt`."""
    positions: Mapping[str, tuple[Span, Span]] = field(default_factory=dict)
    """Name -> characters [start, end) in `clean` and in `corrupt`."""
    group: str = ""
    """Pairs of one group (a wording, a scene) are resampled together."""
    chance: float | None = None
    """Share of right answers of a model that guesses; None where that is not known."""


def load_pairs(source: str | Path, *, n: int = 100, against: str | None = None,
               seed: int = 0) -> list[Pair]:  # fmt: skip
    """At most `n` pairs from a file or a maker.

    `source` is a JSONL file, `boxes` or `boxes:3` (scenes of so many boxes), `contrast:NAME` (two
    instructions about the same words), or `task:NAME` (content and instruction against the content
    alone, or with `against` the same content and another task's instruction; the answers are the
    model's own). `boxes:3:position` makes scenes for a mask (see `desiderata`). Raises
    UsageError for an unknown maker, UserError for a file that cannot be read.
    """
    if n < 1:
        raise UsageError(f"`n` must be at least 1, got {n}")
    kind, _, name = str(source).partition(":")
    if against is not None and kind != "task":
        raise UsageError(f"`against` belongs to pairs of task:NAME, got {source}")
    if Path(source).is_file() or str(source).endswith(".jsonl"):
        return read_pairs(source)[:n]
    if kind == "boxes":
        count, _, wanted = name.partition(":")
        if wanted:
            return _of_rows(box_desiderata(_box_count(count), wanted, n, seed))
        return _of_rows(box_scenes(_box_count(count), n, seed))
    if kind == "contrast" and name in CONTRASTS:
        return _of_rows(contrast_rows(name, n, seed))
    if kind == "task" and name:
        return _task_pairs(name, against, n, seed)
    makers = ["boxes:N", *(f"contrast:{name}" for name in CONTRASTS), "task:NAME"]
    raise UsageError(f"`pairs` must be a .jsonl file or one of {', '.join(makers)}, got {source}")


def check_positions(pairs: Sequence[Pair], names: Sequence[str], setting: str) -> None:
    """Raise UsageError for a position that some pair does not have: it can be told without any
    model. `token:N` and `all` are left to the tokens."""
    shared = [name for name in pairs[0].positions if all(name in p.positions for p in pairs)]
    known = {"first", "last", *shared}
    known |= {f"{name}-{end}" for name in shared for end in ("first", "last")}
    for name in names:
        if name not in known and name != "all" and not name.startswith("token:"):
            raise UsageError(
                f"`{setting}` must be of {', '.join(['first', 'last', *shared])} (or NAME-first, "
                f"NAME-last), got {name!r}"
            )


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a JSONL file: `clean`, `corrupt`, and if wanted `answer`, `wrong`, `positions`
    ({name: [start, end]}, or {name: {"clean": [start, end], "corrupt": [start, end]}} where the
    texts differ), `group` and `chance`. Raises UserError that names the line."""
    text = read_text(Path(path), "`pairs`")
    pairs = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f"{path} line {number} is not JSON: one object a line") from None
            pairs.append(_read_row(row, f"{path} line {number}"))
    if not pairs:
        raise UserError(f"{path} holds no pair: write one object a line")
    return pairs


def write_pairs(pairs: Sequence[Pair]) -> str:
    """Pairs as the text of a JSONL file, which `read_pairs` takes."""
    return "".join(json.dumps(_row_of(pair), ensure_ascii=False) + "\n" for pair in pairs)


_FIELDS: dict[str, tuple[type, ...]] = {
    "clean": (str,), "corrupt": (str,), "answer": (str,), "wrong": (str,), "positions": (dict,),
    "group": (str, int), "chance": (int, float),
}  # fmt: skip


def _read_row(row: Any, where: str) -> Pair:
    if not isinstance(row, dict):
        raise UserError(f"{where} is not an object with clean and corrupt")
    for key, value in row.items():
        if key not in _FIELDS:
            raise UserError(f"{where}: unknown key {key!r}; known are {', '.join(_FIELDS)}")
        if not isinstance(value, _FIELDS[key]) or isinstance(value, bool):
            raise UserError(f"{where}: {key} is no {_FIELDS[key][-1].__name__}: {value!r}")
    for key in ("clean", "corrupt"):
        if not row.get(key, "").strip():
            raise UserError(f"{where}: {key} is missing or empty")
    for key in ("answer", "wrong"):
        if key in row and not row[key]:
            raise UserError(f"{where}: {key} is empty: leave it out, or give what follows the text")
    chance = row.get("chance")
    if chance is not None and not 0 <= chance < 1:
        raise UserError(f"{where}: chance must be in 0..1, got {chance}")
    if "wrong" in row and "answer" not in row:
        raise UserError(f"{where}: wrong without answer: give both or neither")
    spans = {
        name: _spans(value, row, f"{where}: position {name!r}")
        for name, value in row.get("positions", {}).items()
    }
    return Pair(row["clean"], row["corrupt"], row.get("answer"), row.get("wrong"), spans,
                str(row.get("group", "")), chance)  # fmt: skip


def _spans(value: Any, row: Mapping[str, str], where: str) -> tuple[Span, Span]:
    both = value if isinstance(value, dict) else {"clean": value, "corrupt": value}
    found = []
    for side in ("clean", "corrupt"):
        span = both.get(side)
        if not (isinstance(span, list) and len(span) == 2 and all(type(x) is int for x in span)):
            raise UserError(f"{where} must be [start, end] in characters, got {span!r} for {side}")
        start, end = span
        if not 0 <= start < end <= len(row[side]):
            raise UserError(
                f"{where} is [{start}, {end}], but {side} has {len(row[side])} characters"
            )
        found.append((start, end))
    return found[0], found[1]


def _row_of(pair: Pair) -> dict[str, Any]:
    row: dict[str, Any] = {"clean": pair.clean, "corrupt": pair.corrupt}
    row |= {key: value for key in ("answer", "wrong", "chance")
            if (value := getattr(pair, key)) is not None}  # fmt: skip
    if pair.positions:
        row["positions"] = {
            name: {"clean": list(clean), "corrupt": list(corrupt)}
            for name, (clean, corrupt) in pair.positions.items()
        }
    return row | ({"group": pair.group} if pair.group else {})


def _of_rows(rows: Sequence[Mapping[str, Any]]) -> list[Pair]:
    return [Pair(**row) for row in rows]


def _box_count(text: str) -> int:
    if text and not text.isdecimal():
        raise UsageError(f"`pairs` boxes:N takes a number of boxes, got {text!r}")
    return int(text or 7)


def _task_pairs(name: str, against: str | None, n: int, seed: int) -> list[Pair]:
    task = load_task(name)
    other = None if against is None else load_task(against)
    contents = list(task.contents.get("train", ()))
    random.Random(seed).shuffle(contents)
    pairs = []
    for content in contents[:n]:
        clean = compose(content, task.instruction)
        corrupt = content if other is None else compose(content, other.instruction)
        whole = (0, len(content))
        spans = {"query": (whole, whole)}
        if other is not None:
            start = len(content) + 1
            spans["instruction"] = ((start, len(clean)), (start, len(corrupt)))
        pairs.append(Pair(clean, corrupt, positions=spans, group=content))
    return pairs
