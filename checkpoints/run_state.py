"""The saved state that a bit-exact resume needs. A kill at any moment leaves a state that loads.

`DIR/state/latest.json` points at the newest safetensors file and, under `earlier`, at the older
ones that are kept, each with its SHA-256. The tensors are durable before the pointer is replaced,
and older files are deleted only afterwards. The pointer holds a checksum of itself.
"""

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saesteer.checkpoints import files
from saesteer.checkpoints.durable import make_folder, sync_file, writing
from saesteer.checkpoints.errors import UsageError, UserError, reason_of

if TYPE_CHECKING:
    from torch import Tensor
else:  # importing torch takes seconds, and callers that pass tensors have done so
    Tensor = Any

_FILE_NAME = re.compile(r"state-(\d{1,12})\.safetensors")
_POINTER = "latest.json"
_log = logging.getLogger(__name__)


def save_state(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    keep: int = 1,
    score: float | None = None,
    first: Sequence[Path] = (),
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Save a state in `folder/state`, in place of older ones.

    Args:
        tensors: of any shapes and dtypes, on any device.
        meta: anything JSON can hold (integers are kept exactly; NaN and infinity become null).
        keep: how many of the newest states are kept, besides the one with the lowest `score`.
        score: how bad this state is, such as an FVU; None never counts as the best.
        first: files that the state refers to, made durable before it.
        cancelled: asked every few megabytes; once true, `durable.Cancelled` ends the save and the
            state before it stays.

    A full disk, or one that fails, raises a one-line `UserError`, and the state before it loads.
    """
    if keep < 1:
        raise UsageError(f"`keep_states` must be at least 1, got {keep}")
    place = Path(folder) / "state"
    make_folder(place)
    files.remove_leftovers(place)
    before = _entries_to_keep(place, keep, score)
    numbers = [int(match.group(1)) for match in _state_files(place).values()]
    name = f"state-{max(numbers, default=0) + 1:08d}.safetensors"
    for path in first:
        with writing(path):
            sync_file(path)
    try:
        sha256 = files.write_tensors(place / name, tensors, cancelled=cancelled, cached=False)
        size = (place / name).stat().st_size
        newest = {"file": name, "bytes": size, "sha256": sha256, "score": score, "meta": meta}
        pointer = files.plain({"schema_version": 1, **newest, "earlier": before})
        files.write_json(place / _POINTER, {**pointer, "checksum": _checksum(pointer)})
    except BaseException:
        # Delete the file, unless the pointer refers to it already: Ctrl-C may come just after that.
        with contextlib.suppress(OSError, UserError):
            if not has_state(folder) or files.read_json(place / _POINTER).get("file") != name:
                (place / name).unlink()
        raise
    wanted = {name, *(entry["file"] for entry in before)}
    for old in _state_files(place):
        if old not in wanted:
            with contextlib.suppress(OSError):  # the next save tries again
                (place / old).unlink()


def load_state(
    folder: str | Path, which: Literal["newest", "best"] = "newest"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the meta of a state in `folder/state`.

    When the newest is missing or damaged, an earlier one that is kept takes its place, with a
    warning: a resumed run then repeats some steps. `"best"` is the state of lowest score.

    Raises:
        UserError: there is no state, or its files are missing or damaged.
    """
    if not has_state(folder):
        raise UserError(f"no saved state in {folder}: nothing to resume; run without `resume`")
    path, meta = find_state(Path(folder) / "state", which)
    return files.read_tensors(path), meta


def find_state(place: Path, which: str = "newest") -> tuple[Path, dict[str, Any]]:
    """The file and the meta of a state in a `state` folder, by `load_state`'s rules.

    `which` may be the name of a kept file as well. Raises what `load_state` raises.
    """
    entries = _entries(place)
    if which == "best":
        entries.sort(key=lambda entry: (entry["score"] is None, entry["score"] or 0.0))
    if which != "newest":
        named = entries if which == "best" else [e for e in entries if e["file"] == which]
        if not named:
            raise UserError(f"{place / which} is not among the states that {_POINTER} lists")
        entries = named[:1]
    for entry in entries:
        path = place / entry["file"]
        if _is_whole(path, entry):
            return path, entry["meta"]
        _log.warning("the saved state %s is missing or damaged", path)
    raise UserError(
        f"the saved state {place / entries[0]['file']} is missing or damaged: start again with "
        "`force`"
    )


def is_state_file(path: Path) -> bool:
    """Whether a path has the name of a state in a folder of states."""
    return bool(_FILE_NAME.fullmatch(path.name)) and (path.parent / _POINTER).is_file()


def has_state(folder: str | Path) -> bool:
    """Whether `folder` holds a state that `load_state` could read."""
    return (Path(folder) / "state" / _POINTER).is_file()


@contextmanager
def restoring(folder: str | Path) -> Iterator[None]:
    """Turn errors that an unsuitable state causes inside the block into a `UserError`."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise UserError(
            f"`resume`: the saved state in {folder} does not fit this run ({reason}); resume with "
            "the saesteer that saved it, or start again with `force`"
        ) from error


def _entries(place: Path) -> list[dict[str, Any]]:
    """What the pointer lists, newest first. Raises UserError when it cannot be trusted."""
    path = place / _POINTER
    pointer = files.read_json(path)
    wrong = UserError(f"{path} is not a saved state; start again with `force`")
    if not isinstance(pointer, dict):
        raise wrong
    checksum = pointer.pop("checksum", None)
    if checksum is not None and checksum != _checksum(pointer):
        raise UserError(
            f"{path} is damaged (its checksum differs): restore it, or start again with `force`"
        )
    earlier = pointer.get("earlier", [])
    if not isinstance(earlier, list):
        raise wrong
    entries = []
    for entry in [pointer, *earlier]:
        if not isinstance(entry, dict):
            raise wrong
        name, sha256, meta = (entry.get(key) for key in ("file", "sha256", "meta"))
        score, size = entry.get("score"), entry.get("bytes")
        if not isinstance(sha256, str) or not isinstance(meta, dict):
            raise wrong
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise UserError(f"{path} names {name!r}, no state file; start again with `force`")
        if not isinstance(score, int | float | None) or not isinstance(size, int | None):
            raise wrong
        entries.append(
            {"file": name, "bytes": size, "sha256": sha256, "score": score, "meta": meta}
        )
    return entries


def _entries_to_keep(place: Path, keep: int, score: float | None) -> list[dict[str, Any]]:
    """The existing states to keep when a new one is saved with this score."""
    if not (place / _POINTER).is_file():
        return []
    try:
        entries = [entry for entry in _entries(place) if (place / entry["file"]).is_file()]
    except UserError:  # the old pointer is unreadable: the new state replaces it
        return []
    scored = [entry for entry in entries if entry["score"] is not None]
    best = min(scored, key=lambda entry: entry["score"], default=None)
    if best is not None and score is not None and score <= best["score"]:
        best = None
    return [entry for i, entry in enumerate(entries) if i < keep - 1 or entry is best]


def _is_whole(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether the file is the one that was saved: no link, of the same size and SHA-256."""
    if path.is_symlink() or not path.is_file():
        return False
    if entry["bytes"] is not None and path.stat().st_size != entry["bytes"]:
        return False
    return files.sha256_file(path) == str(entry["sha256"])


def _checksum(pointer: Mapping[str, Any]) -> str:
    text = json.dumps(pointer, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _state_files(place: Path) -> dict[str, re.Match[str]]:
    matches = {path.name: _FILE_NAME.fullmatch(path.name) for path in place.iterdir()}
    return {name: match for name, match in matches.items() if match}
