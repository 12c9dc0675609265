"""From corpora to packed contexts of token ids, in a seeded and resumable order."""

import functools
import hashlib
import itertools
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError, reason_of
from saesteer.sae.config import TextConfig
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.runs.processes import ALONE, Processes
from saesteer.sae.text.corpora import Corpus, FileCorpus, open_corpus
from saesteer.sae.text.prompts import check_places
from saesteer.sae.text.rows import Document

# Tokenized in one call: fewer would leave cores idle, more would only need memory.
_DOCUMENTS_AT_ONCE = 32
_CHARACTERS_AT_ONCE = 1_000_000


@dataclass(frozen=True, eq=False)
class ContextBatch:
    """Token ids of some contexts, which of them are text, and which document each came from."""

    token_ids: Int[Tensor, "rows context"]
    keep: Bool[Tensor, "rows context"]
    document_ids: Int[Tensor, "rows context"]
    numbers: Int[Tensor, " rows"]
    """Which contexts of the corpus these are, counted from 0."""

    def __getitem__(self, rows: slice) -> "ContextBatch":
        """Some of the contexts."""
        fields = (self.token_ids, self.keep, self.document_ids, self.numbers)
        return ContextBatch(*(field[rows] for field in fields))


@dataclass
class _Piece:
    """The tokens of one document that are not yet part of a context."""

    epoch: int
    document: int
    used: int
    left: int
    skipped_rows: int
    """Rows without text before it."""
    read_before: str
    """`ContextStream.read` before it."""
    text: str
    """The hash of its text."""

    @property
    def owner(self) -> int:
        """A number that identifies the document; in another epoch the same text has another one."""
        return (self.epoch << 32) + self.document


class ContextStream:
    """Documents packed end to end into contexts of a fixed length, without padding.

    Documents are separated by the end-of-text token (see `end_of_text`); where the tokenizer puts a
    beginning-of-text token in front of a text (or `bos` says so), every context starts with one,
    and with `isolated` every document. A text that begins with one of its own, as many chat
    templates write it, gets no second one. Special tokens are marked not to keep,
    and without `keep_template` also what the chat template adds to the messages of a chat. What is
    left at the end of the last epoch and fills no context is dropped.

    With `held_back` above 0 that share of the documents, chosen by their text, is passed over in
    every epoch (all of them are read where nothing else is left): `held_out` reads those.
    """

    def __init__(
        self,
        corpus: Corpus,
        lm: LanguageModel,
        context: int,
        seed: int,
        epochs: int,
        keep_template: bool = True,
        *,
        bos: str = "auto",
        isolated: bool = False,
        held_back: float = 0.0,
    ) -> None:
        self._again = functools.partial(
            ContextStream, corpus, lm, context, seed, 1, keep_template, bos=bos, isolated=isolated
        )
        self.held_back = held_back
        self._only_held_back = False
        self.corpus = corpus
        self.lm = lm
        self.context = context
        self.seed = seed
        self.epochs = epochs
        self.epoch = 0
        self.consumed = 0
        self.emitted = 0
        self._skip = 0
        self._part = ""
        self.skipped_rows = 0
        """Rows without text (null) that were passed over."""
        self._keep_template = keep_template
        self.read: str | None = ""
        """A hash over the texts of the epoch up to the present document; None where it is not
        known."""
        self._tokenized: deque[tuple[list[int], list[bool]] | Exception | None] = deque()
        """None stands for a document that is passed over."""
        self._hashes: deque[str] = deque()
        """Of the texts of those documents."""
        self._tokens: list[int] = []
        self._in_template: list[bool] = []
        self._pieces: deque[_Piece] = deque()
        self._documents: Iterator[Document] | None = None
        self._prefix = _prefix_of(lm, bos)
        self._isolated = isolated
        separator = end_of_text(lm.tokenizer)
        self._separator = [] if separator is None else [separator]

    @property
    def prepend_bos(self) -> bool:
        """Whether every context starts with the beginning-of-text token."""
        return bool(self._prefix)

    def identity(self) -> list[dict[str, Any]]:
        """What text was read."""
        return [self.corpus.identity()]

    def held_out(self) -> "ContextStream | None":
        """A stream of text that this one has not read: the documents held back, or the rest of the
        first epoch. None where all text was read."""
        position = self.state_dict()
        if self.held_back:
            stream = self._again(held_back=self.held_back)
            stream._only_held_back = True
        elif position["epoch"] == 0:
            stream = self._again()
            stream.load_state_dict(position)
        else:
            return None
        return stream

    def next_batch(self, rows: int) -> ContextBatch | None:
        """The next contexts, at most `rows`; None at the end of the last epoch.

        Raises UserError when all the text together fills no context.
        """
        ids: list[list[int]] = []
        owners: list[list[int]] = []
        template: list[list[bool]] = []
        while len(ids) < rows:
            while len(self._tokens) < self.context - len(self._next_prefix()):
                if not self._read_document():
                    break
            prefix = self._next_prefix()
            body = self.context - len(prefix)
            if len(self._tokens) < body:
                break
            ids.append(prefix + self._tokens[:body])
            owners.append([-1] * len(prefix) + self._take_owners(body))
            template.append([False] * len(prefix) + self._in_template[:body])
            del self._tokens[:body], self._in_template[:body]
        if not ids:
            if self.emitted == 0 and not self._only_held_back:
                raise UserError(
                    f"`data` {self.corpus.name} holds fewer tokens than one context of "
                    f"{self.context}: give more text or a smaller `context`"
                )
            return None
        numbers = torch.arange(self.emitted, self.emitted + len(ids))
        self.emitted += len(ids)
        token_ids = torch.tensor(ids, dtype=torch.int64)
        keep = ~torch.isin(token_ids, self.lm.special_ids) & ~torch.tensor(template)
        return ContextBatch(token_ids, keep, torch.tensor(owners, dtype=torch.int64), numbers)

    def _next_prefix(self) -> list[int]:
        """What goes in front of the next context, which may begin with that token already."""
        return [] if self._tokens[:1] == self._prefix else self._prefix

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
        """Append the tokens of the next document; False when there are no more documents."""
        while self.epoch < self.epochs:
            if self._documents is None:
                self._documents = self.corpus.documents(self.seed + self.epoch, self.consumed)
            if not self._tokenized:
                self._tokenize_some(self._documents)
            if self._tokenized:
                tokenized = self._tokenized.popleft()
                if isinstance(tokenized, Exception):
                    self._hashes.clear()  # those of documents that it kept from being tokenized
                    raise tokenized
                before, text = self.read, self._hashes.popleft()
                self.read = _chained(before, text)
                if tokenized is None:
                    self.consumed += 1
                    return True
                tokens, template = tokenized
                skip, self._skip = self._skip, 0
                if len(tokens) > skip:
                    self._tokens += tokens[skip:]
                    self._in_template += template[skip:]
                    piece = _Piece(
                        self.epoch,
                        self.consumed,
                        skip,
                        len(tokens) - skip,
                        self.skipped_rows,
                        before or "",
                        text,
                    )
                    self._pieces.append(piece)
                elif not tokens and not skip:
                    self.skipped_rows += 1
                self.consumed += 1
                return True
            if self.consumed == 0:
                return False
            if self.held_back and not self._only_held_back and not self.emitted + len(self._tokens):
                self.held_back = 0.0  # the few documents there are would all be held back
                self.epoch -= 1
            self._documents, self.consumed, self.epoch = None, 0, self.epoch + 1
            self.read = ""
        return False

    def _tokenize_some(self, documents: Iterator[Document]) -> None:
        """Tokenize several documents in one call, which the tokenizer spreads over the cores.

        An error is raised only once the documents before it are used up.
        """
        texts: list[str] = []
        spans: list[list[tuple[int, int]] | None] = []
        failure: Exception | None = None
        characters = 0
        try:
            for document in itertools.islice(documents, _DOCUMENTS_AT_ONCE):
                self._hashes.append(_hash_of(document))
                if self._passes_over(document):
                    texts.append("")
                    spans.append(_PASSED_OVER)
                    continue
                text, content = self._as_text(document)
                texts.append(text)
                spans.append(content)
                characters += len(text)
                if characters > _CHARACTERS_AT_ONCE:
                    break
        except Exception as error:
            failure = error
        try:
            self._tokenized += self._tokenize(texts, spans)
        except Exception:
            # The library does not say which text it was: try them one by one.
            for text, content in zip(texts, spans, strict=True):
                try:
                    self._tokenized += self._tokenize([text], [content])
                except Exception as error:  # tokenizers raise exceptions of any type
                    failure = UserError(
                        f"`data` {self.corpus.name} holds a text that the tokenizer of "
                        f"{self.lm.name} refuses ({reason_of(error)}): correct or remove "
                        f"{text[:40]!a}"
                    )
                    break
        if failure is not None:
            self._tokenized.append(failure)

    def _passes_over(self, document: Document) -> bool:
        """Whether a document is none of this stream's."""
        if not self.held_back or not document:
            return False
        return is_held_back(document, self.held_back) != self._only_held_back

    def _tokenize(
        self, texts: list[str], spans: list[list[tuple[int, int]] | None]
    ) -> list[tuple[list[int], list[bool]] | None]:
        """Token ids of each text and its separator, and which come from its chat template."""
        if not texts:
            return []
        asked = any(spans)
        # A row without text leaves no trace, not even a separator.
        empty = [content == [] for content in spans]
        encoded = self.lm.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=asked)
        offsets = encoded["offset_mapping"] if asked else [()] * len(texts)
        tokenized: list[tuple[list[int], list[bool]] | None] = []
        for ids, places, content, nothing in zip(
            encoded["input_ids"], offsets, spans, empty, strict=True
        ):
            if content is _PASSED_OVER or nothing:
                tokenized.append(None if content is _PASSED_OVER else ([], []))
                continue
            # A token that holds a character of a message belongs to the message.
            template = [False] * len(ids) if content is None else [
                not any(low < end and high > start for start, end in content)
                for low, high in places
            ]  # fmt: skip
            begin = self._prefix if self._isolated and ids[:1] != self._prefix else []
            end = self._separator
            around = [False] * len(begin), [False] * len(end)
            tokenized.append(([*begin, *ids, *end], around[0] + template + around[1]))
        return tokenized

    def _as_text(self, document: Document) -> tuple[str, list[tuple[int, int]] | None]:
        """A document as text, and the character spans of its messages for a chat whose template is
        to be excluded."""
        if isinstance(document, str):
            return document, None
        if not document:
            return "", []
        if not self.lm.has_chat_template:
            return "\n".join(message["content"] for message in document), None
        text = self._render(document)
        return text, None if self._keep_template else self._content_spans(document, text)

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            return str(self.lm.tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # templates raise exceptions of any type
            raise UserError(
                f"`data` {self.corpus.name} has `messages` that the chat template of "
                f"{self.lm.name} refuses ({reason_of(error)}): change their roles or order"
            ) from error

    def _content_spans(
        self, messages: list[dict[str, str]], rendered: str
    ) -> list[tuple[int, int]]:
        """Character spans of the messages in `rendered`.

        The template is rendered a second time with a mark in place of each message: searching for a
        message itself could find it in the template ("user", "assistant").
        """
        check_places(self.lm)
        marks = [f"\u2042{i}\u2042" for i in range(len(messages))]
        marked = self._render(
            [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
        )
        spans, at, seen = [], 0, 0
        for message, mark in zip(messages, marks, strict=True):
            place = marked.find(mark, seen)
            start = at + place - seen
            fitting = [
                text
                for text in (message["content"], message["content"].strip())
                if place >= 0 and rendered.startswith(text, start)
            ]
            if not fitting:
                raise UserError(
                    f"the chat template of {self.lm.name} rewrites the messages of `data` "
                    f"{self.corpus.name}: leave `exclude_template` out"
                )
            at = start + len(fitting[0])
            spans.append((start, at))
            seen = place + len(mark)
        return spans

    def state_dict(self) -> dict[str, Any]:
        """The position: the first document that is not used up, and how much of it is used."""
        epoch, document, used = self.epoch, self.consumed, self._skip
        skipped_rows, read = self.skipped_rows, self.read
        part = self._part if used else ""
        if self._pieces:
            first = self._pieces[0]
            epoch, document, used = first.epoch, first.document, first.used
            skipped_rows = first.skipped_rows
            read = None if self.read is None else first.read_before
            part = first.text if used else ""
        known = {} if read is None else {"read": read, "part": part}
        return {
            **known,
            "epoch": epoch,
            "document": document,
            "used": used,
            "emitted": self.emitted,
            "skipped_rows": skipped_rows,
            **({"held_back": self.held_back} if self.held_back else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, with the same documents held back."""
        self.held_back = state.get("held_back", 0.0)
        self.epoch, self.consumed = state["epoch"], state["document"]
        self._skip, self.emitted = state["used"], state["emitted"]
        self.skipped_rows = state.get("skipped_rows", 0)
        self.read, self._part = state.get("read"), state.get("part", "")
        self._tokens, self._in_template = [], []
        self._tokenized, self._pieces, self._documents = deque(), deque(), None
        self._hashes = deque()

    def has_read(self, state: dict[str, Any], identities: Sequence[Any]) -> bool:
        """Whether what was read when `state_dict` was taken, of a corpus that then had the first of
        `identities`, is what the corpus holds now: text that comes after may have changed."""
        if list(identities[:1]) == self.identity():
            return True
        if state.get("read") is None or state["epoch"] != 0:
            return False  # all of it was read, or it is not known what
        digest: str | None = ""
        documents = self.corpus.documents(self.seed, 0)
        try:
            for document in itertools.islice(documents, state["document"]):
                digest = _chained(digest, _hash_of(document))
            part = _hash_of(next(documents)) if state["used"] else ""
        except (UserError, StopIteration):
            return False  # one of them cannot be read any more
        return bool(digest == state["read"] and part == state["part"])


# Stands for the character spans of a document that is passed over. An identity, not a value.
_PASSED_OVER: list[tuple[int, int]] = []


def is_held_back(document: Document, share: float) -> bool:
    """Whether a document is among a share that is chosen by the documents' text alone, so that the
    same text is never both trained on and held out."""
    return int(_hash_of(document)[:16], 16) < share * 2**64


def _hash_of(document: Document) -> str:
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def _chained(before: str | None, text: str) -> str | None:
    """The hash over the texts before and one more."""
    return None if before is None else hashlib.sha256(f"{before}{text}".encode()).hexdigest()


def _prefix_of(lm: LanguageModel, bos: str) -> list[int]:
    """The token in front of a text; none where there is none, or none is wanted."""
    token = lm.tokenizer.bos_token_id
    if bos == "always":
        if token is None:
            raise UsageError(
                f"`bos` always: the tokenizer of {lm.name} has no beginning-of-text token: give "
                "auto or never"
            )
        return [int(token)]
    if bos == "never" or token is None or lm.tokenizer("a")["input_ids"][:1] != [token]:
        return []
    return [int(token)]


# What ends a text in the vocabularies of the day; what ends a turn of a chat is none of them.
_ENDS_OF_TEXT = (
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|endofdocument|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)  # fmt: skip


def end_of_text(tokenizer: Any) -> int | None:
    """The token between packed documents: the end of a text, which the tokenizers of many chat
    models do not call their `eos_token` (that is the end of a turn). None without either."""
    eos = tokenizer.eos_token_id
    if eos is None or tokenizer.eos_token in _ENDS_OF_TEXT:
        return None if eos is None else int(eos)
    known = {
        added.content: number
        for number, added in (getattr(tokenizer, "added_tokens_decoder", None) or {}).items()
        if added.special
    }
    return int(next((known[name] for name in _ENDS_OF_TEXT if name in known), eos))


class MixedStream:
    """Contexts of a corpus and of the model's own replies, in a stated share.

    Context number n is one of replies when floor((n + 1) · share) exceeds floor(n · share): an even
    mixture that depends on n alone. The replies are few and repeat; the stream ends when the corpus
    does.
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

    @property
    def skipped_rows(self) -> int:
        """Rows of the corpus without text (null) that were passed over."""
        return self.corpus.skipped_rows

    def identity(self) -> list[dict[str, Any]]:
        """What text was read."""
        return self.corpus.identity() + self.replies.identity()

    def has_read(self, state: dict[str, Any], identities: Sequence[Any]) -> bool:
        """Whether what was read when `state_dict` was taken is what there is now."""
        return self.corpus.has_read(state["corpus"], identities[:1]) and self.replies.has_read(
            state["replies"], identities[1:]
        )

    def held_out(self) -> "MixedStream | None":
        """A stream of corpus and replies that were not read; None where there is not both."""
        corpus, replies = self.corpus.held_out(), self.replies.held_out()
        if corpus is None or replies is None:
            return None
        return MixedStream(corpus, replies, self.share)

    def next_batch(self, rows: int) -> ContextBatch | None:
        """The next contexts, at most `rows`; None when the corpus has ended."""
        batches: list[ContextBatch] = []
        for n in range(self.emitted, self.emitted + rows):
            if int((n + 1) * self.share) > int(n * self.share):
                batch = self.replies.next_batch(1)
                if batch is not None:
                    # Negative, so that no reply has the number of a document of the corpus.
                    owners = -2 - batch.document_ids
                    batch = ContextBatch(batch.token_ids, batch.keep, owners, batch.numbers)
            else:
                batch = self.corpus.next_batch(1)
            if batch is None:
                break
            batches.append(batch)
        if not batches:
            return None
        numbers = torch.arange(self.emitted, self.emitted + len(batches))
        self.emitted += len(batches)
        return ContextBatch(
            torch.cat([batch.token_ids for batch in batches]),
            torch.cat([batch.keep for batch in batches]),
            torch.cat([batch.document_ids for batch in batches]),
            numbers,
        )

    def state_dict(self) -> dict[str, Any]:
        """The positions of both streams; JSON-ready."""
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


class SharedStream:
    """The contexts of one process among several: number i belongs to process i mod world.

    Every process packs all the text, so that the numbers are the same whatever the number of
    processes; that costs little compared with the model.
    """

    def __init__(self, contexts: ContextStream | MixedStream, processes: Processes) -> None:
        self.contexts = contexts
        self.processes = processes
        self.prepend_bos = contexts.prepend_bos
        self.identity = contexts.identity
        self.has_read = contexts.has_read
        self.state_dict = contexts.state_dict
        self.load_state_dict = contexts.load_state_dict

    @property
    def skipped_rows(self) -> int:
        """Rows without text (null) that were passed over."""
        return self.contexts.skipped_rows

    def held_out(self) -> "SharedStream | None":
        """This process's contexts of text that was not read."""
        contexts = self.contexts.held_out()
        return None if contexts is None else SharedStream(contexts, self.processes)

    def next_batch(self, rows: int) -> ContextBatch | None:
        """This process's next contexts, at most `rows`; None when the text has ended.

        The last batch of the text may hold no contexts for this process.
        """
        batch = self.contexts.next_batch(rows * self.processes.world)
        return None if batch is None else batch[self.processes.rank :: self.processes.world]


Contexts = ContextStream | MixedStream | SharedStream

# Epochs of the replies, which repeat as often as the corpus needs them.
_REPLY_EPOCHS = 1_000_000


def open_contexts(
    lm: LanguageModel,
    config: TextConfig,
    replies_file: Path | None = None,
    processes: Processes = ALONE,
    held_back: float = 0.0,
) -> Contexts:
    """The stream of contexts that a `TextConfig` describes, replies mixed in when there are any.

    Of text that may be read more than once (several epochs, replies) the share `held_back` of the
    documents is left for `held_out`.

    Raises UserError for a corpus that cannot be opened, UsageError for contexts longer than the
    model's positions.
    """
    longest = lm.positions
    if longest is not None and config.context > longest:
        raise UsageError(
            f"`context` must be at most {longest}, the positions of {lm.name}, got {config.context}"
        )

    def packed(corpus: Corpus, epochs: int) -> ContextStream:
        repeats = epochs > 1
        return ContextStream(
            corpus,
            lm,
            config.context,
            config.seed,
            epochs,
            not config.exclude_template,
            bos=config.bos,
            isolated=config.isolate_documents,
            held_back=held_back if repeats else 0.0,
        )

    stream: ContextStream | MixedStream = packed(open_corpus(config.data), config.epochs)
    if replies_file is not None:
        assert isinstance(stream, ContextStream)
        # Named without its folder, so that a run can be resumed after its output folder was moved.
        replies = packed(FileCorpus(replies_file.name, [replies_file]), _REPLY_EPOCHS)
        stream = MixedStream(stream, replies, config.replies_share)
    return stream if processes.world == 1 else SharedStream(stream, processes)
