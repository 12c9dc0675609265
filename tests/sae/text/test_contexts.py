"""Corpora in a seeded order, packed into contexts, resumable at any point."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.config import TextConfig
from saesteer.sae.model.forward_pass import document_positions
from saesteer.sae.model.language_model import LanguageModel, wrap_model
from saesteer.sae.text import contexts as packing
from saesteer.sae.text.contexts import (
    ContextBatch,
    ContextStream,
    MixedStream,
    end_of_text,
    open_contexts,
)
from saesteer.sae.text.rows import Document

Shared = Callable[..., LanguageModel]


class Listed:
    """Documents in memory, in a seeded order."""

    name = "listed"

    def __init__(self, *documents: Document) -> None:
        self.listed = list(documents)

    def documents(self, seed: int, start: int) -> Iterator[Document]:
        order = torch.randperm(len(self.listed), generator=torch.Generator().manual_seed(seed))
        for i in order[start:].tolist():
            yield self.listed[i]

    def identity(self) -> dict[str, Any]:
        return {"name": self.name}


class InOrder(Listed):
    """Documents as they were given, whatever the seed."""

    def documents(self, seed: int, start: int) -> Iterator[Document]:
        return iter(self.listed[start:])


# The end of a text, not that of a turn, which the tokenizer calls its EOS.
END = 0


def words(count: int, prefix: str = "w") -> str:
    return " ".join(f"{prefix}{i}" for i in range(count))


DOCUMENTS = Listed(*(words(3 + 11 * i % 40, f"d{i}x") for i in range(12)))


def everything(stream: ContextStream | MixedStream, rows: int) -> ContextBatch:
    batches = list(iter(lambda: stream.next_batch(rows), None))
    assert all(len(batch.token_ids) <= rows for batch in batches)
    return ContextBatch(
        *(
            torch.cat([getattr(batch, field) for batch in batches])
            for field in ("token_ids", "keep", "document_ids", "numbers")
        )
    )


def same(a: ContextBatch, b: ContextBatch) -> bool:
    return all(
        torch.equal(getattr(a, field), getattr(b, field))
        for field in ("token_ids", "keep", "document_ids", "numbers")
    )


# --- packing


def test_documents_are_packed_end_to_end(shared_lm: Shared) -> None:
    lm = shared_lm()
    stream = ContextStream(DOCUMENTS, lm, 16, seed=3, epochs=1)
    found = everything(stream, 5)
    ids: list[int] = []
    owners: list[int] = []
    for number, text in enumerate(DOCUMENTS.documents(3, 0)):
        tokens = lm.tokenizer(text)["input_ids"] + [END]
        ids += tokens
        owners += [number] * len(tokens)
    whole = len(ids) // 16 * 16
    assert len(ids) > whole, "something is left that fills no context"
    assert found.token_ids.flatten().tolist() == ids[:whole]
    assert found.document_ids.flatten().tolist() == owners[:whole]
    assert torch.equal(found.keep, found.token_ids != END)
    assert not stream.prepend_bos
    assert stream.next_batch(3) is None


def test_contexts_begin_as_the_tokenizer_begins_texts(tiny_lm: Callable[..., Any]) -> None:
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = tiny_lm()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    lm = wrap_model(model, tokenizer)
    stream = ContextStream(DOCUMENTS, lm, 16, seed=3, epochs=1)
    assert stream.prepend_bos
    found = everything(stream, 4)
    assert (found.token_ids[:, 0] == 1).all() and (found.token_ids[:, 1:] != 1).all()
    assert not found.keep[:, 0].any() and (found.document_ids[:, 0] == -1).all()
    assert (found.document_ids[:, 1:] >= 0).all()
    plain = tokenizer(next(DOCUMENTS.documents(3, 0)), add_special_tokens=False)["input_ids"]
    start = found.token_ids[:, 1:].flatten().tolist()[: len(plain)]
    assert start == plain, "nothing is lost where one context ends and the next begins"


def with_bos(tiny_lm: Callable[..., Any], template: str | None = None) -> LanguageModel:
    """A model whose tokenizer puts <|im_start|> in front of a text."""
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = tiny_lm()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.chat_template = template or tokenizer.chat_template
    return wrap_model(model, tokenizer)


def test_isolated_documents_begin_as_texts_do(tiny_lm: Callable[..., Any]) -> None:
    lm = with_bos(tiny_lm)
    stream = ContextStream(DOCUMENTS, lm, 16, 3, 1, isolated=True)
    found = everything(stream, 4)
    starts = document_positions(found.document_ids) == 0
    # A document that a context cuts goes on in the next one, which begins with BOS as well.
    assert starts.sum() > len(starts) and (found.token_ids[starts] == 1).all()
    assert (found.token_ids == 1).sum() == starts.sum()
    resumed = ContextStream(DOCUMENTS, lm, 16, 3, 1, isolated=True)
    first = ContextStream(DOCUMENTS, lm, 16, 3, 1, isolated=True)
    first.next_batch(5)
    resumed.load_state_dict(first.state_dict())
    later = resumed.next_batch(2)
    assert later is not None and torch.equal(later.token_ids, found.token_ids[5:7])


def test_bos_is_a_choice(tiny_lm: Callable[..., Any], shared_lm: Shared) -> None:
    for lm, bos, expected in (
        (shared_lm(), "auto", False), (shared_lm(), "always", True),
        (with_bos(tiny_lm), "auto", True), (with_bos(tiny_lm), "never", False),
    ):  # fmt: skip
        stream = ContextStream(DOCUMENTS, lm, 16, 3, 1, bos=bos)
        assert stream.prepend_bos == expected
        batch = stream.next_batch(4)
        assert batch is not None and bool((batch.token_ids[:, 0] == 1).all()) == expected
    model, tokenizer = tiny_lm()
    tokenizer.bos_token = None
    with pytest.raises(UsageError, match="`bos` always: the tokenizer of .* has no beginning"):
        ContextStream(DOCUMENTS, wrap_model(model, tokenizer), 16, 3, 1, bos="always")


def test_a_chat_that_begins_with_bos_gets_no_second_one(tiny_lm: Callable[..., Any]) -> None:
    template = "<|im_start|>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    lm = with_bos(tiny_lm, template)
    chat = [{"role": "user", "content": "Hi there, how are you"}]
    for isolated in (False, True):
        batch = ContextStream(Listed(chat), lm, 8, 0, 1, isolated=isolated).next_batch(1)
        assert batch is not None and batch.token_ids[0, :2].tolist().count(1) == 1


def test_the_end_of_a_text_is_not_the_end_of_a_turn(tiny_lm: Callable[..., Any]) -> None:
    _, tokenizer = tiny_lm()
    assert (tokenizer.eos_token, end_of_text(tokenizer)) == ("<|im_end|>", 0)
    tokenizer.eos_token = "<|endoftext|>"
    assert end_of_text(tokenizer) == 0
    tokenizer.eos_token = None
    assert end_of_text(tokenizer) is None


def test_rows_without_text_are_counted_and_leave_no_trace(shared_lm: Shared) -> None:
    texts = [f"some words of document {i}" for i in range(30)]
    full = ContextStream(InOrder(*texts), shared_lm(), 16, 0, 1)
    holes = InOrder(*texts[:10], [], *texts[10:20], [], [], *texts[20:])
    stream = ContextStream(holes, shared_lm(), 16, 0, 1)
    first = stream.next_batch(9)
    state = stream.state_dict()
    resumed = ContextStream(holes, shared_lm(), 16, 0, 1)
    resumed.load_state_dict(state)
    rest, other = everything(stream, 4), everything(resumed, 4)
    expected = everything(full, 4)
    assert first is not None and torch.equal(rest.token_ids, other.token_ids)
    assert torch.equal(torch.cat([first.token_ids, rest.token_ids]), expected.token_ids)
    assert stream.skipped_rows == resumed.skipped_rows == 3 and full.skipped_rows == 0


def test_chats_go_through_the_template_or_are_joined(shared_lm: Shared) -> None:
    chat = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello"}]
    for lm, rendered in (
        (shared_lm(), shared_lm().tokenizer.apply_chat_template(chat, tokenize=False)),
        (shared_lm(chat=False), "Hi there\nHello"),
    ):
        expected = lm.tokenizer(rendered)["input_ids"]
        batch = ContextStream(Listed(chat), lm, len(expected) + 1, 0, 1).next_batch(1)
        assert batch is not None and batch.token_ids[0].tolist() == [*expected, END]
        # Template tokens that are special are no text; the words around them are.
        assert torch.equal(batch.keep, ~torch.isin(batch.token_ids, lm.special_ids))


def test_every_epoch_has_an_order_of_its_own(shared_lm: Shared) -> None:
    lm = shared_lm()
    once = everything(ContextStream(DOCUMENTS, lm, 16, seed=4, epochs=1), 8)
    twice = everything(ContextStream(DOCUMENTS, lm, 16, seed=4, epochs=2), 8)
    later = everything(ContextStream(DOCUMENTS, lm, 16, seed=5, epochs=1), 8)
    size = len(once.token_ids)
    assert 2 * size <= len(twice.token_ids) <= 2 * size + 1
    assert torch.equal(twice.token_ids[:size], once.token_ids)
    # The second epoch follows without a gap, in the order of the next seed.
    stream = twice.token_ids.flatten().tolist()
    start = later.token_ids.flatten().tolist()[:96]
    assert any(stream[at : at + 96] == start for at in range(16 * size, 16 * size + 16))
    # The same number in another epoch is another document.
    assert twice.document_ids[:size].max() < twice.document_ids[size + 1 :].min()


@settings(max_examples=15, deadline=None)
@given(
    context=st.integers(2, 40),
    epochs=st.integers(1, 3),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    share=st.sampled_from([None, 0.25, 0.5, 0.9]),
)
def test_contexts_do_not_depend_on_how_they_are_asked_for(
    shared_lm: Shared, context: int, epochs: int, sizes: list[int], share: float | None
) -> None:
    """However the stream is cut, and wherever it is stopped and resumed, the contexts are equal."""
    lm = shared_lm()

    def fresh() -> ContextStream | MixedStream:
        corpus = ContextStream(DOCUMENTS, lm, context, 3, epochs)
        if share is None:
            return corpus
        replies = ContextStream(Listed("first reply", "second"), lm, context, 3, 10**6)
        return MixedStream(corpus, replies, share)

    expected = everything(fresh(), 4)
    stream = fresh()
    parts: list[ContextBatch] = []
    for size in sizes:
        batch = stream.next_batch(size)
        if batch is not None:
            parts.append(batch)
        state = json.loads(json.dumps(stream.state_dict()))
        stream = fresh()
        stream.load_state_dict(state)
        assert stream.state_dict() == state
    rest = everything(stream, 3) if sum(len(p.token_ids) for p in parts) < len(
        expected.token_ids
    ) else None  # fmt: skip
    joined = [*parts, rest] if rest is not None else parts
    found = ContextBatch(
        *(
            torch.cat([getattr(part, field) for part in joined])
            for field in ("token_ids", "keep", "document_ids", "numbers")
        )
    )
    assert same(found, expected)
    assert stream.next_batch(1) is None


def test_the_state_is_a_position_not_the_text(shared_lm: Shared) -> None:
    stream = ContextStream(Listed(words(5000)), shared_lm(), 16, 0, 1)
    stream.next_batch(3)
    assert len(json.dumps(stream.state_dict())) < 300


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.75])
def test_the_share_of_replies_is_exact(share: float, shared_lm: Shared) -> None:
    lm = shared_lm()
    corpus = ContextStream(Listed(*(words(90, f"c{i}") for i in range(9))), lm, 8, 0, 1)
    replies = ContextStream(Listed("reply one", "reply two"), lm, 8, 0, 10**6)
    found = everything(MixedStream(corpus, replies, share), 7)
    # Replies are numbered below the corpus; a context may hold several.
    is_reply = (found.document_ids < -1).all(dim=1)
    assert torch.equal(is_reply, (found.document_ids < 0).any(dim=1))
    counts = is_reply.long().cumsum(0)
    numbers = torch.arange(1, len(counts) + 1, dtype=torch.float64)
    assert torch.equal(counts, (numbers * share).long())
    alone = everything(ContextStream(corpus.corpus, lm, 8, 0, 1), 7)
    assert torch.equal(found.token_ids[~is_reply], alone.token_ids), "no context is lost"


def test_corpora_that_fill_no_context(shared_lm: Shared, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short")
    lm = shared_lm()
    config = TextConfig(data=(str(path),), context=64)
    with pytest.raises(UserError, match=r"holds fewer tokens than one context of 64: give more"):
        open_contexts(lm, config).next_batch(4)
    # Replies repeat until they fill one; it is the corpus that is too short.
    replies = tmp_path / "replies.jsonl"
    replies.write_text('{"text": "short"}\n')
    with pytest.raises(UserError, match=f"`data` {path} holds fewer tokens"):
        open_contexts(lm, config, replies).next_batch(4)


def test_contexts_longer_than_the_model(shared_lm: Shared) -> None:
    for family in ("gpt2", "llama", "gemma3_multimodal"):
        with pytest.raises(UsageError, match="`context` must be at most 1024, .* got 1025"):
            open_contexts(shared_lm(family), TextConfig(context=1025))


def test_replies_are_known_by_their_content_not_their_folder(
    shared_lm: Shared, tmp_path: Path
) -> None:
    identities = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "replies-1.jsonl"
        path.write_text('{"text": "reply"}\n')
        identities.append(open_contexts(shared_lm(), TextConfig(), path).identity())
    assert identities[0] == identities[1]
    assert str(tmp_path) not in json.dumps(identities)


def test_seed_orders_the_documents(shared_lm: Shared) -> None:
    batches = [
        open_contexts(shared_lm(), TextConfig(context=32, seed=seed)).next_batch(8)
        for seed in (0, 0, 1)
    ]
    assert all(batch is not None for batch in batches)
    assert same(batches[0], batches[1]) and not same(batches[0], batches[2])  # type: ignore[arg-type]


def test_a_chat_that_the_template_refuses(tiny_lm: Callable[..., Any]) -> None:
    model, tokenizer = tiny_lm()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    corpus = Listed([{"role": "tool", "content": "x"}])
    with pytest.raises(UserError, match="`data` listed .* refuses .roles must alternate"):
        ContextStream(corpus, wrap_model(model, tokenizer), 4, 0, 1).next_batch(1)


def test_what_breaks_later_does_not_stop_what_comes_before(
    shared_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents are tokenized some at a time; an error among them waits for its turn."""
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"document {n} about herons " * 4}) for n in range(8)]
    path.write_text("\n".join([*lines, "not json", *lines]) + "\n")
    lm, config = shared_lm(), TextConfig(data=(str(path),), context=16, batch_size=1)

    def read() -> list[list[int]]:
        stream, rows = open_contexts(lm, config), []
        with pytest.raises(UserError, match=r"a\.jsonl"):
            while (batch := stream.next_batch(1)) is not None:
                rows.append(batch.token_ids[0].tolist())
        return rows

    together = read()
    assert len(together) > 8
    monkeypatch.setattr(packing, "_DOCUMENTS_AT_ONCE", 1)
    assert read() == together
    monkeypatch.setattr(packing, "_DOCUMENTS_AT_ONCE", 32)
    monkeypatch.setattr(packing, "_CHARACTERS_AT_ONCE", 120)
    assert read() == together


def test_a_text_that_the_tokenizer_refuses_waits_for_its_turn(
    shared_lm: Shared, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": f"document {n} about herons " * 4}) for n in range(8)]
    # Valid JSON, and no text that can be encoded.
    path.write_text("\n".join([*good, '{"text": "half \\ud800 a pair"}', *good]) + "\n")
    stream = open_contexts(shared_lm(), TextConfig(data=(str(path),), context=16, batch_size=1))
    rows = 0
    with pytest.raises(
        UserError, match=r"a\.jsonl holds a text that the tokenizer .* refuses"
    ) as e:
        while stream.next_batch(1) is not None:
            rows += 1
    assert rows >= 1 and "\n" not in str(e.value)
    str(e.value).encode()


# --- text that changes between two runs


@pytest.mark.parametrize("change", ["later", "read", "half read", "one more", "none"])
def test_only_what_was_read_has_to_be_as_it_was(
    change: str, shared_lm: Shared, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [f"row {i} of some text" for i in range(40)]

    def opened() -> ContextStream:
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        config = TextConfig(data=(str(path),), context=19)
        stream = open_contexts(shared_lm(), config)
        assert isinstance(stream, ContextStream)
        return stream

    stream = opened()
    for _ in range(3):
        stream.next_batch(4)
    state, before = json.loads(json.dumps(stream.state_dict())), stream.identity()
    assert state["used"] > 0
    order = [rows.index(str(text)) for text in stream.corpus.documents(0, 0)]
    number = {"later": state["document"] + 1, "read": 3, "half read": state["document"]}
    if change in number:
        rows[order[number[change]]] += "!"
    elif change == "one more":
        rows.append("another row")
    again = opened()
    assert (again.identity() == before) == (change == "none")
    assert again.has_read(state, before) == (change in ("later", "none"))
    # And of a run that went on, the same is known.
    again.load_state_dict(state)
    again.next_batch(4)
    later, then = again.state_dict(), again.identity()
    rows[order[0]] += "?"
    assert not opened().has_read(later, then)


def test_states_of_earlier_versions_do_not_know_what_was_read(shared_lm: Shared) -> None:
    stream = ContextStream(DOCUMENTS, shared_lm(), 16, seed=3, epochs=1)
    stream.next_batch(2)
    state = stream.state_dict()
    del state["read"], state["part"]
    assert stream.has_read(state, stream.identity())
    assert not stream.has_read(state, [{"name": "other"}])
    stream.load_state_dict(state)
    assert "read" not in stream.state_dict()
