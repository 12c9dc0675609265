"""From corpora to packed contexts of token ids, in a seeded and resumable order."""

import hashlib
import json
import mmap
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.files import sha256_file
from saesteer.sae.config import TextConfig
from saesteer.sae.models import LanguageModel, text_config

Document = str | list[dict[str, str]]
"""Plain text, or the messages of a chat."""

# Paragraphs are put together until a document of a plain-text file has this many bytes.
_DOCUMENT_BYTES = 2000
# Where a text has no blank lines, it is cut after this many.
_LONGEST_DOCUMENT_BYTES = 65_536
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
_HUB_SHUFFLE_ROWS = 10_000


@runtime_checkable
class Corpus(Protocol):
    """Documents in a fixed order that a seed permutes."""

    name: str

    def documents(self, seed: int, start: int) -> Iterator[Document]:
        """The documents of one pass in the order of `seed`, without the first `start`."""
        ...

    def identity(self) -> dict[str, Any]:
        """What was read, precisely enough to tell whether it is the same text again."""
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
            raise UserError(f"--data {name} cannot be read: {error}; check its path") from error
        if not index:
            raise UserError(f"--data {name} holds no text: give at least one document")
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
            # Some editors begin a file with a byte-order mark, which is no text.
            text = raw.decode("utf-8-sig" if start == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"--data {path} is not UTF-8 (byte {start + error.start}): convert it, "
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
                    f"--data {path} is a JSON file, not JSON lines: write one object with `text` "
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
            f"--data {source} has a line that is not JSON ({error.msg}): give one object a line"
        ) from None
    return _row_document(row, source)


def _row_document(row: Any, source: str) -> Document:
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return str(row["text"])
        messages = row.get("messages")
        if isinstance(messages, list) and messages and all(map(_is_message, messages)):
            return [{"role": m["role"], "content": m["content"]} for m in messages]
    keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
    raise UserError(
        f"--data {source} has a row with neither `text` (a string) nor `messages` (a list of role "
        f"and content); it has: {keys}"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


class PythonDocs:
    """The language reference that every CPython carries as the help texts of `pydoc`."""

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
            raise UserError(f"--data {name} must read hf:DATASET[:config][:split]")
        config = rest[0] or None if len(rest) == 2 else None
        split = (rest[-1] if rest else "") or "train"

        def load() -> Any:
            from datasets import load_dataset

            return load_dataset(dataset, config, split=split, streaming=True)

        if Path(dataset).is_dir():
            try:
                self.rows = load()
            except Exception as error:  # the library raises a dozen unrelated types
                raise UserError(
                    f"--data {name} could not be opened ({_reason(error)}): check the folder, the "
                    "config and the split"
                ) from error
        else:
            todo = "check the name, the config and the split, or give a file or python-docs"
            self.rows = hub_call(load, f"--data {name}", todo)

    def documents(self, seed: int, start: int) -> Iterator[Document]:
        rows = iter(self.rows.shuffle(seed=seed, buffer_size=_HUB_SHUFFLE_ROWS).skip(start))
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise UserError(
                    f"--data {self.name} broke off ({_reason(error)}): try again, with --resume if "
                    "something was saved"
                ) from error
            yield _row_document(row, self.name)

    def identity(self) -> dict[str, Any]:
        info = self.rows.info
        return {"name": self.name, "builder": info.builder_name, "version": str(info.version)}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class JoinedCorpus:
    """Several corpora, each in its own seeded order, taking turns document by document.

    When one has ended the others go on, so every corpus is read however few tokens are wanted.
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
    """Open the corpora that `--data` names. Raises UserError for one that cannot be opened."""
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
            raise UserError(f"--data {spec} is a folder without {', '.join(_TEXT_SUFFIXES)} files")
        return FileCorpus(spec, files, root=path)
    if not path.is_file():
        raise UserError(
            f"--data {spec} does not exist: give a file, a folder, hf:DATASET or python-docs"
        )
    return FileCorpus(spec, [path])


def _is_text_in(file: Path, folder: Path) -> bool:
    """Whether a file is text of the folder; what is hidden (.git, .venv) is not."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.suffix.lower() in _TEXT_SUFFIXES and file.is_file()


@dataclass(frozen=True, eq=False)
class ContextBatch:
    """Token ids of some contexts, which of them are text, and which document each came from."""

    token_ids: Int[Tensor, "rows context"]
    keep: Bool[Tensor, "rows context"]
    document_ids: Int[Tensor, "rows context"]


@dataclass
class _Piece:
    """Tokens of one document that wait to be cut into contexts."""

    epoch: int
    document: int
    used: int
    left: int

    @property
    def owner(self) -> int:
        """A number for the document; the same text in another epoch has another one."""
        return (self.epoch << 32) + self.document


class ContextStream:
    """Documents packed end to end into contexts of a fixed length, without padding.

    Documents are separated by the end-of-text token; where the tokenizer puts a beginning-of-text
    token in front of a text, every context starts with one. Special tokens are marked not to keep.
    What is left at the end of the last epoch and fills no context is dropped.
    """

    def __init__(self, corpus: Corpus, lm: LanguageModel, context: int, seed: int, epochs: int):
        self.corpus = corpus
        self.lm = lm
        self.context = context
        self.seed = seed
        self.epochs = epochs
        self.epoch = 0
        self.consumed = 0
        self.emitted = 0
        self._skip = 0
        self._tokens: list[int] = []
        self._pieces: deque[_Piece] = deque()
        self._documents: Iterator[Document] | None = None
        tokenizer = lm.tokenizer
        plain = tokenizer("a")["input_ids"]
        bos = tokenizer.bos_token_id
        self._prefix = [bos] if bos is not None and plain[:1] == [bos] else []
        self._separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    @property
    def prepend_bos(self) -> bool:
        """Whether every context starts with the beginning-of-text token."""
        return bool(self._prefix)

    def identity(self) -> list[dict[str, Any]]:
        """What text was read."""
        return [self.corpus.identity()]

    def next_batch(self, rows: int) -> ContextBatch | None:
        """The next contexts, at most `rows`; None at the end of the last epoch.

        Raises UserError when all the text together fills no context.
        """
        body = self.context - len(self._prefix)
        ids: list[list[int]] = []
        owners: list[list[int]] = []
        while len(ids) < rows:
            while len(self._tokens) < body and self._read_document():
                pass
            if len(self._tokens) < body:
                break
            ids.append(self._prefix + self._tokens[:body])
            owners.append([-1] * len(self._prefix) + self._take_owners(body))
            del self._tokens[:body]
        if not ids:
            if self.emitted == 0:
                raise UserError(
                    f"--data {self.corpus.name} holds fewer tokens than one context of "
                    f"{self.context}: give more text or a smaller --context"
                )
            return None
        self.emitted += len(ids)
        token_ids = torch.tensor(ids, dtype=torch.int64)
        keep = ~torch.isin(token_ids, self.lm.special_ids)
        return ContextBatch(token_ids, keep, torch.tensor(owners, dtype=torch.int64))

    def _take_owners(self, tokens: int) -> list[int]:
        """The documents that own the next `tokens` tokens."""
        owners: list[int] = []
        while len(owners) < tokens:
            piece = self._pieces[0]
            taken = min(piece.left, tokens - len(owners))
            owners += [piece.owner] * taken
            piece.used += taken
            piece.left -= taken
            if piece.left == 0:
                self._pieces.popleft()
        return owners

    def _read_document(self) -> bool:
        """Append one document's tokens; False when there are no more."""
        while self.epoch < self.epochs:
            if self._documents is None:
                self._documents = self.corpus.documents(self.seed + self.epoch, self.consumed)
            document = next(self._documents, None)
            if document is not None:
                tokens = self._tokenize(document) + self._separator
                skip, self._skip = self._skip, 0
                if len(tokens) > skip:
                    self._tokens += tokens[skip:]
                    piece = _Piece(self.epoch, self.consumed, skip, len(tokens) - skip)
                    self._pieces.append(piece)
                self.consumed += 1
                return True
            if self.consumed == 0:
                return False
            self._documents, self.consumed, self.epoch = None, 0, self.epoch + 1
        return False

    def _tokenize(self, document: Document) -> list[int]:
        tokenizer = self.lm.tokenizer
        if not isinstance(document, str):
            if not self.lm.has_chat_template:
                document = "\n".join(message["content"] for message in document)
            else:
                try:
                    document = tokenizer.apply_chat_template(document, tokenize=False)
                except Exception as error:  # templates raise what they like
                    raise UserError(
                        f"--data {self.corpus.name} has `messages` that the chat template of "
                        f"{self.lm.name} refuses ({_reason(error)}): change their roles or order"
                    ) from error
        return list(tokenizer(document, add_special_tokens=False)["input_ids"])

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: the first document not used up, and how much of it is used."""
        epoch, document, used = self.epoch, self.consumed, self._skip
        if self._pieces:
            first = self._pieces[0]
            epoch, document, used = first.epoch, first.document, first.used
        return {"epoch": epoch, "document": document, "used": used, "emitted": self.emitted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.epoch, self.consumed = state["epoch"], state["document"]
        self._skip, self.emitted = state["used"], state["emitted"]
        self._tokens, self._pieces, self._documents = [], deque(), None


class MixedStream:
    """Contexts of a corpus and of the model's own replies, in a stated share.

    Context number n is one of replies when floor((n + 1) · share) exceeds floor(n · share): an even
    mixture that depends on nothing but n. The replies are few and repeat; the corpus decides when
    the stream ends.
    """

    def __init__(self, corpus: ContextStream, replies: ContextStream, share: float) -> None:
        self.corpus = corpus
        self.replies = replies
        self.share = share
        self.emitted = 0

    @property
    def prepend_bos(self) -> bool:
        """Whether every context starts with the beginning-of-text token."""
        return self.corpus.prepend_bos

    def identity(self) -> list[dict[str, Any]]:
        """What text was read."""
        return self.corpus.identity() + self.replies.identity()

    def next_batch(self, rows: int) -> ContextBatch | None:
        """The next contexts, at most `rows`; None when the corpus has ended."""
        batches: list[ContextBatch] = []
        for n in range(self.emitted, self.emitted + rows):
            if int((n + 1) * self.share) > int(n * self.share):
                batch = self.replies.next_batch(1)
                if batch is not None:
                    # Documents of their own: their numbers go down from those of the corpus.
                    owners = -2 - batch.document_ids
                    batch = ContextBatch(batch.token_ids, batch.keep, owners)
            else:
                batch = self.corpus.next_batch(1)
            if batch is None:
                break
            batches.append(batch)
        if not batches:
            return None
        self.emitted += len(batches)
        return ContextBatch(
            torch.cat([batch.token_ids for batch in batches]),
            torch.cat([batch.keep for batch in batches]),
            torch.cat([batch.document_ids for batch in batches]),
        )

    def state_dict(self) -> dict[str, Any]:
        """Where both streams stand; JSON-ready."""
        return {
            "corpus": self.corpus.state_dict(),
            "replies": self.replies.state_dict(),
            "emitted": self.emitted,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.corpus.load_state_dict(state["corpus"])
        self.replies.load_state_dict(state["replies"])
        self.emitted = state["emitted"]


Contexts = ContextStream | MixedStream

# Replies may repeat as often as the corpus asks for them.
_ENDLESS = 1_000_000


def open_contexts(
    lm: LanguageModel, config: TextConfig, replies_file: Path | None = None
) -> Contexts:
    """The stream of contexts that a `TextConfig` describes, replies mixed in when there are any.

    Raises UserError for a corpus that cannot be opened, UsageError for contexts longer than the
    model's positions.
    """
    longest = getattr(text_config(lm.model), "max_position_embeddings", None)
    if longest and config.context > longest:
        raise UsageError(
            f"--context must be at most {longest}, the positions of {lm.name}, got {config.context}"
        )
    stream = ContextStream(open_corpus(config.data), lm, config.context, config.seed, config.epochs)
    if replies_file is None:
        return stream
    # Named without its folder: an output folder that was moved, replies and all, can be resumed.
    corpus = FileCorpus(replies_file.name, [replies_file])
    replies = ContextStream(corpus, lm, config.context, config.seed, _ENDLESS)
    return MixedStream(stream, replies, config.replies_share)
