"""What a bit-exact resume needs, saved so that a kill at any moment leaves a state that loads.

`DIR/state/latest.json` points at the newest safetensors file and holds its SHA-256. The tensors are
durable before the pointer moves, and the older file goes only after it moved.
"""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saesteer.checkpoints import files
from saesteer.checkpoints.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
else:  # importing torch takes seconds; whoever passes tensors has it already
    Tensor = Any

_FILE_NAME = re.compile(r"state-(\d+)\.safetensors")


def save_state(folder: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Save a state in `folder/state`, replacing the one before it.

    `tensors` may have any shapes and dtypes and lie on any device; `meta` is anything JSON can hold
    (integers are kept exactly; NaN and infinity become null). A full disk raises a one-line
    `UserError` and the state before it still loads.
    """
    place = Path(folder) / "state"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {place} ({error.strerror})") from error
    files.remove_leftovers(place)
    numbers = [int(match.group(1)) for match in _state_files(place).values()]
    name = f"state-{max(numbers, default=0) + 1:08d}.safetensors"
    files.write_tensors(place / name, tensors)
    pointer = {
        "schema_version": 1,
        "file": name,
        "sha256": files.sha256_file(place / name),
        "meta": meta,
    }
    try:
        files.write_json(place / "latest.json", pointer)
    except BaseException:
        # A full disk gets its space back; but Ctrl-C may come just after the pointer moved.
        with contextlib.suppress(OSError, UserError):
            if not has_state(folder) or files.read_json(place / "latest.json").get("file") != name:
                (place / name).unlink()
        raise
    for old in _state_files(place):
        if old != name:
            (place / old).unlink(missing_ok=True)


def load_state(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the meta of the newest state in `folder/state`.

    Raises:
        UserError: there is no state, or its file is missing or damaged.
    """
    place = Path(folder) / "state"
    if not has_state(folder):
        raise UserError(f"no saved state in {folder}: nothing to resume; run without --resume")
    pointer = files.read_json(place / "latest.json")
    if not isinstance(pointer, dict) or not {"file", "sha256", "meta"} <= pointer.keys():
        raise UserError(f"{place / 'latest.json'} is not a saved state; start again with --force")
    name = pointer["file"]
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise UserError(f"{place / 'latest.json'} names an odd file {name!r}; start with --force")
    if not (place / name).is_file() or files.sha256_file(place / name) != pointer["sha256"]:
        raise UserError(
            f"the saved state {place / name} is missing or damaged: start again with --force"
        )
    return files.read_tensors(place / name), dict(pointer["meta"])


def has_state(folder: str | Path) -> bool:
    """Whether `folder` holds a state that `load_state` could read."""
    return (Path(folder) / "state" / "latest.json").is_file()


def _state_files(place: Path) -> dict[str, re.Match[str]]:
    matches = {path.name: _FILE_NAME.fullmatch(path.name) for path in place.iterdir()}
    return {name: match for name, match in matches.items() if match}
