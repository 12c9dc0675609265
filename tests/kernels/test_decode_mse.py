"""Decode, error and slot gradients against the dense reference."""

import pytest
import torch
from torch import Tensor

from saesteer.kernels.decode_mse import decode_mse_op, decode_mse_reference
from saesteer.kernels.ops import decode_mse

SHAPES = [(1, 1, 1, 1), (3, 41, 200, 5), (5, 1000, 33, 33), (0, 8, 90, 4), (40, 7, 100, 6)]
"""batch, d_model, d_sae, k; in the third the dense product is cheaper and is taken."""


def problem(
    batch: int, d_model: int, d_sae: int, k: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    acts = normal(batch, k).relu()  # empty slots among them
    indices = torch.stack([torch.randperm(d_sae, generator=random)[:k] for _ in range(batch)] or
                          [torch.zeros(k, dtype=torch.int64)])[:batch]  # fmt: skip
    return [acts, indices, normal(d_sae, d_model), normal(d_model), normal(batch, d_model)]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_dense_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = problem(*shape, dtype=dtype)
    wide = [t if t.dtype == torch.int64 else t.double() for t in inputs]
    expected = decode_mse_reference(*wide)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    for ours, dense in zip(decode_mse(*inputs), expected, strict=True):
        assert ours.dtype == kind
        # float32: sums of up to 1000 squares of size 30, each rounded at 6e-8.
        torch.testing.assert_close(ours.double(), dense, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_repeated_and_strided(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESTEER_KERNELS", choice)
    acts, indices, W_dec, b_dec, target = problem(6, 12, 300, 5, torch.float32)
    indices[:, 1] = indices[:, 0]
    expected = decode_mse_reference(acts, indices, W_dec, b_dec, target)
    strided = (acts.t().contiguous().t(), indices.to(torch.int32), W_dec.t().contiguous().t())
    found = decode_mse(*strided, b_dec, target[:, ::1])
    for ours, dense in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-4)


def test_gradcheck() -> None:
    acts, indices, *rest = problem(4, 5, 90, 3)
    inputs = [t.requires_grad_() for t in (acts, *rest)]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        squared, error, slots = decode_mse(tensors[0], indices, *tensors[1:])
        assert not slots.requires_grad
        return squared, error

    assert torch.autograd.gradcheck(run, inputs)


def test_slot_gradients_are_half_the_derivative() -> None:
    acts, indices, *rest = problem(4, 5, 90, 3)
    acts.requires_grad_()
    squared, _, slots = decode_mse(acts, indices, *rest)
    torch.testing.assert_close(torch.autograd.grad(squared.sum(), acts)[0], 2 * slots)


def test_opcheck() -> None:
    acts, indices, *rest = problem(4, 5, 90, 3, torch.float32)
    torch.library.opcheck(decode_mse_op, (acts.requires_grad_(), indices, *rest))


def test_indices_are_checked() -> None:
    acts, indices, *rest = problem(4, 5, 90, 3, torch.float32)
    indices[1, 1] = 90
    with pytest.raises(IndexError, match=r"0..89 \(d_sae\), got 90"):
        decode_mse(acts, indices, *rest)
