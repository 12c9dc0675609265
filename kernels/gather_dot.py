"""Dot products of each example with its own few rows of a matrix.

``dots[b, i] = <vectors[b], matrix[indices[b, i]]>``, for entries in either form of
`saesteer.kernels.entries`.

The gradient of a sparse decode with respect to the latent activations, and the pre-activations of a
few chosen latents. The gathered rows [batch, k, d_model] are never stored.
"""

import warnings
from functools import cache
from typing import no_type_check

import torch
from torch import Tensor

from saesteer.kernels.dispatch import (
    TRITON_INSTALLED,
    accumulator_dtype,
    column_block,
    unit_stride,
    use_triton,
)
from saesteer.kernels.entries import check_entries, examples_of, from_dense, row_starts_of


def gather_dot_reference(
    vectors: Tensor, matrix: Tensor, indices: Tensor, row_starts: Tensor | None = None
) -> Tensor:
    """The op's definition in dense, differentiable PyTorch, for tests and benchmarks."""
    return from_dense(vectors @ matrix.t(), indices, row_starts)


@cache
def _suppress_csr_warning() -> None:
    # PyTorch warns once per process that CSR tensors are in beta. Trigger the warning here and
    # suppress it: callers never see a CSR tensor.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bounds, cols = torch.tensor([0, 1]), torch.tensor([0])
        torch.sparse_csr_tensor(bounds, cols, torch.ones(1), (1, 1), check_invariants=False)


def gather_dot_torch(
    vectors: Tensor, matrix: Tensor, indices: Tensor, row_starts: Tensor | None = None
) -> Tensor:
    """PyTorch twin: as many dots as indices, in the accumulator dtype."""
    dtype = accumulator_dtype(vectors, matrix)
    batch, d_sae = vectors.shape[0], matrix.shape[0]
    if indices.numel() == 0 or matrix.shape[1] == 0:
        return vectors.new_zeros(indices.shape, dtype=dtype)
    vectors, matrix, indices = vectors.to(dtype), matrix.to(dtype), indices.to(torch.int64)
    if indices.numel() > batch * d_sae:
        # Repeated indices make more entries than the dense product has.
        return from_dense(vectors @ matrix.t(), indices, row_starts)
    _suppress_csr_warning()
    pattern = torch.sparse_csr_tensor(
        row_starts_of(indices, row_starts),
        indices.reshape(-1),
        vectors.new_zeros((indices.numel(),), dtype=dtype),
        (batch, d_sae),
        check_invariants=False,  # the check rejects repeated indices, which are allowed here
    )
    dots = torch.sparse.sampled_addmm(pattern, vectors.contiguous(), matrix.t(), beta=0.0)
    values: Tensor = dots.values()
    return values.view(indices.shape)


if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["k"])
    @no_type_check
    def gather_dot_kernel(
        vectors,
        matrix,
        indices,
        examples,
        out,
        k,
        d_model,
        stride_vectors,
        stride_matrix,
        RAGGED: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ACC: tl.constexpr,
    ):
        """BLOCK_K slots of one example; where entries are ragged, of all k entries together."""
        first_axis = tl.program_id(0).to(tl.int64)
        if RAGGED:
            slot = first_axis * BLOCK_K + tl.arange(0, BLOCK_K)
            begin = 0
            example = tl.load(examples + slot, mask=slot < k, other=0)[:, None]
        else:
            slot = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
            begin = first_axis * k
            example = first_axis
        ok = slot < k
        row = tl.load(indices + begin + slot, mask=ok, other=0).to(tl.int64)
        acc = tl.zeros([BLOCK_K, BLOCK_D], ACC)
        for first in range(0, d_model, BLOCK_D):
            col = first + tl.arange(0, BLOCK_D)[None, :]
            both = ok[:, None] & (col < d_model)
            at = vectors + example * stride_vectors + col
            if RAGGED:
                vector = tl.load(at, mask=both, other=0.0)
            else:
                vector = tl.load(at, mask=col < d_model, other=0.0)
            tile = tl.load(matrix + row[:, None] * stride_matrix + col, mask=both, other=0.0)
            acc += tile.to(ACC) * vector.to(ACC)
        tl.store(out + begin + slot, tl.sum(acc, axis=1), mask=ok)


def gather_dot_triton(
    vectors: Tensor, matrix: Tensor, indices: Tensor, row_starts: Tensor | None = None
) -> Tensor:
    """Triton kernel: as many dots as indices, in the accumulator dtype."""
    dtype = accumulator_dtype(vectors, matrix)
    d_model = matrix.shape[1]
    vectors, matrix, indices = unit_stride(vectors), unit_stride(matrix), indices.contiguous()
    out = vectors.new_empty(indices.shape, dtype=dtype)
    if out.numel() == 0:
        return out
    block_k, k = 8, indices.shape[-1]
    examples = None if row_starts is None else examples_of(k, row_starts)
    tiles = triton.cdiv(k, block_k)
    grid = (indices.shape[0], tiles) if examples is None else (tiles,)
    gather_dot_kernel[grid](
        vectors,
        matrix,
        indices,
        indices if examples is None else examples,
        out,
        k,
        d_model,
        vectors.stride(0),
        matrix.stride(0),
        RAGGED=examples is not None,
        BLOCK_K=block_k,
        BLOCK_D=column_block(d_model, 256),
        ACC=tl.float64 if dtype == torch.float64 else tl.float32,
    )
    return out


@torch.library.custom_op("saesteer::gather_dot", mutates_args=())
def gather_dot_op(
    vectors: Tensor, matrix: Tensor, indices: Tensor, row_starts: Tensor | None = None
) -> Tensor:
    """Dots of ``vectors`` [batch, d_model] with rows of ``matrix`` [d_sae, d_model]."""
    check_entries(indices, matrix.shape[0], row_starts)
    run = gather_dot_triton if use_triton(matrix) else gather_dot_torch
    with torch.cuda.device_of(matrix):  # Triton launches on the current device
        return run(vectors, matrix, indices, row_starts)


@gather_dot_op.register_fake
def _(vectors: Tensor, matrix: Tensor, indices: Tensor, row_starts: Tensor | None = None) -> Tensor:
    return vectors.new_empty(indices.shape, dtype=accumulator_dtype(vectors, matrix))
