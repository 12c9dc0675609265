"""Variety and compression of answers, against direct counts."""

import pytest

from saesteer.steering.evaluation.fluency import distinct, fluency, zlib_ratio


def test_distinct_by_hand() -> None:
    assert distinct("a b a b a".split(), 1) == 2 / 5
    assert distinct("a b a b a".split(), 2) == 2 / 4
    assert distinct("a b".split(), 3) is None


def test_loops_compress_well() -> None:
    loop, prose = "na " * 60, "The heron stood still while seven boats left for Oslo."
    assert (zlib_ratio(loop) or 1) < 0.2 < (zlib_ratio(prose) or 0)
    assert zlib_ratio("") is None


def test_fluency_of_an_arm() -> None:
    rows = [[1, 2, 3, 4, 5, 6], [7, 7, 7, 7, 7, 7, 7, 7], []]
    found = fluency(rows, ["abcdef", "aaaaaaaa", ""], [3.0, 0.1, None], max_new_tokens=8, floor=1.0)
    assert found.truncated == pytest.approx(1 / 3) and found.empty == pytest.approx(1 / 3)
    assert found.too_predictable == 0.5
    assert found.distinct_1 == pytest.approx((1 + 1 / 8) / 2)
    assert found.repetition == pytest.approx(1 / 3)
    assert found.perplexity == pytest.approx(4.71, abs=0.01)  # exp of the median of 3.0 and 0.1
    # Thoughts count towards the limit, though they are no part of the answer.
    texts, nats = ["abcdef", "aaaaaaaa", ""], [3.0, 0.1, None]
    found = fluency(rows, texts, nats, max_new_tokens=8, thoughts=[2, 0, 7])
    assert found.truncated == pytest.approx(2 / 3) and found.tokens == pytest.approx(14 / 3)
    nothing = fluency([], [], [], max_new_tokens=8)
    assert nothing.perplexity is None and nothing.distinct_2 is None
