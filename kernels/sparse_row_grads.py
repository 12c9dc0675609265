"""Sum rows of a batch into the latents they belong to: the gradient of a sparse matrix product.

``grads[f] = sum over (b, i) with indices[b, i] == f of weights[b, i] * rows[b]``

Both weight gradients of a TopK SAE have this form: decoder (weights = latent activations, rows =
output gradient) and encoder (weights = gradient of the pre-activations, rows = input). The entries
are sorted by latent once and each latent's run is summed in order, so no [batch, k, d_model]
tensor exists, no atomic addition is used and the result is the same bit for bit at every call.
"""

from typing import Any, NamedTuple, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor

from saesteer.kernels.dispatch import (
    TRITON_INSTALLED,
    accumulator_dtype,
    check_indices,
    column_block,
    unit_stride,
    use_triton,
)

CHUNK = 64
"""Most entries that one Triton program adds up. A latent with more is split into chunks, and a
second kernel adds their sums in order: a latent that always fires would hold up all others."""


class LatentOrder(NamedTuple):
    """The entries of an index matrix [batch, k], grouped by latent."""

    order: Tensor
    """[batch * k] int64: positions in the flattened matrix, by latent, then by position."""
    starts: Tensor
    """[d_sae + 1] int64: latent f owns ``order[starts[f]:starts[f + 1]]``."""


def sort_indices(indices: Tensor, d_sae: int) -> LatentOrder:
    """Group the entries of ``indices`` [batch, k] (values in 0..d_sae-1) by latent.

    The sort is stable: a latent's entries stay in batch order, which fixes the order of its sum.
    """
    flat = indices.reshape(-1)
    # 32-bit keys sort faster, and d_sae always fits.
    ordered, order = flat.to(torch.int32).sort(stable=True)
    bounds = torch.arange(d_sae + 1, dtype=torch.int32, device=flat.device)
    return LatentOrder(order, torch.searchsorted(ordered, bounds))


def sparse_row_grads_reference(
    weights: Tensor, indices: Tensor, rows: Tensor, d_sae: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op means, in dense, differentiable PyTorch. For tests and benchmarks."""
    dense = weights.new_zeros((rows.shape[0], d_sae)).scatter_add(1, indices, weights)
    hits = torch.zeros_like(dense, dtype=torch.int64)
    hits = hits.scatter_add(1, indices, (weights != 0).to(torch.int64))
    return dense.t() @ rows, dense.sum(0), hits.sum(0)


def sparse_row_grads_torch(
    weights: Tensor, rows: Tensor, order: LatentOrder
) -> tuple[Tensor, Tensor]:
    """PyTorch twin: row sums [d_sae, d_model] and weight sums [d_sae]."""
    acc = accumulator_dtype(weights, rows)
    entries, starts = order
    sorted_weights = weights.reshape(-1)[entries].to(acc)
    examples = entries // weights.shape[1]

    def add_up(matrix: Tensor) -> Tensor:
        # A bag per latent. Several times faster on a CPU than a CSR product, and as exact.
        return F.embedding_bag(
            examples,
            matrix,
            starts,
            mode="sum",
            per_sample_weights=sorted_weights,
            include_last_offset=True,
        )

    sums = add_up(rows.new_ones((rows.shape[0], 1), dtype=acc))[:, 0]
    return add_up(rows.to(acc).contiguous()), sums.contiguous()


if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["k"])
    @no_type_check
    def row_grads_kernel(
        weights,
        rows,
        order,
        starts,
        chunk_latents,
        chunk_counts,
        chunk_ends,
        partial_ends,
        grads,
        sums,
        partial_grads,
        partial_sums,
        k,
        d_sae,
        d_model,
        stride_rows,
        CHUNK: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ACC: tl.constexpr,
    ):
        """One chunk of one latent's entries, for BLOCK_D columns."""
        chunk = tl.program_id(0).to(tl.int64)
        latent = tl.load(chunk_latents + chunk)
        if latent >= d_sae:  # the grid is an upper bound: the host does not know the chunk count
            return
        n_chunks = tl.load(chunk_counts + latent)
        part = chunk - (tl.load(chunk_ends + latent) - n_chunks)
        begin = tl.load(starts + latent) + part * CHUNK
        end = tl.minimum(begin + CHUNK, tl.load(starts + latent + 1))

        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        col_ok = cols < d_model
        acc = tl.zeros([BLOCK_D], ACC)
        weight_sum = tl.zeros([BLOCK_N], ACC)
        for first in range(begin, end, BLOCK_N):
            at = first + tl.arange(0, BLOCK_N)
            ok = at < end
            entry = tl.load(order + at, mask=ok, other=0)
            weight = tl.load(weights + entry, mask=ok, other=0.0).to(ACC)
            row = tl.load(
                rows + (entry // k)[:, None] * stride_rows + cols[None, :],
                mask=ok[:, None] & col_ok[None, :],
                other=0.0,
            ).to(ACC)
            acc += tl.sum(weight[:, None] * row, axis=0)
            weight_sum += weight
        total = tl.sum(weight_sum, axis=0)
        if n_chunks == 1:
            tl.store(grads + latent * d_model + cols, acc, mask=col_ok)
            if tl.program_id(1) == 0:
                tl.store(sums + latent, total)
        else:
            slot = tl.load(partial_ends + latent) - n_chunks + part
            tl.store(partial_grads + slot * d_model + cols, acc, mask=col_ok)
            if tl.program_id(1) == 0:
                tl.store(partial_sums + slot, total)

    @triton.jit
    @no_type_check
    def add_partials_kernel(
        partial_latents,
        chunk_counts,
        partial_ends,
        grads,
        sums,
        partial_grads,
        partial_sums,
        d_sae,
        d_model,
        BLOCK_D: tl.constexpr,
        ACC: tl.constexpr,
    ):
        """Add a split latent's chunk sums in order. The program of its first chunk does it."""
        slot = tl.program_id(0).to(tl.int64)
        latent = tl.load(partial_latents + slot)
        if latent >= d_sae:
            return
        n_chunks = tl.load(chunk_counts + latent)
        end = tl.load(partial_ends + latent)
        if slot != end - n_chunks:
            return
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        col_ok = cols < d_model
        acc = tl.zeros([BLOCK_D], ACC)
        total = tl.zeros([1], ACC)
        for part in range(slot, end):
            at = tl.cast(part, tl.int64)
            acc += tl.load(partial_grads + at * d_model + cols, mask=col_ok, other=0.0)
            total += tl.load(partial_sums + at)
        tl.store(grads + latent * d_model + cols, acc, mask=col_ok)
        if tl.program_id(1) == 0:
            tl.store(sums + latent + tl.arange(0, 1), total)


class WorkList(NamedTuple):
    """Which Triton program sums what: made on the device, with sizes the host can know."""

    chunk_latents: Tensor
    chunk_counts: Tensor
    chunk_ends: Tensor
    partial_latents: Tensor
    partial_ends: Tensor


def work_list(order: LatentOrder) -> WorkList:
    """Cut each latent's entries into chunks. Every latent has one, so that unused ones are zeroed.

    Both lengths are upper bounds: the true ones would cost a wait for the device.
    """
    counts = order.starts.diff()
    n_entries, d_sae = order.order.numel(), counts.numel()
    chunk_counts = ((counts + CHUNK - 1) // CHUNK).clamp(min=1)
    chunk_ends = chunk_counts.cumsum(0)
    partial_ends = torch.where(chunk_counts > 1, chunk_counts, 0).cumsum(0)
    max_chunks = d_sae + n_entries // CHUNK
    max_partials = 2 * n_entries // CHUNK
    slots = torch.arange(max(max_chunks, max_partials), device=counts.device)
    return WorkList(
        torch.searchsorted(chunk_ends, slots[:max_chunks], right=True),
        chunk_counts,
        chunk_ends,
        torch.searchsorted(partial_ends, slots[:max_partials], right=True),
        partial_ends,
    )


def sparse_row_grads_triton(
    weights: Tensor, rows: Tensor, order: LatentOrder, work: WorkList | None = None
) -> tuple[Tensor, Tensor]:
    """Triton kernel: row sums [d_sae, d_model] and weight sums [d_sae]."""
    entries, starts = order
    d_sae, d_model = starts.numel() - 1, rows.shape[1]
    dtype = accumulator_dtype(weights, rows)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    weights, rows = weights.contiguous(), unit_stride(rows)
    grads = rows.new_empty((d_sae, d_model), dtype=dtype)
    sums = rows.new_empty((d_sae,), dtype=dtype)
    if d_sae == 0 or d_model == 0:
        return grads, sums.zero_()
    work = work or work_list(order)
    max_chunks, max_partials = len(work.chunk_latents), len(work.partial_latents)
    partial_grads = grads.new_empty((max_partials, d_model))
    partial_sums = sums.new_empty((max_partials,))

    block_d = column_block(d_model, 512)
    d_tiles = triton.cdiv(d_model, block_d)
    row_grads_kernel[(max_chunks, d_tiles)](
        weights,
        rows,
        entries,
        starts,
        work.chunk_latents,
        work.chunk_counts,
        work.chunk_ends,
        work.partial_ends,
        grads,
        sums,
        partial_grads,
        partial_sums,
        weights.shape[1],
        d_sae,
        d_model,
        rows.stride(0),
        CHUNK=CHUNK,
        BLOCK_N=8,
        BLOCK_D=block_d,
        ACC=acc,
    )
    if max_partials:
        add_partials_kernel[(max_partials, d_tiles)](
            work.partial_latents,
            work.chunk_counts,
            work.partial_ends,
            grads,
            sums,
            partial_grads,
            partial_sums,
            d_sae,
            d_model,
            BLOCK_D=block_d,
            ACC=acc,
        )
    return grads, sums


def count_nonzero(weights: Tensor, order: LatentOrder) -> Tensor:
    """Per latent the number of its weights that are not 0, [d_sae] int64."""
    nonzero = weights.new_zeros((weights.numel() + 1,), dtype=torch.int64)
    torch.cumsum(weights.reshape(-1)[order.order] != 0, 0, out=nonzero[1:])
    return nonzero[order.starts].diff()


def grouped_by(
    indices: Tensor, d_sae: int, order: Tensor | None, starts: Tensor | None
) -> LatentOrder:
    """What the caller has sorted already, or a sort of ``indices`` now."""
    if order is None or starts is None:
        return sort_indices(indices, d_sae)
    return LatentOrder(order, starts)


@torch.library.custom_op("saesteer::sparse_row_grads", mutates_args=())
def sparse_row_grads_op(
    weights: Tensor,
    indices: Tensor,
    rows: Tensor,
    d_sae: int,
    order: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row sums [d_sae, d_model], weight sums [d_sae] and nonzero counts [d_sae] (int64).

    ``order`` and ``starts``: what `sort_indices(indices, d_sae)` gave, where the caller has it.
    """
    check_indices(indices, d_sae)
    grouped = grouped_by(indices, d_sae, order, starts)
    run = sparse_row_grads_triton if use_triton(rows) else sparse_row_grads_torch
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        grads, sums = run(weights, rows, grouped)
    return grads, sums, count_nonzero(weights, grouped)


@sparse_row_grads_op.register_fake
def _(
    weights: Tensor,
    indices: Tensor,
    rows: Tensor,
    d_sae: int | torch.SymInt,
    order: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator_dtype(weights, rows)
    return (
        rows.new_empty((d_sae, rows.shape[1]), dtype=dtype),
        rows.new_empty((d_sae,), dtype=dtype),
        rows.new_empty((d_sae,), dtype=torch.int64),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    weights, indices, rows, *_ = inputs
    ctx.save_for_backward(weights, indices, rows)


def _backward(ctx: Any, grad_grads: Tensor, grad_sums: Tensor, grad_counts: Any) -> tuple[Any, ...]:
    # Imported here: decode, gather-dot and row sums are one another's derivatives.
    from saesteer.kernels.gather_dot import gather_dot_op
    from saesteer.kernels.sparse_decode import sparse_decode_op

    weights, indices, rows = ctx.saved_tensors
    grad_weights = grad_rows = None
    if ctx.needs_input_grad[0]:
        grad_weights = gather_dot_op(rows, grad_grads, indices) + grad_sums[indices]
        grad_weights = grad_weights.to(weights.dtype)
    if ctx.needs_input_grad[2]:
        grad_rows = sparse_decode_op(weights, indices, grad_grads, None).to(rows.dtype)
    return grad_weights, None, grad_rows, None, None, None


sparse_row_grads_op.register_autograd(_backward, setup_context=_setup_context)
