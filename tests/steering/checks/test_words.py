"""Sentences and fences."""

import pytest

from saesteer.steering.checks import words


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Dr. Okafor met Mrs. K. Delgado at 3.14 p.m. exactly.", None),
        ("It cost 2.50 in St. Ives.", None),
        ('"Stop!" He stopped.', ['"Stop!"', "He stopped."]),
        ("他来了。她走了。", ["他来了。", "她走了。"]),
        ("...", ["..."]),
        ("", []),
    ],
)
def test_sentences(text: str, parts: list[str] | None) -> None:
    assert words.sentences(text) == ([text] if parts is None else parts)


def test_fences_tell_open_blocks_from_closed_ones() -> None:
    assert words.fences("a\n```Python\nx = 1\n```\nb") == [("python", "x = 1\n", True)]
    assert words.fences("```json\n{") == [("json", "{", False)]
    assert words.prose("see `code` at https://a.b and\n```\ncode\n``` end").split() == [
        "see", "at", "and", "end"
    ]  # fmt: skip
