"""Adam with and without unit rows, against torch.optim.Adam."""

import pytest
import torch
from torch import Tensor

from saesteer.kernels import adam_rows
from saesteer.kernels.adam_rows import adam_rows_op, adam_rows_reference
from saesteer.kernels.ops import adam_rows_

HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}


def start(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    param = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if len(shape) == 2:
        param = param / param.norm(dim=1, keepdim=True)
    return param.to(dtype)


def compare(param: Tensor, unit_rows: bool, steps: int, tolerance: float) -> Tensor:
    """Run both optimisers on the same gradients; returns our parameter."""
    reference = param.double().clone()
    adam = torch.optim.Adam([reference], lr=3e-3, betas=(0.9, 0.99), eps=1e-8)
    moments = torch.zeros_like(param), torch.zeros_like(param)
    random = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        grad = torch.randn(param.shape, generator=random, dtype=torch.float64).to(param.dtype)
        before = grad.clone()
        adam_rows_(param, grad, *moments, step=step, unit_rows=unit_rows, **HYPER)
        adam_rows_reference(reference, grad.double(), adam, unit_rows)
        assert torch.equal(grad, before)
    for ours, theirs in zip(
        (param, *moments),
        (reference, adam.state[reference]["exp_avg"], adam.state[reference]["exp_avg_sq"]),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    return param


# float32: each of 20 steps moves a parameter by about lr and rounds it at 6e-8.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-12}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (41,), (5, 41), (3, 1000), (0, 4), (1, 1)])
def test_twenty_steps_equal_torch_adam(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(start(*shape, dtype=dtype), False, 20, TOLERANCE[dtype])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 41), (3, 1000), (0, 4), (1, 1), (2, 2)])
def test_unit_rows_equal_project_step_renormalise(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    param = compare(start(*shape, dtype=dtype), True, 20, TOLERANCE[dtype])
    torch.testing.assert_close(param.norm(dim=1), torch.ones(shape[0], dtype=dtype))


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare(start(11, 6), True, 3, 3e-6)
    monkeypatch.setattr(adam_rows, "CHUNK_ELEMENTS", 4 * 6)
    assert torch.equal(compare(start(11, 6), True, 3, 3e-6), whole)


def test_strided_parameters_take_the_same_steps() -> None:
    for unit_rows in (False, True):
        compare(start(5, 8).t().contiguous().t(), unit_rows, 5, 3e-6)


@pytest.mark.parametrize("unit_rows", [False, True])
def test_an_expanded_gradient(unit_rows: bool) -> None:
    results = []
    for grad in (torch.ones(1, 1).expand(5, 8), torch.ones(5, 8)):
        param, moments = start(5, 8), (torch.zeros(5, 8), torch.zeros(5, 8))
        adam_rows_(param, grad, *moments, step=1, unit_rows=unit_rows, **HYPER)
        results.append(param)
    torch.testing.assert_close(results[0], results[1])


def test_rows_of_zeros_stay_zero() -> None:
    param = start(4, 6)
    param[2] = 0
    moments = torch.zeros(4, 6), torch.zeros(4, 6)
    for step in (1, 2, 3):
        adam_rows_(param, torch.randn(4, 6), *moments, step=step, unit_rows=True, **HYPER)
    assert not param[2].any() and param.isfinite().all()
    torch.testing.assert_close(param[[0, 1, 3]].norm(dim=1), torch.ones(3))


def test_a_gradient_along_the_row_does_not_move_it() -> None:
    param = start(4, 6, dtype=torch.float64)
    before = param.clone()
    moments = torch.zeros_like(param), torch.zeros_like(param)
    # eps far above what rounding leaves of the gradient: Adam would blow the rest up to lr.
    adam_rows_(
        param, 3 * param, *moments, step=1, lr=0.1, beta1=0.9, beta2=0.99, eps=1.0, unit_rows=True
    )
    torch.testing.assert_close(param, before)
    assert moments[0].abs().max() < 1e-15


def test_nothing_is_recorded_for_backward() -> None:
    param = start(3, 4).requires_grad_()
    version = param._version
    adam_rows_(
        param,
        torch.ones(3, 4),
        torch.zeros(3, 4),
        torch.zeros(3, 4),
        step=1,
        unit_rows=True,
        **HYPER,
    )
    assert param.is_leaf and param.requires_grad and param.grad_fn is None
    assert param._version > version  # a graph that saved the old values has to notice


def test_a_gradient_of_another_dtype() -> None:
    param, grad = start(3, 4), torch.randn(3, 4).bfloat16()
    results = []
    for kind in (torch.bfloat16, torch.float32):
        ours, moments = param.clone(), (torch.zeros(3, 4), torch.zeros(3, 4))
        adam_rows_(ours, grad.to(kind), *moments, step=1, unit_rows=False, **HYPER)
        results.append(ours)
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 0}, "step counts from 1, got 0"),
        ({"param": torch.ones(4), "unit_rows": True}, "two axes with unit_rows"),
        ({"param": torch.ones(2, 2, 2)}, "one or two axes"),
        ({"exp_avg": torch.zeros(3, 4, dtype=torch.float64)}, "must be torch.float32 like param"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    shape = getattr(change.get("param"), "shape", (3, 4))
    tensors = {name: torch.zeros(shape) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    with pytest.raises(ValueError, match=message):
        adam_rows_(**{**tensors, "step": 1, "unit_rows": False, **HYPER, **change})


def test_opcheck() -> None:
    param = start(3, 4)
    args = (param, torch.ones(3, 4), torch.zeros(3, 4), torch.zeros(3, 4))
    torch.library.opcheck(adam_rows_op, (*args, 1, 1e-3, 0.9, 0.99, 1e-8, True))
