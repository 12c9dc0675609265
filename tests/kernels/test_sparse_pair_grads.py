"""Both weight gradients from one grouping, against the dense reference."""

import pytest
import torch
from torch import Tensor

from saesteer.kernels.ops import sort_indices, sparse_pair_grads
from saesteer.kernels.sparse_pair_grads import sparse_pair_grads_op, sparse_pair_grads_reference

SHAPES = [(1, 1, 1, 1), (3, 41, 50, 5), (5, 1000, 33, 33), (0, 8, 20, 4), (40, 7, 3, 6)]


def problem(
    batch: int, d_model: int, d_sae: int, k: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    weights_a = normal(batch, k).relu()
    indices = torch.randint(0, d_sae, (batch, k), generator=random)
    other = d_model // 2 + 1  # the two matrices may differ in width
    return [weights_a, normal(batch, d_model), normal(batch, k), normal(batch, other), indices]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_dense_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs, d_sae = problem(*shape, dtype=dtype), shape[2]
    wide = [t if t.dtype == torch.int64 else t.double() for t in inputs]
    expected = sparse_pair_grads_reference(*wide, d_sae)
    order = sort_indices(inputs[-1], d_sae)
    for found in (sparse_pair_grads(*inputs, d_sae), sparse_pair_grads(*inputs, d_sae, order)):
        for ours, dense in zip(found[:3], expected[:3], strict=True):
            # float32: sums of up to 240 products of size 1, each rounded at 6e-8.
            torch.testing.assert_close(ours.double(), dense, rtol=1e-5, atol=2e-5)
        assert torch.equal(found[3], expected[3])


def test_gradcheck() -> None:
    inputs = [t if t.dtype == torch.int64 else t.requires_grad_() for t in problem(4, 5, 9, 3)]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return sparse_pair_grads(*tensors, inputs[-1], 9)[:3]

    assert torch.autograd.gradcheck(run, inputs[:4])


def test_opcheck() -> None:
    inputs = problem(4, 5, 9, 3, torch.float32)
    inputs[0].requires_grad_()
    torch.library.opcheck(sparse_pair_grads_op, (*inputs, 9))


def test_the_same_at_every_call() -> None:
    inputs = problem(300, 17, 4, 4, torch.float32)
    first = sparse_pair_grads(*inputs, 4)
    for _ in range(3):
        again = sparse_pair_grads(*inputs, 4)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
