"""Both weight gradients of an SAE from one grouping of its entries by latent.

``grads_a[f] = sum over (b, i) with indices[b, i] == f of weights_a[b, i] * rows_a[b]``, and the
same with b: for the decoder (latent activations, errors), for the encoder (gradients of the
pre-activations, inputs). The two widths may differ, as the input and the target of an SAE may. The
sums of the second weights are the gradient of b_enc, and the nonzero first weights say how often
each latent fired: both come from the same pass over the entries. Entries may be ragged
(`saesteer.kernels.entries`).
"""

from typing import Any

import torch
from torch import Tensor

from saesteer.kernels.derivatives import gather_dot_op, sparse_decode_op
from saesteer.kernels.dispatch import accumulator_dtype, use_triton
from saesteer.kernels.entries import check_entries
from saesteer.kernels.sparse_row_grads import (
    LatentOrder,
    count_nonzero,
    grouped_by,
    sparse_row_grads_reference,
    sparse_row_grads_torch,
    sparse_row_grads_triton,
    work_list,
)

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def sparse_pair_grads_reference(
    weights_a: Tensor,
    rows_a: Tensor,
    weights_b: Tensor,
    rows_b: Tensor,
    indices: Tensor,
    d_sae: int,
    row_starts: Tensor | None = None,
) -> Four:
    """The op's definition in dense, differentiable PyTorch, for tests and benchmarks."""
    grads_a, _, counts_a = sparse_row_grads_reference(weights_a, indices, rows_a, d_sae, row_starts)
    grads_b, sums_b, _ = sparse_row_grads_reference(weights_b, indices, rows_b, d_sae, row_starts)
    return grads_a, grads_b, sums_b, counts_a


def sparse_pair_grads_torch(
    weights_a: Tensor, rows_a: Tensor, weights_b: Tensor, rows_b: Tensor, order: LatentOrder
) -> Four:
    """PyTorch twin: both row sums, the sums of the second weights, the counts of the first."""
    grads_a, _ = sparse_row_grads_torch(weights_a, rows_a, order)
    grads_b, sums_b = sparse_row_grads_torch(weights_b, rows_b, order)
    return grads_a, grads_b, sums_b, count_nonzero(weights_a, order)


def sparse_pair_grads_triton(
    weights_a: Tensor, rows_a: Tensor, weights_b: Tensor, rows_b: Tensor, order: LatentOrder
) -> Four:
    """Triton kernels, with one work list for both."""
    work = work_list(weights_a, order)
    grads_a, _, counts_a = sparse_row_grads_triton(weights_a, rows_a, order, work)
    grads_b, sums_b, _ = sparse_row_grads_triton(weights_b, rows_b, order, work)
    return grads_a, grads_b, sums_b, counts_a


@torch.library.custom_op("saesteer::sparse_pair_grads", mutates_args=())
def sparse_pair_grads_op(
    weights_a: Tensor,
    rows_a: Tensor,
    weights_b: Tensor,
    rows_b: Tensor,
    indices: Tensor,
    d_sae: int,
    row_starts: Tensor | None = None,
    order: Tensor | None = None,
    starts: Tensor | None = None,
    examples: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row sums a and b [d_sae, its width], weight sums b [d_sae], nonzero counts a [d_sae]."""
    check_entries(indices, d_sae, row_starts)
    with torch.cuda.device_of(rows_a):  # Triton launches on the current device
        grouped = grouped_by(indices, d_sae, row_starts, order, starts, examples)
        run = sparse_pair_grads_triton if use_triton(rows_a) else sparse_pair_grads_torch
        return run(weights_a, rows_a, weights_b, rows_b, grouped)


@sparse_pair_grads_op.register_fake
def _(
    weights_a: Tensor,
    rows_a: Tensor,
    weights_b: Tensor,
    rows_b: Tensor,
    indices: Tensor,
    d_sae: int | torch.SymInt,
    row_starts: Tensor | None = None,
    order: Tensor | None = None,
    starts: Tensor | None = None,
    examples: Tensor | None = None,
) -> Four:
    dtype_a = accumulator_dtype(weights_a, rows_a)
    dtype_b = accumulator_dtype(weights_b, rows_b)
    return (
        rows_a.new_empty((d_sae, rows_a.shape[1]), dtype=dtype_a),
        rows_b.new_empty((d_sae, rows_b.shape[1]), dtype=dtype_b),
        rows_b.new_empty((d_sae,), dtype=dtype_b),
        rows_a.new_empty((d_sae,), dtype=torch.int64),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5], inputs[6])


def _backward(ctx: Any, up_a: Tensor, up_b: Tensor, up_sums: Tensor, up_counts: Any) -> Any:
    weights_a, rows_a, weights_b, rows_b, indices, row_starts = ctx.saved_tensors
    needed = ctx.needs_input_grad
    grad_weights_a = grad_rows_a = grad_weights_b = grad_rows_b = None
    if needed[0]:
        grad_weights_a = gather_dot_op(rows_a, up_a, indices, row_starts).to(weights_a.dtype)
    if needed[1]:
        grad_rows_a = sparse_decode_op(weights_a, indices, up_a, None, row_starts)
        grad_rows_a = grad_rows_a.to(rows_a.dtype)
    if needed[2]:
        grad_weights_b = gather_dot_op(rows_b, up_b, indices, row_starts) + up_sums[indices]
        grad_weights_b = grad_weights_b.to(weights_b.dtype)
    if needed[3]:
        grad_rows_b = sparse_decode_op(weights_b, indices, up_b, None, row_starts)
        grad_rows_b = grad_rows_b.to(rows_b.dtype)
    return (grad_weights_a, grad_rows_a, grad_weights_b, grad_rows_b, *(None,) * 6)


sparse_pair_grads_op.register_autograd(_backward, setup_context=_setup_context)
