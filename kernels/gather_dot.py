"""Dot products of each example with its own few rows of a matrix.

``dots[b, i] = <vectors[b], matrix[indices[b, i]]>``

The gradient of a sparse decode with respect to the latent activations, and the pre-activations of a
few chosen latents. The gathered rows [batch, k, d_model] are never stored.
"""

import warnings
from functools import cache
from typing import Any, no_type_check

import torch
from torch import Tensor

from saesteer.kernels.dispatch import (
    TRITON_INSTALLED,
    accumulator_dtype,
    check_indices,
    column_block,
    unit_stride,
    use_triton,
)


def gather_dot_reference(vectors: Tensor, matrix: Tensor, indices: Tensor) -> Tensor:
    """What the op means, in dense, differentiable PyTorch. For tests and benchmarks."""
    return (vectors @ matrix.t()).gather(1, indices)


@cache
def _warn_about_sparse_csr() -> None:
    # PyTorch warns once per process that CSR tensors are in beta. Let it, but out of sight: the
    # layout is an inner matter of this file.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bounds, cols = torch.tensor([0, 1]), torch.tensor([0])
        torch.sparse_csr_tensor(bounds, cols, torch.ones(1), (1, 1), check_invariants=False)


def gather_dot_torch(vectors: Tensor, matrix: Tensor, indices: Tensor) -> Tensor:
    """PyTorch twin: [batch, k] in the accumulator dtype."""
    dtype = accumulator_dtype(vectors, matrix)
    (batch, k), d_sae = indices.shape, matrix.shape[0]
    if indices.numel() == 0 or matrix.shape[1] == 0:
        return vectors.new_zeros((batch, k), dtype=dtype)
    vectors, matrix, indices = vectors.to(dtype), matrix.to(dtype), indices.to(torch.int64)
    if k > d_sae:  # repeats beyond what a sparse pattern holds; the dense product is smaller
        return (vectors @ matrix.t()).gather(1, indices)
    _warn_about_sparse_csr()
    pattern = torch.sparse_csr_tensor(
        torch.arange(0, batch * k + 1, k, device=indices.device),
        indices.reshape(-1),
        vectors.new_zeros((batch * k,), dtype=dtype),
        (batch, d_sae),
        check_invariants=False,  # it refuses repeated indices, which are fine here
    )
    dots = torch.sparse.sampled_addmm(pattern, vectors.contiguous(), matrix.t(), beta=0.0)
    values: Tensor = dots.values()
    return values.view(batch, k)


if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["k"])
    @no_type_check
    def gather_dot_kernel(
        vectors,
        matrix,
        indices,
        out,
        k,
        d_model,
        stride_vectors,
        stride_matrix,
        stride_indices,
        BLOCK_K: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ACC: tl.constexpr,
    ):
        """BLOCK_K slots of one example."""
        example = tl.program_id(0).to(tl.int64)
        slot = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        ok = slot < k
        row = tl.load(indices + example * stride_indices + slot, mask=ok, other=0).to(tl.int64)
        acc = tl.zeros([BLOCK_K, BLOCK_D], ACC)
        for first in range(0, d_model, BLOCK_D):
            col = first + tl.arange(0, BLOCK_D)
            col_ok = col < d_model
            vector = tl.load(vectors + example * stride_vectors + col, mask=col_ok, other=0.0)
            tile = tl.load(
                matrix + row[:, None] * stride_matrix + col[None, :],
                mask=ok[:, None] & col_ok[None, :],
                other=0.0,
            ).to(ACC)
            acc += tile * vector.to(ACC)[None, :]
        tl.store(out + example * k + slot, tl.sum(acc, axis=1), mask=ok)


def gather_dot_triton(vectors: Tensor, matrix: Tensor, indices: Tensor) -> Tensor:
    """Triton kernel: [batch, k] in the accumulator dtype."""
    dtype = accumulator_dtype(vectors, matrix)
    batch, k = indices.shape
    d_model = matrix.shape[1]
    vectors, matrix, indices = unit_stride(vectors), unit_stride(matrix), unit_stride(indices)
    out = vectors.new_empty((batch, k), dtype=dtype)
    if out.numel() == 0:
        return out
    block_k = 8
    gather_dot_kernel[(batch, triton.cdiv(k, block_k))](
        vectors,
        matrix,
        indices,
        out,
        k,
        d_model,
        vectors.stride(0),
        matrix.stride(0),
        indices.stride(0),
        BLOCK_K=block_k,
        BLOCK_D=column_block(d_model, 256),
        ACC=tl.float64 if dtype == torch.float64 else tl.float32,
    )
    return out


@torch.library.custom_op("saesteer::gather_dot", mutates_args=())
def gather_dot_op(vectors: Tensor, matrix: Tensor, indices: Tensor) -> Tensor:
    """Dots [batch, k] of ``vectors`` [batch, d_model] with rows of ``matrix`` [d_sae, d_model]."""
    check_indices(indices, matrix.shape[0])
    run = gather_dot_triton if use_triton(matrix) else gather_dot_torch
    with torch.cuda.device_of(matrix):  # Triton launches on the current device
        return run(vectors, matrix, indices)


@gather_dot_op.register_fake
def _(vectors: Tensor, matrix: Tensor, indices: Tensor) -> Tensor:
    return vectors.new_empty(indices.shape, dtype=accumulator_dtype(vectors, matrix))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_dots: Tensor) -> tuple[Any, ...]:
    # Imported here: decode, gather-dot and row sums are one another's derivatives.
    from saesteer.kernels.sparse_decode import sparse_decode_op
    from saesteer.kernels.sparse_row_grads import sparse_row_grads_op

    vectors, matrix, indices = ctx.saved_tensors
    grad_vectors = grad_matrix = None
    if ctx.needs_input_grad[0]:
        grad_vectors = sparse_decode_op(grad_dots, indices, matrix, None).to(vectors.dtype)
    if ctx.needs_input_grad[1]:
        grad_matrix, _, _ = sparse_row_grads_op(
            grad_dots, indices, vectors, matrix.shape[0], None, None
        )
        grad_matrix = grad_matrix.to(matrix.dtype)
    return grad_vectors, grad_matrix, None


gather_dot_op.register_autograd(_backward, setup_context=_setup_context)
