"""Metrics against figures worked out by hand."""

import math

import pytest
import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.data.encoding import EncodedPair
from saesteer.mechanisms.data.pairs import Pair
from saesteer.mechanisms.metrics import check_metric, default_metric, measure

LOGITS = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
BASE = torch.zeros(4)


def pair(answer: int = 3, wrong: int | None = 2) -> EncodedPair:
    return EncodedPair([1], [1], answer, wrong, {}, "", None, False, Pair("a", "b"))


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("logit-diff", [1.0, 0.0]),
        ("logit", [3.0, 0.0]),
        ("logprob", [3 - math.log(math.e + 2 * math.e**3 + math.e**2), -math.log(4)]),
        ("prob-ratio", [4 * math.e**3 / (math.e + 2 * math.e**3 + math.e**2), 1.0]),
        # Of the two largest logits, id 1 comes before id 3; of four equal ones 3 comes last.
        ("rr", [1 / 2, 1 / 4]),
        ("accuracy", [0.0, 0.0]),
        ("kl", [-9 / 4 + math.log(math.e + 2 * math.e**3 + math.e**2) - math.log(4), 0.0]),
    ],
)
def test_metrics_by_hand(metric: str, expected: list[float]) -> None:
    found = measure(metric, LOGITS, pair(), BASE)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_the_first_of_equal_logits_is_the_answer() -> None:
    assert measure("accuracy", LOGITS, pair(1), BASE).tolist() == [1.0, 0.0]
    assert measure("rr", LOGITS, pair(0), BASE).tolist() == [1 / 4, 1.0]


def test_the_default_needs_wrong_answers() -> None:
    assert default_metric([pair(), pair()]) == "logit-diff"
    assert default_metric([pair(), pair(wrong=None)]) == "logprob"
    check_metric("logprob", [pair(wrong=None)])
    with pytest.raises(UsageError, match="`metric` logit-diff needs a wrong .* 1 of 2 pairs"):
        check_metric("logit-diff", [pair(), pair(wrong=None)])
