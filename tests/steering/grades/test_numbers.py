"""Numbers in digits, in all the ways of parting their thousands."""

import pytest

from saesteer.steering.grades.numbers import keeps_numbers, numbers


def test_numbers_are_compared_by_their_digits() -> None:
    assert numbers("In 1666, 3,000 pots at 14:30 and 2.5 l") == {
        "1666", "3000", "1430", "25"
    }  # fmt: skip
    assert keeps_numbers("Es waren 3.000 im Jahr 1666.", "There were 3,000 in 1666.")
    assert not keeps_numbers("Es waren viele im Jahr 1666.", "There were 3,000 in 1666.")
    assert keeps_numbers("ja", "yes")


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        ("2,500 people", "2\u202f500 personnes"),
        ("2,500 people", "2 500 osób"),
        ("12,345,678 people", "12 345 678 Leute"),
        ("at 09:45", "à 9 h 45"),
        ("at 09:45", "um 9.45 Uhr"),
        ("at 10:05", "um 10 Uhr 05"),
        ("25 boats", "२५ नावें"),
        ("25 boats", "٢٥ قاربا"),
    ],
)
def test_numbers_are_kept_in_other_hands(source: str, answer: str) -> None:
    assert keeps_numbers(answer, source)


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        ("2,500 people", "250 personnes"),
        ("2,500 people", "2 et 500"),
        ("3.5 km", "3 ou 5 km"),
        ("at 09:45", "à 9 h"),
        ("12 cats and 300 dogs", "12 300 dogs"),
    ],
)
def test_numbers_that_are_lost(source: str, answer: str) -> None:
    kept = keeps_numbers(answer, source)
    # Nobody can tell "12 300" from two numbers: that one passes.
    assert kept is (answer == "12 300 dogs")
