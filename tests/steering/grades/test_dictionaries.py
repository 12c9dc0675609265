"""Dictionaries in dictd's format: plain, packed in one piece, and packed in chunks."""

from pathlib import Path

import pytest

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.steering.grades.dictionaries import (
    VARIABLE,
    bilingual,
    dictionary_folder,
    how_to_install,
)

from .dictd_files import EN_FR, write_dictionary, write_french


@pytest.mark.parametrize("packed", ["plain", "gzip", "dictzip"])
def test_entries_are_read_however_the_text_is_packed(tmp_path: Path, packed: str) -> None:
    write_dictionary(tmp_path, "freedict-eng-fra", EN_FR, packed=packed)
    both = bilingual("en", "fr", tmp_path)
    assert both is not None and both.backward is None
    for word, entry in EN_FR.items():  # entries lie across the borders of chunks
        assert both.forward.entries(word) == [entry]
    assert both.forward.entries("brea") == both.forward.entries("course") == []


def test_translations_are_what_an_entry_offers(tmp_path: Path) -> None:
    both = bilingual("en", "fr", write_french(tmp_path))
    assert both is not None and both.names == ["freedict-eng-fra", "freedict-fra-eng"]
    meanings = both.forward.translations
    assert meanings("Spoon") == {("cuiller",), ("cuillère",)}
    assert meanings("stir") == {("bouger",), ("remuer",), ("agiter",)}
    assert meanings("handle") == {("manche",)}  # no example, no synonym
    assert meanings("wooden") == {("de", "bois"), ("en", "bois")}
    assert meanings("camel") == frozenset()
    assert both.backward is not None
    assert both.backward.translations("bouillie") == {("porridge",), ("mash",)}


def test_several_entries_of_a_word_and_letters_beyond_ascii(tmp_path: Path) -> None:
    write_dictionary(tmp_path, "deu-eng", {"größe": "Größe\nsize\n", "löffel": "Löffel\nspoon\n"})
    index = tmp_path / "deu-eng.index"
    index.write_text(index.read_text() + index.read_text(), encoding="utf-8")
    write_dictionary(tmp_path / "eng-deu", "eng-deu", {"size": "size\nGröße\n"})
    both = bilingual("en", "de", tmp_path)  # the names of other releases
    assert both is not None and both.backward is not None
    assert len(both.backward.entries("Größe")) == 2
    assert both.backward.translations("Größe") == {("size",)}


def test_where_dictionaries_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(write_french(tmp_path / "mine")))
    assert bilingual("en", "fr") is not None
    assert bilingual("en", "de") is None and bilingual("en", "xx") is None
    assert "dict-freedict-eng-deu and dict-freedict-deu-eng" in how_to_install("en", "de")
    with pytest.raises(UsageError, match=r"`dictionaries` .*nowhere is no folder"):
        bilingual("en", "fr", tmp_path / "nowhere")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=f"{VARIABLE} .*nowhere is no folder"):
        dictionary_folder()


@pytest.mark.parametrize("index", [b"", b"no tabs here\n", b"word\t?\t?\n"])
def test_other_files_are_refused(tmp_path: Path, index: bytes) -> None:
    (tmp_path / "eng-fra.index").write_bytes(index)
    (tmp_path / "eng-fra.dict").write_bytes(b"text")
    with pytest.raises(UserError, match=r"eng-fra.index and eng-fra.dict are no dictionary"):
        bilingual("en", "fr", tmp_path)
