"""Row sums per latent against the dense reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saesteer.kernels.ops import sort_indices, sparse_row_grads
from saesteer.kernels.sparse_row_grads import sparse_row_grads_op, sparse_row_grads_reference

SHAPES = [(1, 1, 1, 1), (3, 41, 50, 5), (5, 1000, 33, 33), (0, 8, 20, 4), (40, 7, 3, 6)]
"""batch, d_model, d_sae, k; in the last one every latent is hit many times."""


def problem(
    batch: int, d_model: int, d_sae: int, k: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, int]:
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(batch, k, generator=random, dtype=torch.float64)
    weights[torch.rand(batch, k, generator=random) < 0.2] = 0
    indices = torch.randint(0, d_sae, (batch, k), generator=random)
    rows = torch.randn(batch, d_model, generator=random, dtype=torch.float64)
    return weights, indices, rows, d_sae


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_dense_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weights, indices, rows, d_sae = problem(*shape)
    expected = sparse_row_grads_reference(weights, indices, rows, d_sae)
    weights, rows = weights.to(dtype), rows.to(dtype)
    grads, counts = sparse_row_grads(weights, indices, rows, d_sae)
    assert grads.dtype == dtype and counts.dtype == torch.int64
    # float32: sums of up to 240 products of size 1, each rounded at 6e-8.
    torch.testing.assert_close(grads.double(), expected[0], rtol=1e-5, atol=2e-5)
    assert torch.equal(counts, expected[2])
    sums = sparse_row_grads_op(weights, indices, rows, d_sae)[1]
    torch.testing.assert_close(sums.double(), expected[1], rtol=1e-5, atol=2e-5)


def test_one_sort_serves_two_calls() -> None:
    weights, indices, rows, d_sae = problem(40, 7, 30, 6)
    order = sort_indices(indices, d_sae)
    for values, matrix in ((weights, rows), (weights.square(), rows + 1)):
        alone = sparse_row_grads(values, indices, matrix, d_sae)
        shared = sparse_row_grads(values, indices, matrix, d_sae, order)
        assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(0, 30), d_sae=st.integers(1, 12), k=st.integers(1, 5), seed=st.integers(0))
def test_sorting_groups_the_entries_in_order(batch: int, d_sae: int, k: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed % 2**31)
    indices = torch.randint(0, d_sae, (batch, k), generator=random)
    order, starts, _ = sort_indices(indices, d_sae)
    flat = indices.reshape(-1).tolist()
    for latent in range(d_sae):
        mine = order[starts[latent] : starts[latent + 1]].tolist()
        assert mine == [i for i, value in enumerate(flat) if value == latent]


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 30),
    d_model=st.integers(1, 70),
    d_sae=st.integers(1, 40),
    k=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_integers_add_exactly(batch: int, d_model: int, d_sae: int, k: int, seed: int) -> None:
    weights, indices, rows, _ = problem(batch, d_model, d_sae, k, seed)
    weights, rows = (4 * weights).round().float(), (4 * rows).round().float()
    expected = sparse_row_grads_reference(weights, indices, rows, d_sae)
    grads, counts = sparse_row_grads(weights, indices, rows, d_sae)
    assert torch.equal(grads, expected[0]) and torch.equal(counts, expected[2])


def test_gradcheck() -> None:
    weights, indices, rows, d_sae = problem(4, 5, 7, 3)
    inputs = [t.requires_grad_() for t in (weights, rows)]

    def sums(weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        grads, totals, _ = sparse_row_grads_op(weights, indices, rows, d_sae)
        return grads, totals

    assert torch.autograd.gradcheck(sums, inputs)
    assert torch.autograd.gradgradcheck(sums, inputs)


def test_latents_nothing_names_get_exact_zeros() -> None:
    weights, indices, rows, d_sae = problem(20, 6, 9, 4)
    grads, counts = sparse_row_grads(weights, indices * 2, rows, 2 * d_sae)
    assert not grads[1::2].any() and not counts[1::2].any()
    assert grads[::2].any() and counts[::2].any()


def test_weights_of_zero_are_not_counted() -> None:
    weights = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    indices = torch.tensor([[0, 1], [0, 2]])
    assert sparse_row_grads(weights, indices, torch.ones(2, 3), 4)[1].tolist() == [1, 0, 1, 0]


def test_strided_and_expanded_inputs() -> None:
    weights, indices, rows, d_sae = problem(20, 6, 9, 4)
    expected = sparse_row_grads(weights, indices, rows, d_sae)
    strided = sparse_row_grads(
        weights.t().contiguous().t(), indices.t().contiguous().t(), rows.t().contiguous().t(), d_sae
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, strided, strict=True))
    one = torch.ones(1, 1, dtype=torch.float64)
    expanded = sparse_row_grads(weights, indices, one.expand(20, 6), d_sae)[0]
    assert torch.equal(expanded, sparse_row_grads(weights, indices, one.repeat(20, 6), d_sae)[0])


def test_an_index_out_of_range_is_an_error() -> None:
    weights, indices, rows, d_sae = problem(20, 6, 9, 4)
    indices[3, 1] = -2
    with pytest.raises(IndexError, match="got -2"):
        sparse_row_grads(weights, indices, rows, d_sae)


def test_opcheck() -> None:
    weights, indices, rows, d_sae = problem(4, 5, 7, 3)
    inputs = (weights.requires_grad_(), indices, rows.requires_grad_(), d_sae)
    torch.library.opcheck(sparse_row_grads_op, inputs)
    torch.library.opcheck(sparse_row_grads_op, (*inputs, None, *sort_indices(indices, d_sae)))


def test_the_same_call_gives_the_same_bits_with_any_number_of_threads() -> None:
    weights, indices, rows, d_sae = problem(400, 48, 30, 5)
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            results.append(sparse_row_grads(weights.float(), indices, rows.float(), d_sae)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
