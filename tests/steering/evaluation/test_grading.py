"""Grades: repetition, content overlap, the floor of mismatched pairs, loose readings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saesteer.checkpoints.errors import UsageError
from saesteer.steering.checks.catalogue import Verdict
from saesteer.steering.evaluation import grading
from saesteer.steering.evaluation.grading import Grade

PASS, FAIL, UNDETERMINED = Verdict.PASS, Verdict.FAIL, Verdict.UNDETERMINED
SOURCE = "The night train to Vienna left forty minutes late and arrived almost on time."
REPLIES = st.one_of(st.text(max_size=200), st.text(alphabet=st.characters(), max_size=60))


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
    assert grading.repetition(tokens) == _repetition_slow(tokens)


def test_repetition_of_known_sequences() -> None:
    assert grading.repetition([]) == 0.0
    assert grading.repetition(list(range(40))) == 0.0
    assert grading.repetition([7] * 10) == 1.0
    assert grading.repetition("a b c d a b c d".split()) == 1.0
    twice = [1, 2, 3, 4, *range(10, 42), 1, 2, 3, 4]  # 8 of 40 tokens: exactly the limit
    assert grading.repetition(twice) == 0.2 and not grading.is_degenerate(twice)
    thrice = [*twice[:20], 1, 2, 3, 4, *twice[24:]]  # 12 of 40
    assert grading.repetition(thrice) == 0.3 and grading.is_degenerate(thrice)


def test_content_words() -> None:
    kept = grading.content_words("In 1666 Mei saw 3,000 old pots. The cat was with Ur's potter.")
    assert kept == {"1666", "mei", "3000", "pots", "ur", "potter"}
    assert grading.content_words("誰も報告") == {"誰も", "も報", "報告"}
    assert grading.content_words("L'été était là, avec dans pour") == frozenset()


def test_content_overlap() -> None:
    assert grading.content_overlap(SOURCE.upper(), SOURCE) > 0.8
    assert grading.content_overlap(SOURCE, SOURCE) == 1.0
    assert grading.content_overlap("Cats sleep all day.", SOURCE) == 0.0
    assert grading.content_overlap("", SOURCE) == 0.0
    # {night, train} against {night, train, vienna, left?...}: F1 is symmetric
    short = "The night train."
    assert grading.content_overlap(short, SOURCE) == grading.content_overlap(SOURCE, short)


@given(REPLIES, REPLIES)
def test_content_overlap_is_a_share(output: str, reference: str) -> None:
    assert 0.0 <= grading.content_overlap(output, reference) <= 1.0


def test_mismatch_floor_is_the_percentile_over_other_items() -> None:
    references = [f"apple{i} river{i} stone{i}" for i in range(6)]
    assert grading.mismatch_floor(references, references) == 0.0
    shared = [f"common {text}" for text in references]
    # every mismatched pair shares 1 of 4 words: F1 = 2 / 8
    assert grading.mismatch_floor(shared, shared) == pytest.approx(0.25)
    # one reply matches all others' references: 5 of 30 pairs, so the 80th percentile is still 0
    odd = [" ".join(references), *references[1:]]
    assert grading.mismatch_floor(odd, references, percentile=80.0) == 0.0
    assert grading.mismatch_floor(odd, references, percentile=90.0) > 0.0


def test_mismatch_floor_without_pairs_lets_nothing_through() -> None:
    assert grading.mismatch_floor([], []) == 1.0
    assert grading.mismatch_floor([SOURCE], [SOURCE]) == 1.0
    assert grading.mismatch_floor([SOURCE] * 3, [SOURCE] * 3) == 1.0
    assert grading.grade(PASS, False, 1.0, 1.0) is Grade.B
    with pytest.raises(UsageError, match="2 outputs but 1 references"):
        grading.mismatch_floor(["a", "b"], ["a"])


def test_mismatch_floor_samples_when_there_are_many_pairs() -> None:
    texts = [f"common apple{i} river{i % 7}" for i in range(80)]  # 6320 pairs
    sampled = grading.mismatch_floor(texts, texts)
    assert sampled == grading.mismatch_floor(texts, texts)
    assert sampled == grading.mismatch_floor(texts, texts, max_pairs=10**6) == pytest.approx(2 / 3)


def test_grades() -> None:
    assert grading.grade(PASS, False, 0.5, 0.2) is Grade.A
    assert grading.grade(PASS, False, 0.2, 0.2) is Grade.B
    assert grading.grade(PASS, True, 0.9, 0.2) is Grade.C
    assert grading.grade(FAIL, False, 0.9, 0.2) is Grade.C
    assert grading.grade(UNDETERMINED, False, 0.9, 0.2) is Grade.C


def test_content_reference() -> None:
    assert grading.content_reference("translation") == "prompted"
    assert grading.content_reference("json") == "source"
    assert grading.content_reference(None) == "source"


def test_a_loose_pass_is_a_b_and_never_an_a() -> None:
    assert grading.grade(FAIL, False, 0.9, 0.2, loosely=True) is Grade.B
    assert grading.grade(FAIL, True, 0.9, 0.2, loosely=True) is Grade.C
    assert grading.grade(UNDETERMINED, False, 0.9, 0.2, loosely=True) is Grade.B
    assert grading.grade(PASS, False, 0.9, 0.2, content_kept=False) is Grade.B


def test_loose_variants_are_the_eight_of_ifeval() -> None:
    found = grading.loose_variants("*one*\ntwo\n**three**")
    assert found == [
        "*one*\ntwo\n**three**", "two\n**three**", "*one*\ntwo", "two",
        "one\ntwo\nthree", "two\nthree", "one\ntwo", "two",
    ]  # fmt: skip
    assert grading.loose_variants("alone") == ["alone", "", "", ""] * 2


def test_numbers_are_compared_by_their_digits() -> None:
    assert grading.numbers("In 1666, 3,000 pots at 14:30 and 2.5 l") == {
        "1666", "3000", "1430", "25"
    }  # fmt: skip
    assert grading.keeps_numbers("Es waren 3.000 im Jahr 1666.", "There were 3,000 in 1666.")
    assert not grading.keeps_numbers("Es waren viele im Jahr 1666.", "There were 3,000 in 1666.")
    assert grading.keeps_numbers("ja", "yes")


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
    assert grading.repetition(_tokens(text)) > grading.DEGENERATE_SHARE
    assert not grading.is_degenerate(_tokens(text))


@pytest.mark.parametrize("text", LOOPS.values(), ids=LOOPS)
def test_loops_are_degenerate(text: str) -> None:
    assert grading.is_degenerate(_tokens(text.strip()))


@pytest.mark.parametrize(
    "text",
    ["पुरानी सड़क बारिश के कारण बंद थी।", "สะพานเก่าถูกปิดในฤดูหนาว", "பழைய பாலம் மூடப்பட்டது"],
)
def test_content_words_of_scripts_with_marks(text: str) -> None:
    assert grading.content_overlap(text, text) == 1.0
    assert grading.content_overlap(text, "An old bridge.") == 0.0


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
    assert grading.keeps_numbers(answer, source)


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
    kept = grading.keeps_numbers(answer, source)
    # Nobody can tell "12 300" from two numbers: that one passes.
    assert kept is (answer == "12 300 dogs")
