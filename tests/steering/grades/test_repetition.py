"""Loops: the share of the most repeated 4-gram, and what goes on differently."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saesteer.steering.grades.repetition import DEGENERATE_SHARE, is_degenerate, repetition


def _repetition_slow(tokens: list[int]) -> float:
    """Mark, for each repeated 4-gram, the tokens it covers; the largest share."""
    best = 0
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    for gram in set(grams):
        if grams.count(gram) > 1:
            marked = {i + d for i, other in enumerate(grams) if other == gram for d in range(4)}
            best = max(best, len(marked))
    return best / len(tokens) if tokens else 0.0


@given(st.lists(st.integers(0, 2), max_size=40))
def test_repetition_equals_the_slow_count(tokens: list[int]) -> None:
    assert repetition(tokens) == _repetition_slow(tokens)


def test_repetition_of_known_sequences() -> None:
    assert repetition([]) == 0.0
    assert repetition(list(range(40))) == 0.0
    assert repetition([7] * 10) == 1.0
    assert repetition("a b c d a b c d".split()) == 1.0
    twice = [1, 2, 3, 4, *range(10, 42), 1, 2, 3, 4]  # 8 of 40 tokens: exactly the limit
    assert repetition(twice) == 0.2 and not is_degenerate(twice)
    thrice = [*twice[:20], 1, 2, 3, 4, *twice[24:]]  # 12 of 40
    assert repetition(thrice) == 0.3 and is_degenerate(thrice)


FORMS = {
    "a list": "- The road is wet .\n- The road is shut .\n- The road is long .\n- Rain fell .",
    "records": '{ "city" : "Rome" } , { "city" : "Oslo" } , { "city" : "Bern" }',
    "calls": 'say ( "one" )\nsay ( "two" )\nsay ( "three" )',
}
LOOPS = {
    "a sentence": "I am sorry to hear that . " * 4,
    "a word": "very " * 20,
    "a loop after a start": "The bridge was closed , so " + "we went home and " * 6,
    "cut short": "he said that she said that he said that she said",
    "counted": " ".join(f"{i} . I do not know" for i in range(12)),
}


def _tokens(text: str) -> list[str]:
    return text.replace("\n", " \n ").split(" ")


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_a_form_that_repeats_is_no_loop(text: str) -> None:
    assert repetition(_tokens(text)) > DEGENERATE_SHARE
    assert not is_degenerate(_tokens(text))


@pytest.mark.parametrize("text", LOOPS.values(), ids=LOOPS)
def test_loops_are_degenerate(text: str) -> None:
    assert is_degenerate(_tokens(text.strip()))
