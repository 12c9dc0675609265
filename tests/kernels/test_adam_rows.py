"""Adam with and without unit rows, against torch.optim.Adam."""

import pytest
import torch
from torch import Tensor

from saesteer.kernels import adam_rows
from saesteer.kernels.adam_rows import adam_rows_op, adam_rows_reference, round_stochastically
from saesteer.kernels.ops import adam_rows_, adam_schedule

HYPER = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}


def schedule(step: int, lr: float = 3e-3) -> Tensor:
    return torch.tensor(adam_schedule(step, lr, 0.9, 0.99), dtype=torch.float64)


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
        adam_rows_(param, grad, *moments, schedule=schedule(step), unit_rows=unit_rows, **HYPER)
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
        adam_rows_(param, grad, *moments, schedule=schedule(1), unit_rows=unit_rows, **HYPER)
        results.append(param)
    torch.testing.assert_close(results[0], results[1])


def test_rows_of_zeros_stay_zero() -> None:
    param = start(4, 6)
    param[2] = 0
    moments = torch.zeros(4, 6), torch.zeros(4, 6)
    for step in (1, 2, 3):
        adam_rows_(
            param, torch.randn(4, 6), *moments, schedule=schedule(step), unit_rows=True, **HYPER
        )
    assert not param[2].any() and param.isfinite().all()
    torch.testing.assert_close(param[[0, 1, 3]].norm(dim=1), torch.ones(3))


def test_a_gradient_along_the_row_does_not_move_it() -> None:
    param = start(4, 6, dtype=torch.float64)
    before = param.clone()
    moments = torch.zeros_like(param), torch.zeros_like(param)
    # eps far above what rounding leaves of the gradient: Adam would blow the rest up to lr.
    adam_rows_(
        param,
        3 * param,
        *moments,
        schedule=schedule(1, 0.1),
        beta1=0.9,
        beta2=0.99,
        eps=1.0,
        unit_rows=True,
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
        schedule=schedule(1),
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
        adam_rows_(ours, grad.to(kind), *moments, schedule=schedule(1), unit_rows=False, **HYPER)
        results.append(ours)
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"param": torch.ones(4), "unit_rows": True}, "two axes with unit_rows"),
        ({"param": torch.ones(2, 2, 2)}, "one or two axes"),
        ({"exp_avg": torch.zeros(3, 4, dtype=torch.float64)}, "must be torch.float32 like param"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    shape = getattr(change.get("param"), "shape", (3, 4))
    tensors = {name: torch.zeros(shape) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    with pytest.raises(ValueError, match=message):
        adam_rows_(**{**tensors, "schedule": schedule(1), **HYPER, **change})


def test_a_scale_multiplies_the_gradient_and_nan_leaves_the_step_out() -> None:
    for unit_rows in (False, True):
        results = []
        for grad, scale in ((3 * torch.ones(5, 8), None), (torch.ones(5, 8), torch.tensor(3.0))):
            param, moments = start(5, 8), (torch.zeros(5, 8), torch.zeros(5, 8))
            more = {"schedule": schedule(1), "unit_rows": unit_rows, "grad_scale": scale, **HYPER}
            adam_rows_(param, grad, *moments, **more)
            results.append((param, *moments))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
        before = [t.clone() for t in results[0]]
        more["grad_scale"] = torch.tensor(torch.nan)
        adam_rows_(results[0][0], torch.ones(5, 8), *results[0][1:], **more)
        assert all(torch.equal(a, b) for a, b in zip(before, results[0], strict=True))


@pytest.mark.parametrize("unit_rows", [False, True])
def test_the_shadow_is_the_nearest_bfloat16(unit_rows: bool) -> None:
    param, shadow = start(5, 41), torch.empty(5, 41, dtype=torch.bfloat16)
    moments = torch.zeros_like(param), torch.zeros_like(param)
    adam_rows_(
        param, torch.randn(5, 41), *moments, schedule=schedule(1), unit_rows=unit_rows,
        shadow=shadow, **HYPER,
    )  # fmt: skip
    assert torch.equal(shadow, param.bfloat16())


def test_random_rounding_is_unbiased_and_goes_to_a_neighbour() -> None:
    value = torch.full((20_000,), 1.0 + 2.0**-7 / 3)  # a third of the way to the next bfloat16
    index = torch.arange(20_000)
    rounded = round_stochastically(value, index, 1).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2.0**-7}
    # A share of 20 000 draws: one standard deviation is 0.0033.
    assert (rounded > 1).float().mean().item() == pytest.approx(1 / 3, abs=0.015)
    assert torch.equal(round_stochastically(value, index, 1).float(), rounded)
    assert not torch.equal(round_stochastically(value, index, 2).float(), rounded)
    exact = torch.tensor([0.0, -0.0, 1.5, -2.0, torch.inf, -torch.inf])
    assert torch.equal(round_stochastically(exact, torch.arange(6), 3).float(), exact)
    negative = round_stochastically(-value, index, 1).float()
    assert set(negative.tolist()) == {-1.0, -1.0 - 2.0**-7}
    assert round_stochastically(torch.tensor([torch.nan]), torch.arange(1), 1).isnan().all()


def test_moments_in_bfloat16_follow_those_in_float32() -> None:
    """Over 300 steps of a steady gradient the second moment grows, though each step is tiny."""
    ours, theirs = start(8, 64), start(8, 64)
    half = [torch.zeros(8, 64, dtype=torch.bfloat16) for _ in range(2)]
    full = [torch.zeros(8, 64) for _ in range(2)]
    grad = torch.ones(8, 64)
    for step in range(1, 301):
        values = torch.tensor(adam_schedule(step, 1e-4, 0.9, 0.999), dtype=torch.float64)
        more = {"schedule": values, "beta2": 0.999, "unit_rows": False}
        adam_rows_(ours, grad, *half, **more)
        adam_rows_(theirs, grad, *full, **more)
    # 512 independent errors of at most 2^-8 each leave a mean within a thousandth.
    assert half[1].float().mean() == pytest.approx(full[1].mean().item(), rel=5e-3)
    stuck = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(300):
        stuck = stuck * 0.999 + 0.001
    drift = float(stuck) / float(full[1].mean()) - 1
    assert abs(drift) > 0.2, "rounding to the nearest goes astray: 0.30 here"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


def test_opcheck() -> None:
    param = start(3, 4)
    args = (param, torch.ones(3, 4), torch.zeros(3, 4), torch.zeros(3, 4))
    shadow = torch.zeros(3, 4, dtype=torch.bfloat16)
    for extra in ((None, schedule(1), None), (shadow, schedule(1), torch.tensor(0.5))):
        torch.library.opcheck(adam_rows_op, (*args, *extra, 0.9, 0.99, 1e-8, True))
