"""Pieces of text join to the text, also where tokens share a character."""

from typing import Any

import pytest

from saesteer.sae.reading.pieces import Pieces, visible


@pytest.mark.parametrize(
    "text", ["plain words", "Émile's café, naïve", "日本語 and 🙂🙂!", " two\n\tlines ", "🙂"]
)
def test_pieces_join_to_the_text(text: str, tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    found = Pieces(tiny_tokenizer).of(ids)
    assert len(found) == len(ids) and "".join(found) == text


def test_a_shared_character_is_the_piece_of_its_last_token(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("a🙂", add_special_tokens=False)["input_ids"]
    assert Pieces(tiny_tokenizer).of(ids) == ["a", *[""] * (len(ids) - 2), "🙂"]


def test_half_a_character_is_shown_as_broken(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("🙂x", add_special_tokens=False)["input_ids"][1:]
    pieces = Pieces(tiny_tokenizer).of(ids)
    assert pieces[-1] == "x" and set("".join(pieces[:-1])) == {"�"}
    assert "�" not in Pieces(tiny_tokenizer).one(ids[0])  # a name in place of it


def test_line_breaks_become_signs() -> None:
    assert visible("a\n\tb\r c") == "a↵⇥b␍ c" and visible(" word") == " word"
