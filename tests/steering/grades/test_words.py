"""Words that exist, names, content words, and the words of replies of a form."""

import pytest

from saesteer.steering.grades import real_words as module
from saesteer.steering.grades.content import content_words_in_order, coverage, lemma, same_order
from saesteer.steering.grades.real_words import names, real_words
from saesteer.steering.grades.spoken import spoken

SPOON = "Leila stirs the porridge with the handle of a wooden spoon."


def test_words_of_a_language_exist() -> None:
    found = real_words("Leila remue la soupe avec une cuillère en bois.", "fr", aside={"leila"})
    assert found is not None
    assert (found.share, found.counted, found.unknown) == (1.0, 8, ())


def test_salad_has_words_that_do_not_exist() -> None:
    found = real_words("La belle en parmade d'un dul peu de bon je suis d'abot.", "fr")
    assert found is not None
    assert found.unknown == ("parmade", "dul", "abot")
    assert found.share == pytest.approx(1 - 3 / 12)  # the two d are single letters


def test_words_of_the_prompts_language_are_not_of_the_answers() -> None:
    """French lists hold English words too; they are no French in an answer to English."""
    text = "Le bread est sur the table with une spoon."
    mixed = real_words(text, "fr", other="en")
    assert mixed is not None and mixed.unknown == ("bread", "the", "with", "spoon")
    assert mixed.longest_run == 1
    text = "Sure, here is the translation: le pain est sur la table"
    opening = real_words(text, "fr", other="en")
    assert opening is not None and opening.longest_run > module.MOST_FOREIGN_RUN


def test_german_compounds_are_words() -> None:
    found = real_words("Der Stiel des Holzlöffels lag neben der Hafersuppe.", "de")
    assert found is not None and found.share == 1.0
    salad = real_words("Der Poringelwurz gerührte.", "de")
    assert salad is not None and "poringelwurz" in salad.unknown


def test_no_list_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assert real_words("ただの文", "ja") is None
    assert "no list of words for the language 'ja'" in module.reason_without("ja")


def test_names_of_a_source() -> None:
    text = "Leila met Bergen Smith in the old town of Oslo. Somehow the cello was lost."
    assert names(text, "en") == {"leila", "bergen", "smith", "oslo"}


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


def test_what_a_reply_says_in_words() -> None:
    body = '{"a": "One boat", "b": [2, {"c": "left"}], "d": true}'
    assert spoken("json", f"```json\n{body}\n```") == "One boat. 2. left"
    assert spoken("json", "One boat left") is None
    code = "# Two boats\nsay = 'left early'\nprint(say, 3)"
    said = spoken("python", f"Here:\n```python\n{code}\n```")
    assert said is not None and set(said.split(". ")) == {"left early", "3", "Two boats"}
    assert spoken("python", "print('open") is None
    assert spoken("bullets", "- One *boat*\n2. It left") == "One  boat \nIt left"
