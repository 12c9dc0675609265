"""Nested prefixes decoded in one pass, against dense products, and against decode_mse."""

import pytest
import torch
from torch import Tensor

from saesteer.kernels.decode_prefixes import (
    decode_prefixes_op,
    decode_prefixes_reference,
    decode_prefixes_torch,
)
from saesteer.kernels.ops import decode_mse, decode_prefixes

# Sums of up to 200 products of size 1, rounded at 6e-8 in float32.
CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.float64: {"rtol": 1e-9, "atol": 1e-10}}


def problem(batch: int, levels: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Pieces of 0 to 4 entries, some of them 0; 41 columns, 60 latents."""
    rng = torch.Generator().manual_seed(batch + levels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

    lengths = torch.randint(0, 5, (batch * levels,), generator=rng)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    entries = int(starts[-1])
    indices = torch.randint(0, 60, (entries,), generator=rng)
    return normal(entries).relu(), indices, normal(60, 41), normal(41), normal(batch, 41), starts


@pytest.mark.parametrize("choice", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("batch", "levels"), [(7, 3), (1, 1), (5, 6), (0, 2)])
def test_against_dense_products(
    batch: int, levels: int, dtype: torch.dtype, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAESTEER_KERNELS", choice)
    operands = problem(batch, levels, dtype)
    found = decode_prefixes(*operands, levels)
    wanted = decode_prefixes_reference(*(t.double() if t.is_floating_point() else t
                                         for t in operands), levels)  # fmt: skip
    for ours, dense in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, dense.to(dtype), **CLOSE[dtype])


def test_one_level_is_decode_mse_and_its_gradients_are_true() -> None:
    acts, indices, W, b, target, starts = problem(6, 1, torch.float64)
    squared, last, suffix, grads = decode_prefixes(acts, indices, W, b, target, starts, 1)
    for ours, plain in zip(
        (squared[:, 0], last, grads), decode_mse(acts, indices, W, b, target, starts), strict=True
    ):
        torch.testing.assert_close(ours, plain)
    assert torch.equal(suffix[:, 0], last)
    acts, indices, W, b, target, starts = problem(6, 4, torch.float64)
    acts.requires_grad_()
    total = decode_prefixes_reference(acts, indices, W, b, target, starts, 4)[0].sum()
    grads = decode_prefixes_torch(acts.detach(), indices, W, b, target, starts, 4)[3]
    torch.testing.assert_close(2 * grads, torch.autograd.grad(total, acts)[0])


def test_opcheck_and_wrong_operands() -> None:
    operands = problem(4, 3, torch.float64)
    torch.library.opcheck(decode_prefixes_op, (*operands, 3))
    with pytest.raises(ValueError, match="target must be"):
        decode_prefixes(*operands, 2)
    with pytest.raises(ValueError, match="levels must be at least 1, got 0"):
        decode_prefixes(*operands, 0)
