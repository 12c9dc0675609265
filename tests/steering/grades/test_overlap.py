"""The overlap with a reference, and the floor of mismatched pairs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saesteer.checkpoints.errors import UsageError
from saesteer.steering.grades.overlap import content_overlap, content_words, mismatch_floor

SOURCE = "The night train to Vienna left forty minutes late and arrived almost on time."
REPLIES = st.one_of(st.text(max_size=200), st.text(alphabet=st.characters(), max_size=60))


def test_content_words() -> None:
    kept = content_words("In 1666 Mei saw 3,000 old pots. The cat was with Ur's potter.")
    assert kept == {"1666", "mei", "3000", "pots", "ur", "potter"}
    assert content_words("誰も報告") == {"誰も", "も報", "報告"}
    assert content_words("L'été était là, avec dans pour") == frozenset()


def test_content_overlap() -> None:
    assert content_overlap(SOURCE.upper(), SOURCE) > 0.8
    assert content_overlap(SOURCE, SOURCE) == 1.0
    assert content_overlap("Cats sleep all day.", SOURCE) == 0.0
    assert content_overlap("", SOURCE) == 0.0
    # {night, train} against {night, train, vienna, left?...}: F1 is symmetric
    short = "The night train."
    assert content_overlap(short, SOURCE) == content_overlap(SOURCE, short)


@given(REPLIES, REPLIES)
def test_content_overlap_is_a_share(output: str, reference: str) -> None:
    assert 0.0 <= content_overlap(output, reference) <= 1.0


def test_mismatch_floor_is_the_percentile_over_other_items() -> None:
    references = [f"apple{i} river{i} stone{i}" for i in range(6)]
    assert mismatch_floor(references, references) == 0.0
    shared = [f"common {text}" for text in references]
    # every mismatched pair shares 1 of 4 words: F1 = 2 / 8
    assert mismatch_floor(shared, shared) == pytest.approx(0.25)
    # one reply matches all others' references: 5 of 30 pairs, so the 80th percentile is still 0
    odd = [" ".join(references), *references[1:]]
    assert mismatch_floor(odd, references, percentile=80.0) == 0.0
    assert mismatch_floor(odd, references, percentile=90.0) > 0.0


def test_mismatch_floor_without_pairs_lets_nothing_through() -> None:
    assert mismatch_floor([], []) == 1.0
    assert mismatch_floor([SOURCE], [SOURCE]) == 1.0
    assert mismatch_floor([SOURCE] * 3, [SOURCE] * 3) == 1.0
    with pytest.raises(UsageError, match="2 outputs but 1 references"):
        mismatch_floor(["a", "b"], ["a"])


def test_mismatch_floor_samples_when_there_are_many_pairs() -> None:
    texts = [f"common apple{i} river{i % 7}" for i in range(80)]  # 6320 pairs
    sampled = mismatch_floor(texts, texts)
    assert sampled == mismatch_floor(texts, texts)
    assert sampled == mismatch_floor(texts, texts, max_pairs=10**6) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "text",
    ["पुरानी सड़क बारिश के कारण बंद थी।", "สะพานเก่าถูกปิดในฤดูหนาว", "பழைய பாலம் மூடப்பட்டது"],
)
def test_content_words_of_scripts_with_marks(text: str) -> None:
    assert content_overlap(text, text) == 1.0
    assert content_overlap(text, "An old bridge.") == 0.0
