"""Disk space: whether a folder has room for what a run will write."""

import os
import shutil
from pathlib import Path

from saesteer.checkpoints.errors import UserError


def need_space(folder: str | Path, needed_bytes: int, what: str, todo: str) -> None:
    """Raise when `folder`, which need not exist yet, has too little free disk space for a run.

    What is already in the folder is not counted: pass what the run adds. `what` and `todo` are
    the beginning and end of the message, such as "training writes" and "lower `d_sae`".

    Raises:
        UserError: fewer than `needed_bytes` are free to this user.
    """
    place = Path(folder).expanduser().absolute()
    while not place.exists():
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError:  # this file system does not say; a full disk then fails the write
        return
    if free < needed_bytes:
        raise UserError(
            f"{what} up to {_size(needed_bytes)} in {folder}, but only {_size(free)} is free "
            f"there: free some space, choose another `out`, or {todo}"
        )


def folder_bytes(folder: str | Path) -> int:
    """Bytes of all files below a folder; 0 when there is none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # gone meanwhile
                pass
    return total


def _size(count: int | float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
