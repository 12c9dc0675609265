"""Answers and positions as tokens; pairs that one token cannot score are refused or dropped."""

from collections.abc import Callable
from typing import Any

import pytest

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.data.encoding import encode_pairs, every_token
from saesteer.mechanisms.data.pairs import Pair
from saesteer.sae.model.language_model import LanguageModel, wrap_model

Make = Callable[..., tuple[Any, Any]]
TEXT = "The name of the class is"


@pytest.fixture
def lm(tiny_lm: Make) -> LanguageModel:
    return wrap_model(*tiny_lm())


def test_answers_are_the_tokens_that_follow(lm: LanguageModel) -> None:
    spans = {"query": ((4, 8), (4, 8)), "all": ((0, len(TEXT)), (0, 9))}
    pair = Pair(TEXT, "The names were", " in", " of the", spans, "g", 0.5)
    (found,), dropped = encode_pairs(lm, [pair], allow_copies=True)
    assert dropped == [] and (found.group, found.chance, found.longer) == ("g", 0.5, False)
    assert lm.tokenizer.decode([found.answer]) == " in"
    assert lm.tokenizer.decode([found.wrong]) == " of"
    assert found.place("last") == (len(found.clean) - 1, len(found.corrupt) - 1)
    assert found.place("first") == found.place("all-first") == (0, 0)
    assert found.place("query") == found.place("query-last")
    first, last = found.place("query-first")[0], found.place("query")[0]
    assert lm.tokenizer.decode(found.clean[first : last + 1]).strip() == "name"
    assert found.place("token:2") == (2, 2)
    with pytest.raises(
        UsageError, match="`at` must be one of first, last, query, .* got 'nowhere'"
    ):
        found.place("nowhere")


def test_without_answers_they_are_the_models_own(lm: LanguageModel) -> None:
    (found,), _ = encode_pairs(lm, [Pair(TEXT, "def f(x)")])
    (chat,), _ = encode_pairs(lm, [Pair(TEXT, "def f(x)")], chat=True)
    assert found.wrong is not None and found.answer != found.wrong
    assert len(chat.clean) > len(found.clean) and chat.clean[0] == 1


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        (Pair(TEXT, "b c", " in", " in"), "answer and wrong begin with the same token ' in'"),
        (Pair(TEXT, "b c", " namespace", None, {"query": ((4, 8), (0, 1))}), "copying would score"),
        (Pair("The nam", "b c", "e"), "melts into the last token"),
    ],
)
def test_pairs_that_one_token_cannot_score(lm: LanguageModel, pair: Pair, says: str) -> None:
    with pytest.raises(UserError, match=f"^pair 1: .*{says}"):
        encode_pairs(lm, [pair])
    good = Pair(TEXT, "b c", " in")
    found, dropped = encode_pairs(lm, [good, pair], drop=True)
    assert len(found) == 1 and len(dropped) == 1 and dropped[0].startswith("pair 2: ")
    with pytest.raises(UserError, match="`pairs` holds no pair that can be scored, first pair 1"):
        encode_pairs(lm, [pair], drop=True)


def test_a_name_that_covers_no_token(lm: LanguageModel) -> None:
    empty = Pair("a  b", "a b", " in", None, {"gap": ((4, 4), (0, 1))})
    with pytest.raises(UserError, match=r"pair 1: position 'gap' \(''\) covers no token"):
        encode_pairs(lm, [empty])


def test_every_token_needs_one_length(lm: LanguageModel) -> None:
    same, _ = encode_pairs(lm, [Pair("a b c", "c b a", " in")])
    assert every_token(same) == [f"token:{t}" for t in range(len(same[0].clean))]
    other, _ = encode_pairs(lm, [Pair("a b c", "c b", " in")])
    with pytest.raises(UsageError, match="`at` all needs runs of one length, got 2 to 3 tokens"):
        every_token(other)
