"""The first look at the rows: what training cannot learn from is refused, what is odd is said."""

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.sae.training.input_scale import InputScale, check_sample

PLACE = (3, "resid_post")


def rows(count: int = 5000) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(0))


def test_the_scale_is_that_of_all_rows_at_once() -> None:
    wide = rows().double()
    found = InputScale.of(rows())
    torch.testing.assert_close(found.mean, wide.mean(dim=0))
    length = (wide - wide.mean(dim=0)).norm(dim=-1).mean()
    assert found.factor == pytest.approx(float(4 / length))


def test_ordinary_rows_are_no_news() -> None:
    assert check_sample(rows(), PLACE, 10, 5000) == []
    assert check_sample(rows() + 1000, PLACE, 0, 5000) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(100, 16), "are all zero"),
        (rows(1).repeat(100, 1), "do not vary"),
        (rows() * 1e-19, "typical length of"),
        (rows() * 1e20, "typical length of"),
    ],
)
def test_rows_that_nothing_can_be_learnt_from(bad: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_sample(bad, PLACE, 0, len(bad))
    assert "layer 3 resid_post" in str(caught.value) and "\n" not in str(caught.value)


def test_zeros_and_many_sinks_are_said() -> None:
    half = rows()
    half[::2] = 0
    (line,) = check_sample(half, PLACE, 0, 5000)
    assert line.startswith("50 % of the activations of layer 3 resid_post are zeros")
    (line,) = check_sample(rows(), PLACE, 5000, 5000)
    assert line.startswith("50 % of the rows were left out as attention sinks")
