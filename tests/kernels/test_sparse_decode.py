"""Sparse decoding against the dense reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saesteer.kernels.ops import sparse_decode
from saesteer.kernels.sparse_decode import sparse_decode_op, sparse_decode_reference

SHAPES = [(1, 1, 1, 1), (3, 41, 50, 5), (5, 1000, 33, 33), (0, 8, 20, 4), (4, 7, 5, 20)]
"""batch, d_model, d_sae, k; the last has more slots than latents, so indices repeat."""

Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(batch: int, d_model: int, d_sae: int, k: int, seed: int = 0) -> Problem:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    indices = torch.randint(0, d_sae, (batch, k), generator=random)
    return normal(batch, k), indices, normal(d_sae, d_model), normal(d_model)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_dense_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    acts, indices, W_dec, b_dec = problem(*shape)
    out = sparse_decode(acts.to(dtype), indices, W_dec.to(dtype), b_dec.to(dtype))
    assert out.dtype == dtype
    expected = sparse_decode_reference(acts, indices, W_dec, b_dec)
    # float32: sums of up to 33 products of size 1.
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    without_bias = sparse_decode(acts, indices, W_dec)
    torch.testing.assert_close(without_bias, expected - b_dec)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_the_dense_reference(shape: tuple[int, ...]) -> None:
    acts, indices, W_dec, b_dec = problem(*shape)
    ours = [t.requires_grad_() for t in (acts, W_dec, b_dec)]
    dense = [t.detach().clone().requires_grad_() for t in ours]
    weight = torch.randn(shape[0], shape[1], dtype=torch.float64)
    (sparse_decode(ours[0], indices, ours[1], ours[2]) * weight).sum().backward()
    (sparse_decode_reference(dense[0], indices, dense[1], dense[2]) * weight).sum().backward()
    for mine, reference in zip(ours, dense, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, reference.grad)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_each_gradient_alone(needed: tuple[int, ...]) -> None:
    acts, indices, W_dec, b_dec = problem(3, 6, 11, 4)
    inputs = [acts, W_dec, b_dec]
    for i in needed:
        inputs[i].requires_grad_()
    sparse_decode(inputs[0], indices, inputs[1], inputs[2]).sum().backward()
    assert [i for i, t in enumerate(inputs) if t.grad is not None] == list(needed)


def test_gradcheck() -> None:
    acts, indices, W_dec, b_dec = problem(3, 5, 7, 4)
    inputs = [t.requires_grad_() for t in (acts, W_dec, b_dec)]

    def decode(acts: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        return sparse_decode(acts, indices, W_dec, b_dec)

    assert torch.autograd.gradcheck(decode, inputs)
    assert torch.autograd.gradgradcheck(decode, inputs)


def test_repeated_indices_are_added_twice() -> None:
    W_dec = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    out = sparse_decode(torch.tensor([[3.0, 4.0]]), torch.tensor([[1, 1]]), W_dec, torch.ones(2))
    assert out.tolist() == [[71.0, 141.0]]


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 6),
    d_model=st.integers(1, 70),
    d_sae=st.integers(1, 40),
    k=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_integers_decode_exactly(batch: int, d_model: int, d_sae: int, k: int, seed: int) -> None:
    acts, indices, W_dec, b_dec = (
        (4 * t).round().float() if t.is_floating_point() else t
        for t in problem(batch, d_model, d_sae, k, seed)
    )
    expected = sparse_decode_reference(acts, indices, W_dec, b_dec)
    assert torch.equal(sparse_decode(acts, indices, W_dec, b_dec), expected)


def test_strided_inputs_and_expanded_gradients() -> None:
    acts, indices, W_dec, b_dec = problem(6, 10, 9, 4)
    wide = [acts.repeat(1, 2)[:, ::2], indices.t().contiguous().t(), W_dec.t().contiguous().t()]
    wide[0] = acts.t().contiguous().t()
    W_dec.requires_grad_()
    wide[2] = wide[2].detach().requires_grad_()
    plain = sparse_decode(acts, indices, W_dec, b_dec)
    strided = sparse_decode(wide[0], wide[1], wide[2], b_dec.expand(3, 10)[1])
    torch.testing.assert_close(plain, strided)
    plain.backward(torch.ones_like(plain))
    strided.sum().backward()  # its gradient has strides (0, 0)
    torch.testing.assert_close(W_dec.grad, wide[2].grad)


def test_int32_indices() -> None:
    acts, indices, W_dec, b_dec = problem(3, 6, 11, 4)
    for t in (acts, W_dec):
        t.requires_grad_()
    grads = []
    for kind in (torch.int64, torch.int32):
        out = sparse_decode(acts, indices.to(kind), W_dec, b_dec)
        grads.append((out, *torch.autograd.grad(out.square().sum(), (acts, W_dec))))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_bfloat16_weights_are_summed_in_float32() -> None:
    acts, indices, W_dec, _ = problem(4, 16, 9, 6)
    acts, W_dec = acts.float(), W_dec.bfloat16().requires_grad_()
    out = sparse_decode(acts, indices, W_dec)
    assert out.dtype == torch.float32
    zeros = torch.zeros(16)
    expected = sparse_decode_reference(acts, indices, W_dec.detach().float(), zeros)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert W_dec.grad is not None and W_dec.grad.dtype == torch.bfloat16
    assert sparse_decode(acts.bfloat16(), indices, W_dec).dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [-1, 9])
def test_an_index_out_of_range_is_an_error(bad: int) -> None:
    acts, indices, W_dec, b_dec = problem(3, 6, 9, 4)
    indices[1, 2] = bad
    with pytest.raises(IndexError, match=rf"must be in 0\.\.8 \(d_sae\), got {bad}"):
        sparse_decode(acts, indices, W_dec, b_dec)


def test_opcheck() -> None:
    acts, indices, W_dec, b_dec = problem(3, 5, 7, 4)
    inputs = [t.requires_grad_() for t in (acts, W_dec, b_dec)]
    torch.library.opcheck(sparse_decode_op, (inputs[0], indices, inputs[1], inputs[2]))


def test_the_same_call_gives_the_same_bits_with_any_number_of_threads() -> None:
    acts, indices, W_dec, b_dec = (
        t.float() if t.is_floating_point() else t for t in problem(200, 48, 30, 5)
    )
    for t in (acts, W_dec, b_dec):
        t.requires_grad_()
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            out = sparse_decode(acts, indices, W_dec, b_dec)
            results.append((out, *torch.autograd.grad(out.square().sum(), (acts, W_dec))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            assert torch.equal(one, another)
