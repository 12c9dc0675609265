"""Corpora: documents from text files, folders and CPython, in a seeded order, and opening any."""

import hashlib
import itertools
import json
import mmap
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.files import sha256_file
from saesteer.sae.text.rows import Document, json_document
from saesteer.sae.text.streamed import TABLES, HubCorpus, TableCorpus, is_table

# Paragraphs of a plain-text file are joined until a document has this many bytes.
_DOCUMENT_BYTES = 2000
# A text without blank lines is cut after this many bytes.
_LONGEST_DOCUMENT_BYTES = 65_536
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
_NO_TEXT = (
    ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z", ".pdf", ".docx", ".xlsx", ".xls",
    ".epub", ".feather", ".npy", ".npz", ".pt", ".pkl", ".safetensors", ".db", ".sqlite",
)  # fmt: skip
_SUFFIXES = (*_TEXT_SUFFIXES, ".json", *_NO_TEXT, *TABLES)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+){0,2}")


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
        return _read_document(path, start, end)

    def identity(self) -> dict[str, Any]:
        hashes = {"name": self.name, "sha256": [sha256_file(path) for path in self.files]}
        if self.root is None:
            return hashes
        return {**hashes, "files": [path.relative_to(self.root).as_posix() for path in self.files]}


def _read_document(path: Path, start: int, end: int) -> Document:
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
        return json_document(text, f"{path} (byte {start})")
    return text


def _is_json_lines(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".json")


def _check_json(path: Path, most: int | None = None) -> None:
    """Refuse a `.json` file unless it is JSON lines (at most `most` are read) of another name."""
    if path.suffix.lower() != ".json":
        return
    with path.open("rb") as file:
        for line in itertools.islice(filter(bytes.strip, file), most):
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


def try_corpora(specs: Sequence[str]) -> None:
    """Read the first document of each file that `data` names, or open what is streamed.

    It takes a moment, also where indexing a file would not. Raises UserError for what is missing
    or holds no documents.
    """
    for spec in specs:
        files = _text_files(spec)
        if files is None:
            _open_one(spec)
            continue
        found = False
        for path in files:
            _check_json(path, most=1)
            for start, end in itertools.islice(_document_spans(path), 1):
                _read_document(path, start, end)
                found = True
        if not found:
            raise UserError(f"`data` {spec} holds no text: give at least one document")


def _open_one(spec: str) -> Corpus:
    if spec == PythonDocs.name:
        return PythonDocs()
    if spec.startswith("hf:"):
        return HubCorpus(spec)
    path = Path(spec).expanduser()
    files = _text_files(spec)
    if files is None:
        return TableCorpus(spec, path)
    return FileCorpus(spec, files, root=path if path.is_dir() else None)


def _text_files(spec: str) -> list[Path] | None:
    """The text files that `data` names; None for what is streamed. Raises UserError for others."""
    path = Path(spec).expanduser()
    if spec == PythonDocs.name or spec.startswith("hf:"):
        return None
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if _is_text_in(p, path))
        if not files:
            tables = any(is_table(file) for file in path.rglob("*"))
            hint = f"; write hf:{spec} to stream the tables in it" if tables else ""
            raise UserError(
                f"`data` {spec} is a folder without {', '.join(_TEXT_SUFFIXES)} files{hint}"
            )
        return files
    if not path.is_file():
        hint = f"; to stream {spec} from the Hub write hf:{spec}"
        raise UserError(
            f"`data` {spec} does not exist: give a file, a folder, hf:DATASET or python-docs"
            f"{hint if _HUB_NAME.fullmatch(spec) and path.suffix not in _SUFFIXES else ''}"
        )
    if is_table(path):
        return None
    if path.suffix.lower() in _NO_TEXT:
        raise UserError(
            f"`data` {spec} is no text file: unpack or export it as .txt, or as JSON lines with "
            f"`text` or `messages` ({', '.join(TABLES)} are read as they are)"
        )
    return [path]


def _is_text_in(file: Path, folder: Path) -> bool:
    """Whether a file is one of the folder's texts; hidden files and folders (.git) are left out."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.suffix.lower() in _TEXT_SUFFIXES and file.is_file()
