"""The pairs of a grid that are done, on disk: a grid that was stopped goes on after them.

Pairs do not depend on each other, so each is one line of a file that is only ever added to. The
first line says what grid it is, and a grid of other settings, pairs or weights is refused.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.files import append_jsonl, plain, read_jsonl
from saesteer.mechanisms.data.encoding import EncodedPair

Array = np.ndarray
NAME = "finished.jsonl"


class FinishedPairs:
    """Rows of effects by stage and pair, kept in a folder while a grid runs.

    `begin` is called before the first row is written, to make or to empty the folder.
    """

    def __init__(self, folder: str | Path, begin: Callable[[], object] = lambda: None) -> None:
        self.path = Path(folder) / NAME
        self._begin = begin
        self._key: Mapping[str, Any] = {}
        self._rows: dict[tuple[str, int], Array] = {}
        self._is_open = False

    def open(self, key: Mapping[str, Any], *, resume: bool) -> int:
        """Say which grid this is; returns how many rows are known of it.

        Raises UsageError where the folder holds rows of another grid, or a whole result; UserError
        for a file that cannot be read.
        """
        self._key = plain(dict(key))
        if not resume:
            return 0
        if not self.path.is_file():
            if (self.path.parent / "report.json").is_file():
                raise UsageError(
                    f"`resume` {self.path.parent} holds a whole result: give `force` to make it "
                    "again, or another folder"
                )
            return 0
        header, *rows = read_jsonl(self.path) or [{}]
        for name, value in self._key.items():
            stored = header.get(name) if isinstance(header, dict) else None
            if stored != value:
                raise UsageError(
                    f"`resume` {self.path.parent} was begun with other {name}: "
                    f"{_difference(stored, value)}; give the same, or `force` to begin again"
                )
        try:
            for row in rows:
                values = [np.nan if x is None else float(x) for x in row["effects"]]
                self._rows[str(row["stage"]), int(row["pair"])] = np.array(values)
        except (TypeError, KeyError, ValueError):
            raise UserError(f"{self.path} is no file of a grid: give `force` to begin again") from (
                None
            )
        self._is_open = True
        return len(self._rows)

    def get(self, stage: str, pair: int) -> Array | None:
        """A row that is done, or None."""
        return self._rows.get((stage, pair))

    def add(self, stage: str, pair: int, effects: Array) -> None:
        """Keep a row."""
        if not self._is_open:
            self._begin()
            append_jsonl(self.path, self._key)
            self._is_open = True
        values = [None if np.isnan(x) else x for x in effects.tolist()]
        append_jsonl(self.path, {"stage": stage, "pair": pair, "effects": values})

    def remove(self) -> None:
        """Delete the file: the result is written."""
        self.path.unlink(missing_ok=True)


def digest(pairs: Sequence[EncodedPair]) -> str:
    """What pairs come to as tokens, for the key of a grid."""
    rows = [[p.clean, p.corrupt, p.answer, p.wrong, sorted(p.places.items()), p.group]
            for p in pairs]  # fmt: skip
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _difference(stored: Any, now: Any) -> str:
    if isinstance(stored, dict) and isinstance(now, dict):
        for name in now:
            if stored.get(name) != now[name]:
                return f"{name} {stored.get(name)!r}, now {now[name]!r}"
    return f"{stored!r}, now {now!r}"
