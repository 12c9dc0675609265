"""Both weight gradients of an SAE from one grouping of its entries by latent.

``grads_a[f] = sum over (b, i) with indices[b, i] == f of weights_a[b, i] * rows_a[b]``, and the
same with b: for the decoder (latent activations, errors), for the encoder (gradients of the
pre-activations, inputs). The two widths may differ, as the input and the target of an SAE may. The
sums of the second weights are the gradient of b_enc, and the nonzero first weights say how often
each latent fired: both come from the same pass over the entries. Entries may be ragged
(`saesteer.kernels.entries`). Where examples in a row are pieces of one, as those of nested prefixes
are, rows may be given once for all pieces.
"""

from typing import Any

import torch
from torch import Tensor

from saesteer.kernels.derivatives import gather_dot_op, sparse_decode_op
from saesteer.kernels.dispatch import accumulator_dtype, use_triton
from saesteer.kernels.entries import batch_of, check_entries
from saesteer.kernels.sparse_row_grads import (
    LatentOrder,
    count_nonzero,
    grouped_by,
    sorted_rows,
    sparse_row_grads_reference,
    sparse_row_grads_torch,
    sparse_row_grads_triton,
    work_list,
)

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _pieces(rows: Tensor, batch: int) -> int:
    """How many examples share a row."""
    return max(1, batch // max(1, len(rows)))


def _for_each_example(rows: Tensor, batch: int | torch.SymInt) -> Tensor:
    """A row of its own for each example. Differentiable."""
    if rows.shape[0] == batch:
        return rows
    return rows.repeat_interleave(batch // rows.shape[0], dim=0)


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
    batch = int(batch_of(indices, row_starts))
    rows_a, rows_b = (_for_each_example(rows, batch) for rows in (rows_a, rows_b))
    grads_a, _, counts_a = sparse_row_grads_reference(weights_a, indices, rows_a, d_sae, row_starts)
    grads_b, sums_b, _ = sparse_row_grads_reference(weights_b, indices, rows_b, d_sae, row_starts)
    return grads_a, grads_b, sums_b, counts_a


def sparse_pair_grads_torch(
    weights_a: Tensor, rows_a: Tensor, weights_b: Tensor, rows_b: Tensor, order: LatentOrder,
    batch: int,
) -> Four:  # fmt: skip
    """PyTorch twin: both row sums, the sums of the second weights, the counts of the first."""
    grads_a, _ = sparse_row_grads_torch(weights_a, rows_a, order, _pieces(rows_a, batch))
    grads_b, sums_b = sparse_row_grads_torch(weights_b, rows_b, order, _pieces(rows_b, batch))
    return grads_a, grads_b, sums_b, count_nonzero(weights_a, order)


def sparse_pair_grads_triton(
    weights_a: Tensor, rows_a: Tensor, weights_b: Tensor, rows_b: Tensor, order: LatentOrder,
    batch: int,
) -> Four:  # fmt: skip
    """Triton kernels, with one work list for both where their rows are of the same examples."""
    pieces_a, pieces_b = _pieces(rows_a, batch), _pieces(rows_b, batch)
    work = work_list(weights_a, order, pieces_a)
    grads_a, _, counts_a = sparse_row_grads_triton(weights_a, rows_a, order, work)
    if pieces_b != pieces_a:
        work = work._replace(examples=sorted_rows(weights_b, order, pieces_b))
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
        batch = int(batch_of(indices, row_starts))
        return run(weights_a, rows_a, weights_b, rows_b, grouped, batch)


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


def _of_the_pieces(grads: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of shared rows: the sum of those of their examples."""
    if grads.shape == shape:
        return grads
    return grads.view(shape[0], -1, shape[1]).sum(1)


def _backward(ctx: Any, up_a: Tensor, up_b: Tensor, up_sums: Tensor, up_counts: Any) -> Any:
    weights_a, rows_a, weights_b, rows_b, indices, row_starts = ctx.saved_tensors
    needed = ctx.needs_input_grad
    batch = batch_of(indices, row_starts)
    shapes = rows_a.shape, rows_b.shape
    rows_a, rows_b = (_for_each_example(rows, batch) for rows in (rows_a, rows_b))
    grad_weights_a = grad_rows_a = grad_weights_b = grad_rows_b = None
    if needed[0]:
        grad_weights_a = gather_dot_op(rows_a, up_a, indices, row_starts).to(weights_a.dtype)
    if needed[1]:
        grad_rows_a = sparse_decode_op(weights_a, indices, up_a, None, row_starts)
        grad_rows_a = _of_the_pieces(grad_rows_a, shapes[0]).to(rows_a.dtype)
    if needed[2]:
        grad_weights_b = gather_dot_op(rows_b, up_b, indices, row_starts) + up_sums[indices]
        grad_weights_b = grad_weights_b.to(weights_b.dtype)
    if needed[3]:
        grad_rows_b = sparse_decode_op(weights_b, indices, up_b, None, row_starts)
        grad_rows_b = _of_the_pieces(grad_rows_b, shapes[1]).to(rows_b.dtype)
    return (grad_weights_a, grad_rows_a, grad_weights_b, grad_rows_b, *(None,) * 6)


sparse_pair_grads_op.register_autograd(_backward, setup_context=_setup_context)
