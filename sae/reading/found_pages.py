"""Pages of latents that are there already, so that other pages can link to them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.files import read_json

RECORD = "latents.json"


def latent_pages(
    given: Sequence[str | Path], near: Sequence[str | Path], start: str | Path
) -> dict[str, dict[str, Any]]:
    """The pages of latents, by the SHA-256 of their SAE: `folder`, relative to `start`, and `ids`.

    Of several of one SAE the first is taken.

    Args:
        given: folders that hold pages.
        near: folders that may, or that may have folders inside that do.
        start: the folder of the page that links.

    Raises UserError for a folder in `given` without pages.
    """
    folders = []
    for one in given:
        folder = Path(one).expanduser()
        if not (folder / RECORD).is_file():
            raise UserError(
                f"`latent_pages` {one} holds no {RECORD}: give a folder that `latents` wrote"
            )
        folders.append(folder)
    asked = tuple(folders)
    for one in near:
        folder = Path(one).expanduser()
        folders += [path.parent for path in _inside(folder) if path.is_file()]
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        record = _read(folder, strict=folder in asked)
        if record is not None:
            sha256, ids = record
            there = os.path.relpath(folder.resolve(), Path(start).resolve())
            found.setdefault(sha256, {"folder": Path(there).as_posix(), "ids": ids})
    return found


def link(pages: Mapping[str, Mapping[str, Any]], sha256: str, latent: int) -> str | None:
    """The page of a latent, relative to the page that links; None where it has none."""
    there = pages.get(sha256)
    if there is None or latent not in there["ids"]:
        return None
    return f"{there['folder']}/latents/{latent}.html"


def _inside(folder: Path) -> list[Path]:
    try:
        return [folder / RECORD, *sorted(folder.glob(f"*/{RECORD}"))]
    except OSError:
        return []


def _read(folder: Path, *, strict: bool) -> tuple[str, list[int]] | None:
    """The SAE's hash and the latents with a page; None for what cannot be read, unless `strict`."""
    try:
        record = read_json(folder / RECORD)
        return str(record["sae"]["sha256"]), [int(latent) for latent in record["ids"]]
    except (UserError, KeyError, TypeError, ValueError):
        if strict:
            raise UserError(f"`latent_pages` {folder / RECORD} is broken: make it again") from None
        return None
