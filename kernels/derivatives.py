"""The derivatives of sparse_decode, gather_dot and sparse_row_grads, which need one another.

Decoding, gathered dot products and sums of rows are each the gradient of the two others. They are
registered here, after all three ops are defined, so that no op's file imports a file that imports
it. Import the three ops from this module: one that is imported from its own file alone has no
derivative.
"""

from typing import Any

from torch import Tensor

from saesteer.kernels.dispatch import accumulator_dtype
from saesteer.kernels.gather_dot import gather_dot_op
from saesteer.kernels.sparse_decode import sparse_decode_op
from saesteer.kernels.sparse_row_grads import sparse_row_grads_op

__all__ = ["gather_dot_op", "sparse_decode_op", "sparse_row_grads_op"]


def _save_for_sparse_decode(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    latent_acts, latent_indices, W_dec, b_dec, row_starts = inputs
    ctx.save_for_backward(latent_acts, latent_indices, W_dec, row_starts)
    ctx.bias_dtype = None if b_dec is None else b_dec.dtype


def _sparse_decode_backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    latent_acts, latent_indices, W_dec, row_starts = ctx.saved_tensors
    grad_acts = grad_W_dec = grad_b_dec = None
    if ctx.needs_input_grad[0]:
        grad_acts = gather_dot_op(grad_out, W_dec, latent_indices, row_starts)
        grad_acts = grad_acts.to(latent_acts.dtype)
    if ctx.needs_input_grad[2]:
        grad_W_dec, _, _ = sparse_row_grads_op(
            latent_acts, latent_indices, grad_out, W_dec.shape[0], row_starts
        )
        grad_W_dec = grad_W_dec.to(W_dec.dtype)
    if ctx.needs_input_grad[3]:
        grad_b_dec = grad_out.sum(0, dtype=accumulator_dtype(grad_out)).to(ctx.bias_dtype)
    return grad_acts, None, grad_W_dec, grad_b_dec, None


sparse_decode_op.register_autograd(_sparse_decode_backward, setup_context=_save_for_sparse_decode)


def _save_for_gather_dot(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gather_dot_backward(ctx: Any, grad_dots: Tensor) -> tuple[Any, ...]:
    vectors, matrix, indices, row_starts = ctx.saved_tensors
    grad_vectors = grad_matrix = None
    if ctx.needs_input_grad[0]:
        grad_vectors = sparse_decode_op(grad_dots, indices, matrix, None, row_starts)
        grad_vectors = grad_vectors.to(vectors.dtype)
    if ctx.needs_input_grad[1]:
        grad_matrix, _, _ = sparse_row_grads_op(
            grad_dots, indices, vectors, matrix.shape[0], row_starts
        )
        grad_matrix = grad_matrix.to(matrix.dtype)
    return grad_vectors, grad_matrix, None, None


gather_dot_op.register_autograd(_gather_dot_backward, setup_context=_save_for_gather_dot)


def _save_for_sparse_row_grads(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    weights, indices, rows, _, row_starts, *_ = inputs
    ctx.save_for_backward(weights, indices, rows, row_starts)


def _sparse_row_grads_backward(
    ctx: Any, grad_grads: Tensor, grad_sums: Tensor, grad_counts: Any
) -> tuple[Any, ...]:
    weights, indices, rows, row_starts = ctx.saved_tensors
    grad_weights = grad_rows = None
    if ctx.needs_input_grad[0]:
        grad_weights = gather_dot_op(rows, grad_grads, indices, row_starts) + grad_sums[indices]
        grad_weights = grad_weights.to(weights.dtype)
    if ctx.needs_input_grad[2]:
        grad_rows = sparse_decode_op(weights, indices, grad_grads, None, row_starts)
        grad_rows = grad_rows.to(rows.dtype)
    return grad_weights, None, grad_rows, None, None, None, None, None


sparse_row_grads_op.register_autograd(
    _sparse_row_grads_backward, setup_context=_save_for_sparse_row_grads
)
