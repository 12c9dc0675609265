"""Corpora of every kind, in a seeded order, and what is no corpus."""

import contextlib
import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saesteer.checkpoints.errors import UserError
from saesteer.sae.text.corpora import FileCorpus, open_corpus, try_corpora
from saesteer.sae.text.rows import Document


def words(count: int, prefix: str) -> str:
    return " ".join(f"{prefix}{i}" for i in range(count))


def all_texts(name: str, seed: int = 0) -> list[Document]:
    return list(open_corpus([name]).documents(seed, 0))


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
    assert f"`data` {path} is a JSON file, not JSON lines" in str(error.value)
    assert "\n" not in str(error.value)


def as_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)


def as_gzip(path: Path, rows: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.parquet", as_parquet),
        ("A.CSV", as_csv),
        ("a.tsv", as_csv),
        ("a.jsonl.gz", as_gzip),
    ],
)
def test_tables_are_streamed(
    name: str, write: Callable[[Path, list[dict[str, Any]]], None], tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path, [{"text": f"row {i}\nof\u2028it", "id": i} for i in range(30)])
    corpus = open_corpus([str(path)])
    texts = list(corpus.documents(0, 0))
    assert sorted(map(str, texts)) == sorted(f"row {i}\nof\u2028it" for i in range(30))
    assert list(corpus.documents(0, 7)) == texts[7:]
    assert list(corpus.documents(1, 0)) != texts
    identity = corpus.identity()
    assert identity["name"] == str(path) and len(identity["sha256"]) == 1
    write(path, [{"text": "another", "id": 0}])
    assert open_corpus([str(path)]).identity()["sha256"] != identity["sha256"]


def test_chats_in_a_table(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    as_parquet(tmp_path / "a.parquet", [{"messages": chat}])
    assert all_texts(str(tmp_path / "a.parquet")) == [chat]


def test_line_separators_inside_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["one\u2028two", "three\u2029four\x85five"]
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\r\n" for t in texts))
    assert sorted(map(str, all_texts(str(path)))) == sorted(texts)


def test_the_first_documents_are_tried_without_an_index(tmp_path: Path) -> None:
    good, bad = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    good.write_text('{"text": "one"}\nnot JSON\n')
    try_corpora([str(good), "python-docs"])  # what comes later, the work itself finds
    bad.write_text('{"body": "one"}\n')
    with pytest.raises(UserError, match="it has: body"):
        try_corpora([str(good), str(bad)])
    with pytest.raises(UserError, match="it has: body"):
        try_corpora([str(tmp_path)])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="holds no text"):
        try_corpora([str(tmp_path / "empty.txt")])


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
        with pytest.raises(UserError, match=f"`data` {name}") as caught:
            open_corpus([name])
        assert "\n" not in str(caught.value)
    for name in ("hf:", "hf:a:b:c:d"):
        with pytest.raises(UserError, match=r"must read hf:DATASET\[:config\]\[:split\]"):
            open_corpus([name])


def test_a_dataset_that_breaks_off_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "row"}\n')
    corpus = open_corpus([f"hf:{tmp_path}"])
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(UserError, match="broke off .*`resume`"):
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
        (
            "a.jsonl",
            b'{"body": "a", "id": 1}',
            "nor `messages` .*; it has: body, id; rename body to",
        ),
        ("a.jsonl", b'{"conversations": []}', "rename conversations to messages, with role"),
        ("a.jsonl", b"{}", "it has: no field; rename the field that holds the text"),
        ("a.jsonl", b"[" * 100_000, "a line that is not JSON .*nested too deeply"),
        ("a.pdf", b"%PDF", "is no text file: unpack or export it as .txt, or as JSON lines"),
        ("a.txt.gz", b"", "is no text file"),
        ("a.csv", b"", "(cannot be read as csv|broke off)"),
        ("a.csv", b"text\n", "holds no row: give at least one document"),
        ("a.csv", b"body,id\nx,1\n", "it has: body, id; rename body to text"),
        ("a.parquet", b"PAR1", "(cannot be read as parquet|broke off) .*check the file"),
        ("a.jsonl", b'["a"]', "has a row that is a list"),
        ("a.jsonl", b'{"text": 5}', "has a row whose `text` is a int"),
        ("a.jsonl", b'{"messages": []}', "`messages` is no list with a message in it"),
        ("a.jsonl", b'{"messages": ["hello"]}', "message 1 of a row has no role"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "`content` of message 1 of a row is null"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": null, "tool_calls": []}]}',
            "is null beside tool calls",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "holds parts that are not text",
        ),
    ],
)
def test_files_that_are_no_corpus(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        all_texts(str(path))
    assert f"`data` {path}" in str(caught.value) and "\n" not in str(caught.value)


def test_paths_that_are_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`data` absent.txt does not exist: give a file, a folder"):
        open_corpus(["absent.txt"])
    (tmp_path / "a.py").write_text("pass")
    with pytest.raises(UserError, match=r"is a folder without .txt, .md, .rst, .jsonl files$"):
        open_corpus([str(tmp_path)])
    (tmp_path / "a.parquet").touch()
    with pytest.raises(UserError, match=f"files; write hf:{tmp_path} to stream the tables in it"):
        open_corpus([str(tmp_path)])
    for name in ("wikitext", "stas/openwebtext-10k", "Salesforce/wikitext:wikitext-2-v1"):
        with pytest.raises(UserError, match=f"to stream {name} from the Hub write hf:{name}"):
            open_corpus([name])


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


def test_a_script_in_the_folder_of_a_dataset_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(UserError, match="could not be opened"):
        open_corpus([f"hf:{folder}"])
    (folder / "train.jsonl").write_text('{"text": "words"}\n')
    with contextlib.suppress(UserError):
        list(open_corpus([f"hf:{folder}"]).documents(0, 0))
    assert not (tmp_path / "ran").exists()


def test_parts_of_text_are_one_text_and_null_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    rows = [{"messages": [{"role": "user", "content": parts}]}, {"text": None}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(open_corpus([str(path)]).documents(0, 0))
    assert [{"role": "user", "content": "one two"}] in found and [] in found


def test_a_streamed_folder_is_known_by_its_text(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"train-{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    before = open_corpus([f"hf:{tmp_path}"]).identity()
    assert open_corpus([f"hf:{tmp_path}"]).identity() == before
    (tmp_path / "train-b.jsonl").write_text(json.dumps({"text": "c"}) + "\n")
    assert open_corpus([f"hf:{tmp_path}"]).identity() != before
