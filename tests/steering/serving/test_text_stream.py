"""Text from tokens one by one is the text of all of them."""

import random
from typing import Any

import pytest

from saesteer.steering.serving.routes.answers import token_bytes
from saesteer.steering.serving.text_stream import TextStream


def streamed(tokenizer: Any, ids: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stops)
    said = []
    for token in ids:
        said.append(stream.add(token)[0])
        if stream.stopped:
            return said
    return [*said, stream.finish()]


def test_characters_of_several_tokens_come_whole(tiny_tokenizer: Any) -> None:
    text = "Größe: 3 ≤ 5 — 日本語 🙂 é"
    ids = tiny_tokenizer(text)["input_ids"]
    said = streamed(tiny_tokenizer, ids)
    assert "".join(said) == text
    assert all("\ufffd" not in piece for piece in said)
    assert len(ids) > len(text)  # some characters are several tokens
    assert b"".join(token_bytes(tiny_tokenizer, i) or b"?" for i in ids).decode() == text


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_give_the_text_that_decode_gives(tiny_tokenizer: Any, seed: int) -> None:
    ids = random.Random(seed).choices(range(400), k=60)
    assert "".join(streamed(tiny_tokenizer, ids)) == tiny_tokenizer.decode(
        ids, skip_special_tokens=True
    )


def test_pieces_are_the_text_before_anything_is_held_back(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("one two three END of it")["input_ids"]
    stream = TextStream(tiny_tokenizer, ["END of nothing"])
    pairs = [stream.add(token) for token in ids]
    assert "".join(piece for _, piece in pairs) == "one two three END of it"
    assert any(text != piece for text, piece in pairs)
    assert "".join(text for text, _ in pairs) + stream.finish() == "one two three END of it"


@pytest.mark.parametrize(
    ("stops", "said"),
    [
        (("three",), "one two "),
        (("wo th", "three"), "one t"),
        (("absent", "ee E"), "one two thr"),
        (("absent",), "one two three END"),
        (("one",), ""),
        (("ENDS",), "one two three END"),
    ],
)
def test_text_ends_before_the_first_stop_string(
    tiny_tokenizer: Any, stops: tuple[str, ...], said: str
) -> None:
    ids = tiny_tokenizer("one two three END")["input_ids"]
    assert "".join(streamed(tiny_tokenizer, ids, stops)) == said
