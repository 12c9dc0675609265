"""Function words where none can stand, and good sentences that come close to them."""

import json

import pytest

from saesteer.steering.grades.word_order import MOST_BREAKS, knows_order, order_breaks, scrambled
from saesteer.steering.tasks.task import DEFAULT_CONTENTS

GOOD = {
    "fr": (
        "Il le voit et lui dit de ne pas le faire.",
        "Ce sont des amis, avec ou sans leurs enfants, qui viennent un ou deux jours.",
        "Puis-je aider ? Nous nous levons tôt, et vous vous levez tard.",
    ),
    "de": (
        "Er stand auf und ging, weil das Brot, das in der Küche lag, noch warm war.",
        "Kommst du mit oder bleibst du bei ihm? Schalt doch dein Handy ein!",
        "Die Leute, die in Berlin wohnen, fahren mit einem oder zwei Rädern.",
    ),
    "es": (
        "Los de la casa se la llevaron sin decir nada, y el que vino no era de aquí.",
        "No fue el lunes, sino el martes, con una o dos horas de retraso.",
    ),
    "it": (
        "Lo ha visto e gli ha detto che la casa è vuota.",
        "Quello di ieri era buono, con o senza zucchero.",
    ),
    "en": (
        "The one we had dealt with was lost, and, despite many promises, never found.",
        "It opens at 2 a.m. or so, with or without him, for one or two hours.",
        "I know that that is what he had had to do; a can of soup is not the will of God.",
    ),
}
BAD = {
    "fr": "La de pain le dans a et table une sur le.",
    "de": "Mit einem der und Brot im die Küche von und warm.",
    "es": "El pan de y mesa una en la porque un.",
    "it": "Il di pane e tavola una in del perché un.",
    "en": "The of bread a in the was and table an.",
}


@pytest.mark.parametrize("lang", GOOD)
def test_good_sentences_break_no_rule(lang: str) -> None:
    for text in GOOD[lang]:
        found = order_breaks(text, lang)
        assert found is not None and found[0] == 0, text


@pytest.mark.parametrize("lang", BAD)
def test_words_in_no_order_break_many(lang: str) -> None:
    found = order_breaks(BAD[lang], lang)
    assert found is not None and found[0] > 2 * MOST_BREAKS * found[1]


def test_the_built_in_contents_break_no_rule() -> None:
    rows = DEFAULT_CONTENTS.read_text(encoding="utf-8").splitlines()
    for row in rows:
        found = order_breaks(json.loads(row)["text"], "en")
        assert found is not None and found[0] <= MOST_BREAKS * found[1], row


def test_repeats_elisions_and_capitals() -> None:
    assert order_breaks("the bread bread is warm", "en") == (1, 5)
    assert order_breaks("an bread and a apple", "en") == (2, 5)
    assert order_breaks("le pain de eau", "fr") == (1, 4)
    assert order_breaks("the bread Which was warm", "en") == (1, 5)
    assert order_breaks("LE PAIN EST SUR LA TABLE", "fr") == (0, 6)


def test_languages_without_rules() -> None:
    assert order_breaks("abc", "fi") is None and not knows_order("fi") and knows_order("it")


def test_the_sources_words_without_their_neighbours() -> None:
    source = "The cook tasted the sauce, frowned and reached for the vinegar."
    assert scrambled(source, "Vinegar the frowned cook for sauce and tasted the reached?")
    assert not scrambled(source, "Why did the cook taste the sauce and reach for the vinegar?")
    assert not scrambled(source, "The sauce was tasted by the cook.")
    assert not scrambled(source, "Vinegar sauce cook.")  # too short to tell
