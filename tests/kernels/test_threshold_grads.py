"""Straight-through gradients on entries, against autograd on a dense matrix in float64."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.kernels.entries import from_dense
from saesteer.kernels.ops import sort_indices, threshold_grads
from saesteer.kernels.threshold_grads import threshold_grads_op

BANDWIDTH = 0.5


class Step(torch.autograd.Function):
    """1 above the threshold; the derivative is that of a step as wide as the window."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, thresholds: Tensor, to_input: bool) -> Tensor:
        ctx.save_for_backward(pre_acts, thresholds)
        ctx.to_input = to_input
        return (pre_acts > thresholds).to(pre_acts.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        pre_acts, thresholds = ctx.saved_tensors
        window = (pre_acts - thresholds).abs() < BANDWIDTH / 2
        slope = torch.where(window, grad / BANDWIDTH, 0)
        return slope if ctx.to_input else None, -slope.sum(0), None


def autograd(
    pre_acts: Tensor, thresholds: Tensor, up: Tensor, price: Tensor, to_input: bool
) -> tuple[Tensor, Tensor]:
    """Derivatives of ``sum(up * acts + price * active)``."""
    h, t = pre_acts.double().requires_grad_(), thresholds.double().requires_grad_()
    active = Step.apply(h, t, to_input)
    # The step's own factor is the threshold, as in the paper, not the pre-activation.
    straight = h * active.detach() + (active - active.detach()) * t.detach()
    loss = (up.double() * straight + price.double() * active).sum()
    by_h, by_t = torch.autograd.grad(loss, (h, t))
    return by_h, by_t


def problem(lengths: list[int], d_sae: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A dense problem, and the entries above the window's lower end; `lengths` caps their rows."""
    rng = torch.Generator().manual_seed(len(lengths) + d_sae)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

    batch = len(lengths)
    pre_acts, up = normal(batch, d_sae), normal(batch, d_sae)
    thresholds = torch.rand(d_sae, generator=rng, dtype=torch.float64).to(dtype) + 0.3
    for row, most in zip(pre_acts, lengths, strict=True):
        row[most:] = -9.0  # not in the window: no entry
    above = pre_acts > thresholds - BANDWIDTH / 2
    places = above.flatten().nonzero()[:, 0]
    starts = torch.searchsorted(places, torch.arange(batch + 1) * d_sae)
    return {
        "pre_acts": pre_acts,
        "up": up,
        "thresholds": thresholds,
        "indices": places % d_sae,
        "starts": starts,
    }


CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("choice", ["auto", "torch"])
@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("lengths", "d_sae"), [([41, 0, 7], 41), ([0, 0], 9), ([], 5), ([1] * 200, 3), ([1000], 1000)]
)
def test_it_is_the_straight_through_derivative(
    lengths: list[int],
    d_sae: int,
    dtype: torch.dtype,
    to_input: bool,
    choice: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAESTEER_KERNELS", choice)
    p = problem(lengths, d_sae, dtype)
    entries = p["indices"], p["starts"]
    prices = [torch.tensor(0.7, dtype=dtype), torch.linspace(0.1, 2, p["up"].numel(), dtype=dtype)]
    for price, order in itertools.product(
        prices, (None, sort_indices(entries[0], d_sae, entries[1]))
    ):
        dense_price = price if price.dim() == 0 else price.view(p["up"].shape)
        wanted = autograd(p["pre_acts"], p["thresholds"], p["up"], dense_price, to_input)
        found = threshold_grads(
            from_dense(p["pre_acts"], *entries), entries[0], p["thresholds"],
            from_dense(p["up"], *entries),
            price if price.dim() == 0 else from_dense(dense_price, *entries),
            BANDWIDTH, order, entries[1], to_input=to_input,
        )  # fmt: skip
        assert found[0].dtype == found[1].dtype == dtype
        torch.testing.assert_close(
            found[0].double(), from_dense(wanted[0], *entries), **CLOSE[dtype]
        )
        torch.testing.assert_close(found[1].double(), wanted[1], **CLOSE[dtype])


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_a_rectangle_fillers_and_nan(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESTEER_KERNELS", choice)
    h = torch.tensor([[1.2, -torch.inf], [torch.nan, 0.9]])
    indices, thresholds = torch.tensor([[0, 1], [0, 1]]), torch.ones(2)
    up = torch.tensor([[3.0, 5.0], [7.0, 11.0]])
    grads, by_threshold = threshold_grads(
        h, indices, thresholds, up, torch.tensor(1.0), BANDWIDTH, to_input=True
    )
    assert grads.tolist() == [[3 + 8, 0], [0, 24]]
    assert by_threshold.tolist() == [-8, -24]


def test_opcheck_and_wrong_operands() -> None:
    p = problem([9, 4], 9, torch.float64)
    h, up = (from_dense(p[name], p["indices"], p["starts"]) for name in ("pre_acts", "up"))
    price = torch.ones((), dtype=torch.float64)
    order = sort_indices(p["indices"], 9, p["starts"])
    torch.library.opcheck(
        threshold_grads_op,
        (h, p["indices"], p["thresholds"], up, price, BANDWIDTH, True, p["starts"], *order),
    )
    with pytest.raises(ValueError, match=r"bandwidth must be above 0, got 0\.0"):
        threshold_grads(h, p["indices"], p["thresholds"], up, price, 0.0, None, p["starts"])
    with pytest.raises(ValueError, match="price must be"):
        threshold_grads(
            h, p["indices"], p["thresholds"], up, price.expand(2), BANDWIDTH, None, p["starts"]
        )
