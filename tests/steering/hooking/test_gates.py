"""The language of gates and of schedules."""

import pytest
import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.steering.hooking.gates import Above, Either, Every, Not, parse_gate
from saesteer.steering.plans.schedules import parse_schedule


def test_not_binds_before_and_before_or() -> None:
    a, b, c = Above(1, 2.0, 2.0), Above(3, 0.5, 0.5), Above(5, 4.0, 1.0)
    wanted = Either((Every((Not(a), b)), c))
    assert parse_gate("!1 > 2 & 3>0.5 | 5 > 4:1").root == wanted
    assert parse_gate("not 1>2 AND 3 > 5e-1 or (5 > 4 : 1)").root == wanted
    assert parse_gate("3 > 1 & (1 > 2 | !3 > 2)").ids == (3, 1)
    assert parse_gate("prompt: 3 > -1").on_prompt


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "`gate` must be conditions"),
        ("3", "`gate` must be conditions"),
        ("3 > x", "`gate` must be conditions"),
        ("3 > 1 &", "`gate` must be conditions"),
        ("(3 > 1", "`gate` must be conditions"),
        ("3 > 1 4 > 1", "`gate` must be conditions"),
        ("1.5 > 1", "`gate` must be conditions"),
        ("3 > 1 : 2", "above the 1 where it goes on"),
        ("prompt: 3 > 2 : 1", "no second threshold"),
    ],
)
def test_what_is_no_gate_is_a_usage_error(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_gate(text)


def test_schedules() -> None:
    steps = torch.tensor([[0, 1, 2, 9]])
    for text, wanted in {
        "constant": [1, 1, 1, 1],
        "first:2": [1, 1, 0, 0],
        "linear:4": [1, 0.75, 0.5, 0],
        "decay:1,2": [1, 1 / 4, 1 / 9, 1 / 100],
    }.items():
        assert parse_schedule(text).weights(steps)[0].tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("text", ["", "first", "first:0", "linear:-1", "decay:1", "decay:0,3"])
def test_what_is_no_schedule_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="`schedule`"):
        parse_schedule(text)
