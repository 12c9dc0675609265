"""Content words, and how many of them an answer holds."""

import pytest

from saesteer.steering.grades.content import content_words_in_order, coverage, lemma, same_order

SPOON = "Leila stirs the porridge with the handle of a wooden spoon."


def test_content_words_are_neither_common_nor_function_words() -> None:
    assert content_words_in_order(SPOON, "en") == [
        "Leila", "stirs", "porridge", "handle", "wooden", "spoon",
    ]  # fmt: skip
    assert content_words_in_order("It was there, and they were 14.", "en") == []


def test_coverage_is_by_lemma_and_stem() -> None:
    held = coverage(SPOON, "Why was Leila stirring porridge? With spoons, I was told.", "en")
    assert held.found == ("Leila", "stirs", "porridge", "spoon")
    assert held.missing == ("handle", "wooden") and held.share == pytest.approx(4 / 6)
    assert coverage(SPOON, "", "en").share == 0.0
    assert coverage("It is.", "It is.", "en").share == 0.0


def test_lemmas() -> None:
    assert lemma("spoons", "en") == "spoon" and lemma("ran", "en") == "run"
    assert lemma("Bäume", "de") == "baum" and lemma("anything", "xx") == "anything"


def test_order_of_a_copy() -> None:
    assert same_order(SPOON, SPOON.upper()) == 1.0
    backwards = " ".join(reversed(SPOON.split()))
    assert same_order(SPOON, backwards) < 0.3


def test_how_much_of_an_answer_is_the_content() -> None:
    held = coverage(SPOON, "Leila stirs porridge; cats, dogs and horses watch.", "en")
    assert held.of_answer == pytest.approx(3 / 7)
    assert coverage(SPOON, "It is.", "en").of_answer == 0.0
