"""Contents of a task, the texts that its instruction is applied to: reading and splitting."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from saesteer.checkpoints.errors import UserError

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
SPLIT_SHARES = (0.50, 0.12, 0.38)
"""Shares of train, dev and test for contents that name no split (the built-in proportions)."""
_NOT_LINES = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".zip", ".yaml", ".yml")


def read_text(path: Path, what: str) -> str:
    """The text of a file. Raises UserError, which begins with `what`, when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{what}: no such file: {path}; check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: {path} is not UTF-8 (byte {error.start}); re-encode it") from None
    except OSError as error:
        raise UserError(f"{what}: cannot read {path}: {error.strerror}") from None


def normal_form(text: str) -> str:
    """A form that equal texts share: case-folded, single spaces, no final . ! or ?"""
    return " ".join(text.casefold().split()).rstrip(".!?")


def inline_rows(path: Path, items: Sequence[object]) -> list[tuple[str, str | None]]:
    """Texts and splits (or None) of the contents in a task file. Raises UserError for others."""
    return [_row(f"{path}: contents[{number}]", item) for number, item in enumerate(items, 1)]


def _row(where: str, item: object) -> tuple[str, str | None]:
    """(text, split or None) of one content: a text, or a mapping with the field `text`."""
    text: object = item
    split: object = None
    if isinstance(item, dict):
        text, split = item.get("text"), item.get("split")  # other fields (an id, say) are ignored
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: the field 'text' is missing or empty")
    if split is None:
        return text.strip(), None
    if not isinstance(split, str) or split not in SPLITS:
        raise UserError(f"{where}: split {split!r} is not one of {', '.join(SPLITS)}")
    return text.strip(), split


def read_contents(
    path: Path, splits: Sequence[str], seed: int, *, what: str
) -> dict[str, tuple[str, ...]]:
    """The contents of a .jsonl file, or of a text file with one per line, by split.

    Rows without a split are divided by a hash of `seed` and text. Raises UserError, which begins
    with `what`, for a file that cannot be read or a row without text.
    """
    if path.suffix.lower() in _NOT_LINES:
        raise UserError(
            f"{what}: {path} is no .jsonl or .txt file: write one object with `text` a line, or "
            "one content a line"
        )
    lines = read_text(path, what).split("\n")
    rows: list[tuple[str, str | None]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{what}: {path}, line {number}"
        if path.suffix != ".jsonl":
            rows.append(_row(where, line))
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{where}: not valid JSON; one object with a text per line") from None
        rows.append(_row(where, item))
    return split_rows(f"{what}: {path}", rows, splits, seed)


def split_rows(
    where: str, rows: Sequence[tuple[str, str | None]], splits: Sequence[str], seed: int
) -> dict[str, tuple[str, ...]]:
    """Contents by split. Raises UserError for repeated texts, in one split or across two."""
    seen: dict[str, str | None] = {}
    for text, split in rows:
        key = normal_form(text)
        if key in seen:
            across = f" in splits {seen[key]} and {split}" if split != seen[key] else ""
            raise UserError(f"{where}: the same content occurs twice{across}: {text[:60]!r}")
        seen[key] = split
    without = sum(split is None for _, split in rows)
    if without and without != len(rows):
        raise UserError(
            f"{where}: {without} of {len(rows)} rows have no split; give every row one, or none"
        )
    if without:
        rows = _assign_splits(where, [text for text, _ in rows], seed)
    contents = {name: tuple(text for text, split in rows if split == name) for name in splits}
    empty = [name for name in splits if not contents[name]]
    if empty:
        raise UserError(f"{where}: no contents in split {empty[0]!r}; add some")
    return contents


def _assign_splits(where: str, texts: Sequence[str], seed: int) -> list[tuple[str, str | None]]:
    """Assign splits by the order of hashes, so that the order of the file does not matter."""
    if len(texts) < len(SPLITS):
        raise UserError(
            f"{where}: {len(texts)} contents; at least 3 are needed, one for each split"
        )

    def rank(text: str) -> bytes:
        return hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).digest()

    order = sorted(texts, key=rank)
    n = len(order)
    dev = max(1, round(SPLIT_SHARES[1] * n))
    test = max(1, round(SPLIT_SHARES[2] * n))
    train = n - dev - test
    split_of = dict(zip(order, ["train"] * train + ["dev"] * dev + ["test"] * test, strict=True))
    return [(text, split_of[text]) for text in texts]


def join_contents(
    path: Path, contents: dict[str, tuple[str, ...]], per_item: int
) -> dict[str, tuple[str, ...]]:
    """Join each `per_item` consecutive contents of a split into one; a remainder is dropped."""
    if per_item == 1:
        return contents
    joined = {
        split: tuple(
            " ".join(texts[start : start + per_item])
            for start in range(0, len(texts) - per_item + 1, per_item)
        )
        for split, texts in contents.items()
    }
    empty = [split for split in joined if not joined[split]]
    if empty:
        raise UserError(
            f"{path}: key 'contents_per_item' is {per_item}, but split {empty[0]!r} has "
            f"{len(contents[empty[0]])} contents; lower it or add contents"
        )
    return joined
