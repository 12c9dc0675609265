"""Words that exist in a language, and names."""

import pytest

from saesteer.steering.grades import real_words as module
from saesteer.steering.grades.real_words import names, real_words


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
