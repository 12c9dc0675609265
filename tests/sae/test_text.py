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
from saesteer.sae.corpora import Document, FileCorpus, open_corpus
from saesteer.sae.models import LanguageModel, wrap_model
from saesteer.sae.text import ContextBatch, ContextStream, MixedStream, open_contexts

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


def all_texts(name: str, seed: int = 0) -> list[Document]:
    return list(open_corpus([name]).documents(seed, 0))


# --- corpora


def test_text_files_are_cut_at_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}: {words(100, str(i))}." for i in range(30)]
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(paragraphs))
    texts = all_texts(str(path))
    assert 5 < len(texts) < 15, "several paragraphs a document"
    assert sum(len(str(text)) < 2000 for text in texts) <= 1, "only the file's end may be shorter"
    assert max(len(str(text)) for text in texts) < 3000
    # Each paragraph is whole, in one document, and none is lost.
    for paragraph in paragraphs:
        assert sum(paragraph in text for text in texts) == 1
    order = sorted(texts, key=lambda text: path.read_text().index(str(text)))
    assert "".join(map(str, order)) == path.read_text()
    assert all_texts(str(path), seed=1) != texts
    assert sorted(map(str, all_texts(str(path), seed=1))) == sorted(map(str, texts))


def test_text_without_blank_lines_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "one-line.txt"
    text = "".join(chr(0x4E00 + i % 5000) + "é🙂"[i % 2] for i in range(40_000))
    path.write_text(text)
    texts = sorted(map(str, all_texts(str(path))), key=text.index)
    assert "".join(texts) == text
    assert len(texts) > 3 and max(len(part.encode()) for part in texts) <= 65_536


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfHello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "Hello"}\n')
    assert all_texts(str(tmp_path / "a.txt")) == all_texts(str(tmp_path / "b.jsonl")) == ["Hello"]


def test_json_lines_with_text_and_messages(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = tmp_path / "a.jsonl"
    rows: list[dict[str, Any]] = [{"text": "One\n\ntwo"}, {"messages": chat, "id": 3}]
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    found = all_texts(str(path))
    assert len(found) == 2 and "One\n\ntwo" in found and chat in found


def test_a_folder_is_all_its_text_files(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("a.txt", "inner/b.md", "inner/c.rst", "ignored.py"):
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "d.jsonl").write_text('{"text": "text of d.jsonl"}\n')
    texts = all_texts(str(tmp_path))
    names = ("a.txt", "inner/b.md", "inner/c.rst", "d.jsonl")
    assert sorted(map(str, texts)) == sorted(f"text of {name}" for name in names)


def test_a_folder_of_a_project(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "corpus"  # a hidden folder above is none of the corpus
    for name in (".git/a.txt", "inner/.venv/b.md", ".c.txt", "inner/D.TXT", "inner/e.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")
    (folder / "F.JSONL").write_text('{"text": "text of F.JSONL"}\n')
    names = ["F.JSONL", "inner/D.TXT", "inner/e.txt"]
    assert sorted(map(str, all_texts(str(folder)))) == [f"text of {name}" for name in names]
    identity = open_corpus([str(folder)]).identity()
    assert identity["files"] == names and len(identity["sha256"]) == 3
    (folder / "inner" / "e.txt").rename(folder / "inner" / "g.txt")
    assert open_corpus([str(folder)]).identity() != identity


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('{"text": "one"}\n\n{"text": "two"}\n', ["one", "two"]),
        ('[\n  {"text": "one"}\n]\n', None),
        ('[{"text": "one"}]', None),
        ('{\n  "text": "one"\n}', None),
        ("not JSON at all", None),
    ],
)
def test_a_json_file(tmp_path: Path, content: str, texts: list[str] | None) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    if texts is not None:
        assert sorted(map(str, all_texts(str(path)))) == texts
        return
    with pytest.raises(UserError) as error:
        open_corpus([str(path)])
    assert f"--data {path} is a JSON file, not JSON lines" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_python_reference_is_always_there() -> None:
    from pydoc_data.topics import topics

    corpus = open_corpus(["python-docs"])
    texts = list(corpus.documents(3, 0))
    assert sorted(map(str, texts)) == sorted(topics.values())
    assert list(corpus.documents(3, 5)) == texts[5:] and list(corpus.documents(4, 0)) != texts
    assert corpus.identity()["name"] == "python-docs" and len(corpus.identity()["sha256"]) == 64


def test_a_dataset_is_streamed(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"row {i}", "more": i}) for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "held out"}))
    corpus = open_corpus([f"hf:{tmp_path}"])
    texts = list(corpus.documents(0, 0))
    assert sorted(map(str, texts)) == sorted(f"row {i}" for i in range(20))
    assert list(corpus.documents(0, 7)) == texts[7:]
    assert list(corpus.documents(1, 0)) != texts
    assert all_texts(f"hf:{tmp_path}:test") == ["held out"]
    assert all_texts(f"hf:{tmp_path}::test") == ["held out"]
    assert corpus.identity()["name"] == f"hf:{tmp_path}"
    for name in (
        f"hf:{tmp_path}:absent",
        f"hf:{tmp_path / 'absent'}",
        "hf:no/such",
        "hf:no/such:a:b",
    ):
        with pytest.raises(UserError, match=f"--data {name}") as caught:
            open_corpus([name])
        assert "\n" not in str(caught.value)
    for name in ("hf:", "hf:a:b:c:d"):
        with pytest.raises(UserError, match=r"must read hf:DATASET\[:config\]\[:split\]"):
            open_corpus([name])


def test_a_dataset_that_breaks_off_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "row"}\n')
    corpus = open_corpus([f"hf:{tmp_path}"])
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(UserError, match="broke off .*--resume"):
        list(corpus.documents(0, 0))


def test_several_corpora_take_turns(tmp_path: Path) -> None:
    for name, rows in (("long", 9), ("short", 3)):
        lines = [json.dumps({"text": f"{name} {i}"}) for i in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    corpus = open_corpus([str(tmp_path / "long.jsonl"), str(tmp_path / "short.jsonl")])
    texts = [str(text) for text in corpus.documents(0, 0)]
    kinds = [text.split()[0] for text in texts]
    assert kinds == ["long", "short"] * 3 + ["long"] * 6 and len(set(texts)) == 12
    for start in range(13):
        assert list(corpus.documents(0, start)) == texts[start:]
    assert [part["name"] for part in corpus.identity()["parts"]] == corpus.name.split(",")


def test_identity_is_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one text")
    before = open_corpus([str(path)]).identity()
    assert open_corpus([str(path)]).identity() == before
    path.write_text("another")
    assert open_corpus([str(path)]).identity() != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text: give at least one document"),
        ("a.txt", b" \n\n \n", "holds no text"),
        ("a.jsonl", b"\n\n", "holds no text"),
        ("a.txt", b"caf\xe9 and more", r"is not UTF-8 \(byte 3\): convert it"),
        ("a.txt", "text".encode("utf-16"), r"is not UTF-8 \(byte 0\)"),
        ("a.txt", b"\x80" * 200_000, "is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"\(byte 14\) has a line that is not JSON"),
        ("a.jsonl", b'{"body": "a"}', "neither `text` .* nor `messages` .*; it has: body"),
        ("a.jsonl", b'["a"]', "it has: list"),
        ("a.jsonl", b'{"text": null}', "it has: text"),
        ("a.jsonl", b'{"messages": []}', "it has: messages"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "it has: messages"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": [1]}]}', "it has: messages"),
    ],
)
def test_files_that_are_no_corpus(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        all_texts(str(path))
    assert f"--data {path}" in str(caught.value) and "\n" not in str(caught.value)


def test_paths_that_are_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data absent.txt does not exist: give a file, a folder"):
        open_corpus(["absent.txt"])
    (tmp_path / "a.py").write_text("pass")
    with pytest.raises(UserError, match="is a folder without .txt, .md, .rst, .jsonl files"):
        open_corpus([str(tmp_path)])


def test_a_chat_that_the_template_refuses(tiny_lm: Callable[..., Any]) -> None:
    model, tokenizer = tiny_lm()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    corpus = Listed([{"role": "tool", "content": "x"}])
    with pytest.raises(UserError, match="--data listed .* refuses .roles must alternate"):
        ContextStream(corpus, wrap_model(model, tokenizer), 4, 0, 1).next_batch(1)


# --- packing


def test_documents_are_packed_end_to_end(shared_lm: Shared) -> None:
    lm = shared_lm()
    stream = ContextStream(DOCUMENTS, lm, 16, seed=3, epochs=1)
    found = everything(stream, 5)
    ids: list[int] = []
    owners: list[int] = []
    for number, text in enumerate(DOCUMENTS.documents(3, 0)):
        tokens = lm.tokenizer(text)["input_ids"] + [lm.tokenizer.eos_token_id]
        ids += tokens
        owners += [number] * len(tokens)
    whole = len(ids) // 16 * 16
    assert len(ids) > whole, "something is left that fills no context"
    assert found.token_ids.flatten().tolist() == ids[:whole]
    assert found.document_ids.flatten().tolist() == owners[:whole]
    assert torch.equal(found.keep, found.token_ids != lm.tokenizer.eos_token_id)
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


def test_chats_go_through_the_template_or_are_joined(shared_lm: Shared) -> None:
    chat = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello"}]
    for lm, rendered in (
        (shared_lm(), shared_lm().tokenizer.apply_chat_template(chat, tokenize=False)),
        (shared_lm(chat=False), "Hi there\nHello"),
    ):
        expected = lm.tokenizer(rendered)["input_ids"]
        batch = ContextStream(Listed(chat), lm, len(expected) + 1, 0, 1).next_batch(1)
        assert batch is not None and batch.token_ids[0].tolist() == [*expected, 2]
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
    assert len(json.dumps(stream.state_dict())) < 100


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
    with pytest.raises(UserError, match=f"--data {path} holds fewer tokens"):
        open_contexts(lm, config, replies).next_batch(4)


def test_contexts_longer_than_the_model(shared_lm: Shared) -> None:
    for family in ("gpt2", "llama", "gemma3_multimodal"):
        with pytest.raises(UsageError, match="--context must be at most 1024, .* got 1025"):
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


def test_files_are_never_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(words(300, f"p{i}") for i in range(40)))
    corpus = FileCorpus("a", [path])
    sizes: list[int] = []
    original = FileCorpus._read

    def read(self: FileCorpus, where: Path, start: int, end: int) -> Document:
        sizes.append(end - start)
        return original(self, where, start, end)

    monkeypatch.setattr(FileCorpus, "_read", read)
    documents = corpus.documents(0, 0)
    assert sizes == []
    next(documents)
    assert len(sizes) == 1 and sizes[0] < path.stat().st_size / 10
