"""Gathered dot products against the dense reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saesteer.kernels.gather_dot import gather_dot_op, gather_dot_reference
from saesteer.kernels.ops import gather_dot

SHAPES = [(1, 1, 1, 1), (3, 41, 50, 5), (5, 1000, 33, 33), (0, 8, 20, 4), (4, 7, 5, 20)]
"""batch, d_model, d_sae, k."""


def problem(
    batch: int, d_model: int, d_sae: int, k: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    vectors = torch.randn(batch, d_model, generator=random, dtype=torch.float64)
    matrix = torch.randn(d_sae, d_model, generator=random, dtype=torch.float64)
    return vectors, matrix, torch.randint(0, d_sae, (batch, k), generator=random)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_dense_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    vectors, matrix, indices = problem(*shape)
    dots = gather_dot(vectors.to(dtype), matrix.to(dtype), indices)
    assert dots.dtype == dtype
    expected = gather_dot_reference(vectors, matrix, indices)
    # float32: sums of up to 1000 products of size 1, each rounded at 6e-8.
    torch.testing.assert_close(dots.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_the_dense_reference(shape: tuple[int, ...]) -> None:
    vectors, matrix, indices = problem(*shape)
    inputs = [t.requires_grad_() for t in (vectors, matrix)]
    weight = torch.randn(indices.shape, dtype=torch.float64)
    ours = torch.autograd.grad((gather_dot(vectors, matrix, indices) * weight).sum(), inputs)
    reference = gather_dot_reference(vectors, matrix, indices)
    for mine, dense in zip(
        ours, torch.autograd.grad((reference * weight).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(mine, dense)


def test_gradcheck() -> None:
    vectors, matrix, indices = problem(3, 5, 7, 4)
    inputs = [t.requires_grad_() for t in (vectors, matrix)]
    assert torch.autograd.gradcheck(lambda v, m: gather_dot(v, m, indices), inputs)
    assert torch.autograd.gradgradcheck(lambda v, m: gather_dot(v, m, indices), inputs)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 6),
    d_model=st.integers(1, 70),
    d_sae=st.integers(1, 40),
    k=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_integers_multiply_exactly(batch: int, d_model: int, d_sae: int, k: int, seed: int) -> None:
    vectors, matrix, indices = problem(batch, d_model, d_sae, k, seed)
    vectors, matrix = (4 * vectors).round().float(), (4 * matrix).round().float()
    expected = gather_dot_reference(vectors, matrix, indices)
    assert torch.equal(gather_dot(vectors, matrix, indices), expected)


def test_strided_inputs() -> None:
    vectors, matrix, indices = problem(6, 10, 9, 4)
    expected = gather_dot(vectors, matrix, indices)
    strided = [t.t().contiguous().t() for t in (vectors, matrix, indices)]
    torch.testing.assert_close(gather_dot(*strided), expected)
    one = vectors[:1]
    torch.testing.assert_close(
        gather_dot(one.expand(6, 10), matrix, indices),
        gather_dot(one.repeat(6, 1), matrix, indices),
    )


def test_an_index_out_of_range_is_an_error() -> None:
    vectors, matrix, indices = problem(3, 6, 9, 4)
    indices[0, 0] = 9
    with pytest.raises(IndexError, match=r"0\.\.8"):
        gather_dot(vectors, matrix, indices)


def test_opcheck() -> None:
    vectors, matrix, indices = problem(3, 5, 7, 4)
    torch.library.opcheck(
        gather_dot_op, (vectors.requires_grad_(), matrix.requires_grad_(), indices)
    )
