"""Sinks go, text stays, and the limits do not depend on how the contexts are cut into calls."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saesteer.checkpoints.errors import NonFiniteError
from saesteer.sae.activations.sinks import SinkFilter, norms_of

PLACES = [(0, "resid_post"), (2, "resid_post")]


def test_sink_filter() -> None:
    sinks = SinkFilter(10.0)

    def keep(*norms: float) -> list[bool]:
        return sinks.keep({(0, "resid_post"): torch.tensor(norms)[:, None]}).tolist()

    assert keep(1.0, 1.0, 9.9, 10.1) == [True, True, True, False]
    # Batches without a row say nothing about the median; NaN would make every later row a sink.
    assert keep() == []
    # The running median is the mean over batches: 2 after medians of 1 and 3.
    assert keep(3.0, 3.0, 19.0, 21.0) == [True, True, True, False]
    state = json.loads(json.dumps(sinks.state_dict()))
    other = SinkFilter(10.0)
    other.load_state_dict(state)
    assert other.state_dict() == sinks.state_dict() == state
    # A sink at one hook point is out at all of them.
    rows = {(0, "a"): torch.tensor([[1.0], [1.0], [50.0]]), (1, "a"): torch.ones(3, 1)}
    assert SinkFilter(10.0).keep(rows).tolist() == [True, True, False]


@given(cut=st.lists(st.integers(0, 7), max_size=4), seed=st.integers(0, 5))
def test_limits_do_not_depend_on_the_batches(cut: list[int], seed: int) -> None:
    """To the bit: else a resume with the same batches, or another process, would differ."""
    rng = torch.Generator().manual_seed(seed)
    medians = torch.rand(2, 20, generator=rng) * 10
    medians[:, torch.rand(20, generator=rng) < 0.2] = torch.nan  # contexts without text
    whole, pieces = SinkFilter(3.0), SinkFilter(3.0)
    expected = whole.limits(medians, PLACES)
    bounds = sorted({0, 20, *(min(20, sum(cut[: n + 1])) for n in range(len(cut)))})
    found = [
        pieces.limits(medians[:, low:high], PLACES)
        for low, high in zip(bounds, bounds[1:], strict=False)
    ]
    assert torch.equal(torch.cat(found, dim=1).nan_to_num(), expected.nan_to_num())
    assert pieces.state_dict() == whole.state_dict()


def test_contexts_are_judged_by_themselves_and_those_before() -> None:
    norms = torch.tensor([[[1.0, 1.0, 9.0], [4.0, 4.0, 24.0], [1.0, 1.0, 21.0]]])
    text = torch.ones(3, 3, dtype=torch.bool)
    sinks = SinkFilter(10.0)
    # Limits 10, 25, 20: ten times the means of 1; 1 and 4; 1, 4 and 1.
    assert sinks.keep_contexts(norms, text, PLACES[:1]).tolist() == [
        [True, True, True], [True, True, True], [True, True, False]
    ]  # fmt: skip
    # What is no text is neither kept nor counted.
    text[1] = False
    other = SinkFilter(10.0)
    assert other.keep_contexts(norms, text, PLACES[:1]).any(dim=1).tolist() == [True, False, True]
    assert other.blocks == 2


def test_medians_may_be_taken_over_part_of_what_is_judged() -> None:
    norms = torch.tensor([[[50.0, 0.0], [50.0, 2.0], [50.0, 6.0]]])
    text = torch.tensor([[True, False], [True, True], [True, True]])
    usual = torch.tensor([[False, False], [False, True], [False, True]])
    sinks = SinkFilter(10.0)
    # Nothing known, a limit of 20, a limit of 40.
    assert sinks.keep_contexts(norms, text, PLACES[:1], usual=usual).tolist() == [
        [True, False], [False, True], [False, True]
    ]  # fmt: skip
    assert sinks.blocks == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_their_place(value: float) -> None:
    rows: dict[Any, Tensor] = {place: torch.ones(4, 3) for place in PLACES}
    rows[PLACES[1]][2, 1] = value
    with pytest.raises(NonFiniteError, match="layer 2 resid_post are NaN or infinite"):
        SinkFilter(10.0).keep(rows)
    norms, text = norms_of(rows)[:, None], torch.ones(1, 4, dtype=torch.bool)
    text[0, 2] = False  # padding may hold anything
    assert int(SinkFilter(10.0).keep_contexts(norms, text, PLACES).sum()) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_norms_are_taken_in_float32(dtype: torch.dtype) -> None:
    rows = torch.full((2, 5, 400), 20.0, dtype=dtype)
    # 400 squares of 20 would be infinite in float16.
    assert norms_of({PLACES[0]: rows}).tolist() == [[[400.0] * 5] * 2]


def test_zeros_do_not_make_sinks_of_the_rest() -> None:
    rows = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    rows[::2] = 0
    sinks = SinkFilter()
    assert sinks.keep({(0, "resid_post"): torch.zeros(100, 8)}).all()
    assert sinks.keep({(0, "resid_post"): rows}).all()
    rows[1] *= 1000
    assert (~sinks.keep({(0, "resid_post"): rows})).nonzero().flatten().tolist() == [1]
