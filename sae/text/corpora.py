"""Corpora: documents from files, folders, the Hub and CPython, in a seeded order."""

import hashlib
import json
import mmap
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from saesteer.checkpoints.errors import UserError, reason_of
from saesteer.checkpoints.files import sha256_file

Document = str | list[dict[str, str]]
"""Plain text, or the messages of a chat; no messages stand for a row whose text is null."""

# Paragraphs of a plain-text file are joined until a document has this many bytes.
_DOCUMENT_BYTES = 2000
# A text without blank lines is cut after this many bytes.
_LONGEST_DOCUMENT_BYTES = 65_536
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
_HUB_SHUFFLE_ROWS = 10_000


@runtime_checkable
class Corpus(Protocol):
    """Documents in a fixed order that a seed permutes."""

    name: str

    def documents(self, seed: int, start: int) -> Iterator[Document]:
        """The documents of one epoch in the order drawn from `seed`, without the first `start`."""
        ...

    def identity(self) -> dict[str, Any]:
        """What was read, JSON-ready, precise enough to recognise the same text again."""
        ...


class FileCorpus:
    """Text and JSONL files, indexed once, read by offset.

    A document is a JSON line with `text` or `messages`, or consecutive paragraphs (separated by
    blank lines) of a text file, about 2,000 bytes of them and never more than 64 KiB.

    Raises UserError for a file that is missing, empty, not UTF-8 or not the JSON expected.
    """

    def __init__(self, name: str, files: Sequence[Path], root: Path | None = None) -> None:
        """Index `files`; `root` is the folder that they were found in, when there is one."""
        self.name = name
        self.files = list(files)
        self.root = root
        try:
            for path in self.files:
                _check_json(path)
            index = [
                (number, start, end)
                for number, path in enumerate(self.files)
                for start, end in _document_spans(path)
            ]
        except OSError as error:
            raise UserError(f"`data` {name} cannot be read: {error}; check its path") from error
        if not index:
            raise UserError(f"`data` {name} holds no text: give at least one document")
        self.index = np.array(index, dtype=np.int64)

    def documents(self, seed: int, start: int) -> Iterator[Document]:
        order = np.random.default_rng(seed).permutation(len(self.index))
        for number, low, high in self.index[order[start:]]:
            yield self._read(self.files[number], int(low), int(high))

    def _read(self, path: Path, start: int, end: int) -> Document:
        with path.open("rb") as file:
            file.seek(start)
            raw = file.read(end - start)
        try:
            # Some editors begin a file with a byte-order mark, which is not text.
            text = raw.decode("utf-8-sig" if start == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"`data` {path} is not UTF-8 (byte {start + error.start}): convert it, "
                "for example with iconv"
            ) from None
        if _is_json_lines(path):
            return _json_document(text, f"{path} (byte {start})")
        return text

    def identity(self) -> dict[str, Any]:
        hashes = {"name": self.name, "sha256": [sha256_file(path) for path in self.files]}
        if self.root is None:
            return hashes
        return {**hashes, "files": [path.relative_to(self.root).as_posix() for path in self.files]}


def _is_json_lines(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".json")


def _check_json(path: Path) -> None:
    """Refuse a `.json` file unless it is JSON lines under another name."""
    if path.suffix.lower() != ".json":
        return
    with path.open("rb") as file:
        for line in filter(bytes.strip, file):
            try:
                is_row = isinstance(json.loads(line.decode("utf-8-sig", "replace")), dict)
            except (ValueError, RecursionError):
                is_row = False
            if not is_row:
                raise UserError(
                    f"`data` {path} is a JSON file, not JSON lines: write one object with `text` "
                    "or `messages` on each line (jq -c '.[]' does that to a list)"
                )


def _document_spans(path: Path) -> Iterator[tuple[int, int]]:
    """Byte ranges of the documents in one file, which is mapped and never read whole."""
    if path.stat().st_size == 0:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = position = 0
        by_line = _is_json_lines(path)
        while position < len(data):
            newline = data.find(b"\n", position)
            end = len(data) if newline < 0 else newline + 1
            blank = not data[position:end].strip()
            position = end
            if by_line:
                if not blank:
                    yield start, end
                start = end
            elif blank and end - start >= _DOCUMENT_BYTES:
                yield start, end
                start = end
            while not by_line and position - start > _LONGEST_DOCUMENT_BYTES:
                cut = start + _LONGEST_DOCUMENT_BYTES
                # Not inside a character, which is at most four bytes long in UTF-8.
                cut -= next((i for i in range(4) if data[cut - i] & 0xC0 != 0x80), 0)
                yield start, cut
                start = cut
        if data[start:].strip():
            yield start, len(data)


def _json_document(line: str, source: str) -> Document:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"`data` {source} has a line that is not JSON ({error.msg}): give one object a line"
        ) from None
    return _row_document(row, source)


def _row_document(row: Any, source: str) -> Document:
    if not isinstance(row, dict):
        raise UserError(
            f"`data` {source} has a row that is a {type(row).__name__}: give objects with `text` "
            "or `messages`"
        )
    text, messages = row.get("text"), row.get("messages")
    if isinstance(text, str):
        return text
    if messages is not None:
        return _messages_of(messages, source)
    if text is not None:
        raise UserError(
            f"`data` {source} has a row whose `text` is a {type(text).__name__}: it must be a "
            "string"
        )
    if "text" in row or "messages" in row:
        return []  # a table's empty cell: nothing to read, and nothing to mend
    raise UserError(
        f"`data` {source} has a row with neither `text` (a string) nor `messages` (a list of role "
        f"and content); it has: {', '.join(map(str, row))}"
    )


def _messages_of(messages: Any, source: str) -> Document:
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"`data` {source} has a row whose `messages` is no list with a message in it: give "
            "objects of role and content"
        )
    read = []
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str):
            raise UserError(
                f"`data` {source}: message {number} of a row has no role: give objects of role "
                "and content"
            )
        read.append({"role": role, "content": _content_of(message, f"message {number}", source)})
    return read


def _content_of(message: dict[str, Any], which: str, source: str) -> str:
    """A message's text, also where it is a list of parts."""
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        wrong = "holds parts that are not text"
    elif content is None:
        wrong = "is null" + (" beside tool calls" if "tool_calls" in message else "")
    else:
        wrong = f"is a {type(content).__name__}"
    raise UserError(
        f"`data` {source}: the `content` of {which} of a row {wrong}: give a string, or leave the "
        "row out"
    )


class PythonDocs:
    """The language reference that comes with every CPython as the help texts of `pydoc`."""

    name = "python-docs"

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        self.topics = [topics[key] for key in sorted(topics)]

    def documents(self, seed: int, start: int) -> Iterator[Document]:
        order = np.random.default_rng(seed).permutation(len(self.topics))
        for i in order[start:]:
            yield self.topics[i]

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256("\0".join(self.topics).encode()).hexdigest()
        return {"name": self.name, "python": sys.version.split()[0], "sha256": digest}


class HubCorpus:
    """A dataset of the Hugging Face Hub, or a local folder of one, streamed.

    Written `hf:DATASET[:config][:split]`; the split is `train` unless given. Rows have `text` or
    `messages`. Raises UserError when it cannot be opened or breaks off.
    """

    def __init__(self, name: str) -> None:
        from saesteer.checkpoints.model_files import hub_call

        self.name = name
        dataset, *rest = name.removeprefix("hf:").split(":")
        if not dataset or len(rest) > 2:
            raise UserError(f"`data` {name} must read hf:DATASET[:config][:split]")
        config = rest[0] or None if len(rest) == 2 else None
        split = (rest[-1] if rest else "") or "train"

        def load() -> Any:
            from datasets import load_dataset

            # Up to version 3 the library ran a dataset's own script, after asking on stdout.
            return load_dataset(
                dataset, config, split=split, streaming=True, trust_remote_code=False
            )

        self._content: dict[str, Any] = {}
        """What identifies the text itself: hashes of a folder's files, or the Hub's commit."""
        if Path(dataset).is_dir():
            try:
                self.rows = load()
                self._content = {"sha256": _hashes_in(Path(dataset))}
            except Exception as error:  # the library raises a dozen unrelated types
                raise UserError(
                    f"`data` {name} could not be opened ({reason_of(error)}): check the folder, "
                    "the config and the split"
                ) from error
        else:
            todo = "check the name, the config and the split, or give a file or python-docs"
            self.rows = hub_call(load, f"`data` {name}", todo)
            self._content = {"revision": _revision_of(dataset)}

    def documents(self, seed: int, start: int) -> Iterator[Document]:
        rows = iter(self.rows.shuffle(seed=seed, buffer_size=_HUB_SHUFFLE_ROWS).skip(start))
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise UserError(
                    f"`data` {self.name} broke off ({reason_of(error)}): try again, with `resume` "
                    "if something was saved"
                ) from error
            yield _row_document(row, self.name)

    def identity(self) -> dict[str, Any]:
        info = self.rows.info
        return {
            "name": self.name,
            "builder": info.builder_name,
            "version": str(info.version),
            **self._content,
        }


def _hashes_in(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder that is not hidden, by its path in it."""
    return {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def _revision_of(dataset: str) -> str | None:
    """The commit that the Hub has of a dataset now; None where it does not say."""
    from huggingface_hub import HfApi

    try:
        sha: str | None = HfApi().dataset_info(dataset, timeout=10).sha
        return sha
    except Exception:  # no network, no such call: the name is all that is known then
        return None


class JoinedCorpus:
    """Several corpora, each in its own seeded order, which alternate document by document.

    When one has ended the others continue. So every corpus is read, however few tokens are needed.
    """

    def __init__(self, parts: Sequence[Corpus]) -> None:
        self.parts = list(parts)
        self.name = ",".join(part.name for part in parts)

    def documents(self, seed: int, start: int) -> Iterator[Document]:
        turns = [part.documents(seed, 0) for part in self.parts]
        while turns:
            for turn in list(turns):
                document = next(turn, None)
                if document is None:
                    turns.remove(turn)
                elif start > 0:
                    start -= 1
                else:
                    yield document

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "parts": [part.identity() for part in self.parts]}


def open_corpus(specs: Sequence[str]) -> Corpus:
    """Open the corpora that `data` names. Raises UserError for one that cannot be opened."""
    parts = [_open_one(spec) for spec in specs]
    return parts[0] if len(parts) == 1 else JoinedCorpus(parts)


def _open_one(spec: str) -> Corpus:
    if spec == PythonDocs.name:
        return PythonDocs()
    if spec.startswith("hf:"):
        return HubCorpus(spec)
    path = Path(spec)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if _is_text_in(p, path))
        if not files:
            raise UserError(f"`data` {spec} is a folder without {', '.join(_TEXT_SUFFIXES)} files")
        return FileCorpus(spec, files, root=path)
    if not path.is_file():
        raise UserError(
            f"`data` {spec} does not exist: give a file, a folder, hf:DATASET or python-docs"
        )
    return FileCorpus(spec, [path])


def _is_text_in(file: Path, folder: Path) -> bool:
    """Whether a file is one of the folder's texts; hidden files and folders (.git) are left out."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.suffix.lower() in _TEXT_SUFFIXES and file.is_file()
