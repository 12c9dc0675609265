"""Sum rows of a batch into the latents they belong to: the gradient of a sparse matrix product.

``grads[f] = sum over (b, i) with indices[b, i] == f of weights[b, i] * rows[b]``, for entries in
either form of `saesteer.kernels.entries`.

Both weight gradients of a TopK SAE have this form: decoder (weights = latent activations, rows =
output gradient) and encoder (weights = gradient of the pre-activations, rows = input). The entries
are sorted by latent once and each latent's run is summed in order, so no [batch, k, d_model]
tensor exists, no atomic addition is used and the result is the same bit for bit at every call.
"""

from typing import NamedTuple, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor

from saesteer.kernels.dispatch import (
    TRITON_INSTALLED,
    Tile,
    accumulator_dtype,
    unit_stride,
    use_triton,
)
from saesteer.kernels.entries import check_entries, check_row_starts, examples_of, to_dense

CHUNK = 64
"""Most entries that one Triton program adds up. A latent with more is split into chunks, and a
second kernel adds their sums in order: a latent that always fires would hold up all others."""

TILES = (Tile(4, 2048, 4), Tile(8, 1024, 2), Tile(8, 2048, 4), Tile(8, 512, 1))
"""The first, the fastest on an H100, is used; `benchmarks/kernel_tiles.py` times all of them."""


class LatentOrder(NamedTuple):
    """The entries of a batch, grouped by latent."""

    order: Tensor
    """[entries] int64: positions in the flattened entries, by latent, then by position."""
    starts: Tensor
    """[d_sae + 1] int64: latent f owns ``order[starts[f]:starts[f + 1]]``."""
    examples: Tensor | None = None
    """[entries] int64: the example of each entry. None for a rectangle, where it is entry // k."""


def sort_indices(indices: Tensor, d_sae: int, row_starts: Tensor | None = None) -> LatentOrder:
    """Group entries by latent: ``indices`` [batch, k], or [entries] with ``row_starts``.

    Values are in 0..d_sae-1. The sort is stable: a latent's entries stay in batch order, which
    fixes the order of its sum.
    """
    if not torch.compiler.is_compiling():
        check_row_starts(indices, row_starts)
    flat = indices.reshape(-1)
    # 32-bit keys sort faster, and d_sae always fits.
    ordered, order = flat.to(torch.int32).sort(stable=True)
    bounds = torch.arange(d_sae + 1, dtype=torch.int32, device=flat.device)
    examples = None if row_starts is None else examples_of(len(flat), row_starts)
    return LatentOrder(order, torch.searchsorted(ordered, bounds), examples)


def sparse_row_grads_reference(
    weights: Tensor,
    indices: Tensor,
    rows: Tensor,
    d_sae: int,
    row_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's definition in dense, differentiable PyTorch, for tests and benchmarks."""
    dense = to_dense(weights, indices, d_sae, row_starts)
    hits = to_dense((weights != 0).to(torch.int64), indices, d_sae, row_starts)
    return dense.t() @ rows, dense.sum(0), hits.sum(0)


def sorted_rows(weights: Tensor, order: LatentOrder, pieces: int = 1) -> Tensor:
    """Row of each entry in the order of the latents, [entries] int64.

    That is its example, or where ``pieces`` examples in a row are pieces of one, the one.
    """
    if order.examples is None:
        return order.order // (weights.shape[1] * pieces)
    examples = order.examples[order.order]
    return examples if pieces == 1 else examples // pieces


def sparse_row_grads_torch(
    weights: Tensor, rows: Tensor, order: LatentOrder, pieces: int = 1
) -> tuple[Tensor, Tensor]:
    """PyTorch twin: row sums [d_sae, d_model] and weight sums [d_sae]."""
    acc = accumulator_dtype(weights, rows)
    sorted_weights = weights.reshape(-1)[order.order].to(acc)
    examples = sorted_rows(weights, order, pieces)

    def add_up(matrix: Tensor) -> Tensor:
        # A bag per latent. Several times faster on a CPU than a CSR product, and as exact.
        return F.embedding_bag(
            examples,
            matrix,
            order.starts,
            mode="sum",
            per_sample_weights=sorted_weights,
            include_last_offset=True,
        )

    sums = add_up(rows.new_ones((rows.shape[0], 1), dtype=acc))[:, 0]
    return add_up(rows.to(acc).contiguous()), sums.contiguous()


def count_nonzero(weights: Tensor, order: LatentOrder) -> Tensor:
    """Per latent the number of its weights that are not 0, [d_sae] int64."""
    nonzero = weights.new_zeros((weights.numel() + 1,), dtype=torch.int64)
    torch.cumsum(weights.reshape(-1)[order.order] != 0, 0, out=nonzero[1:])
    return nonzero[order.starts].diff()


if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit
    @no_type_check
    def row_grads_kernel(
        weights,
        rows,
        order,
        examples,
        starts,
        owners,
        grads,
        sums,
        counts,
        later_grads,
        later_sums,
        later_counts,
        d_sae,
        d_model,
        stride_rows,
        CHUNK: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_D: tl.constexpr,
        STAGES: tl.constexpr,
        ACC: tl.constexpr,
    ):
        """One chunk of one latent's entries, for BLOCK_D columns.

        Slot f < d_sae is the first chunk of latent f, also where it has no entries. Slot d_sae + e
        is the later chunk that begins at one of the entries e * CHUNK to e * CHUNK + CHUNK - 1:
        there is one at most, and entry e * CHUNK is of the same latent, owners[e] - 1.
        """
        slot = tl.program_id(0).to(tl.int64)
        extra = slot - d_sae
        latent = tl.load(owners + extra, mask=extra >= 0, other=0) - 1
        latent = tl.where(extra >= 0, latent, slot)
        start = tl.load(starts + latent)
        stop = tl.load(starts + latent + 1)
        part = tl.where(extra >= 0, (extra * CHUNK - start + CHUNK - 1) // CHUNK, 0)
        begin = start + part * CHUNK
        if (extra >= 0) & ((part == 0) | (begin >= stop)):
            return
        end = tl.minimum(begin + CHUNK, stop)

        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        col_ok = cols < d_model
        acc = tl.zeros([BLOCK_D], ACC)
        total = tl.zeros([ROWS], ACC)
        hits = tl.zeros([ROWS], tl.int32)
        for first in tl.range(begin, end, ROWS, num_stages=STAGES):
            at = first + tl.arange(0, ROWS)
            ok = at < end
            example = tl.load(examples + at, mask=ok, other=0)
            entry = tl.load(order + at, mask=ok, other=0)
            weight = tl.load(weights + entry, mask=ok, other=0.0).to(ACC)
            row = tl.load(
                rows + example[:, None] * stride_rows + cols[None, :],
                mask=ok[:, None] & col_ok[None, :],
                other=0.0,
            ).to(ACC)
            acc += tl.sum(weight[:, None] * row, axis=0)
            total += weight
            hits += (weight != 0).to(tl.int32)
        first_tile = tl.program_id(1) == 0
        if extra < 0:
            tl.store(grads + slot * d_model + cols, acc, mask=col_ok)
            tl.store(sums + slot, tl.sum(total, axis=0), mask=first_tile)
            tl.store(counts + slot, tl.sum(hits, axis=0).to(tl.int64), mask=first_tile)
        else:
            tl.store(later_grads + extra * d_model + cols, acc, mask=col_ok)
            tl.store(later_sums + extra, tl.sum(total, axis=0), mask=first_tile)
            tl.store(later_counts + extra, tl.sum(hits, axis=0).to(tl.int64), mask=first_tile)

    @triton.jit
    @no_type_check
    def add_chunks_kernel(
        starts,
        owners,
        grads,
        sums,
        counts,
        later_grads,
        later_sums,
        later_counts,
        d_model,
        CHUNK: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ACC: tl.constexpr,
    ):
        """Add a latent's later chunks to its first in order. Its second chunk's program does so."""
        extra = tl.program_id(0).to(tl.int64)
        latent = tl.load(owners + extra) - 1
        start = tl.load(starts + latent)
        stop = tl.load(starts + latent + 1)
        part = (extra * CHUNK - start + CHUNK - 1) // CHUNK
        if (part != 1) | (start + CHUNK >= stop):
            return
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        col_ok = cols < d_model
        at_first = grads + latent * d_model + cols
        acc = tl.load(at_first, mask=col_ok, other=0.0)
        one = tl.arange(0, 1)
        total = tl.load(sums + latent + one)
        hits = tl.load(counts + latent + one)
        for later in range(0, (stop - start - 1) // CHUNK):
            at = extra + later
            acc += tl.load(later_grads + at * d_model + cols, mask=col_ok, other=0.0)
            total += tl.load(later_sums + at + one)
            hits += tl.load(later_counts + at + one)
        tl.store(at_first, acc, mask=col_ok)
        if tl.program_id(1) == 0:
            tl.store(sums + latent + one, total)
            tl.store(counts + latent + one, hits)


class WorkList(NamedTuple):
    """What several sums over the same grouping share. None of its sizes depends on how often
    latents occur, because the host would have to wait for that."""

    examples: Tensor
    """[entries] int64, in the order of the latents: `sorted_rows`."""
    owners: Tensor
    """1 + the latent of every CHUNK-th entry of the order."""


def work_list(weights: Tensor, order: LatentOrder, pieces: int = 1) -> WorkList:
    """The work list of one grouping; ``weights`` gives only the shape of the entries."""
    firsts = torch.arange(0, order.order.numel(), CHUNK, device=order.starts.device)
    owners = torch.searchsorted(order.starts, firsts, right=True)
    return WorkList(sorted_rows(weights, order, pieces), owners)


def sparse_row_grads_triton(
    weights: Tensor, rows: Tensor, order: LatentOrder, work: WorkList | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Triton kernel: row sums [d_sae, d_model], weight sums [d_sae], nonzero counts [d_sae]."""
    d_sae, d_model = order.starts.numel() - 1, rows.shape[1]
    dtype = accumulator_dtype(weights, rows)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    weights, rows = weights.contiguous(), unit_stride(rows)
    work = work or work_list(weights, order)
    n_later = len(work.owners)
    # First chunks are written straight into the result, later ones into buffers of their own.
    result, later = (
        (
            rows.new_empty((length, d_model), dtype=dtype),
            rows.new_empty((length,), dtype=dtype),
            rows.new_empty((length,), dtype=torch.int64),
        )
        for length in (d_sae, n_later)
    )
    if d_sae == 0:
        return result

    tile = TILES[0]
    block_d, warps = tile.fit(max(1, d_model), rows.element_size())
    d_tiles = triton.cdiv(max(1, d_model), block_d)  # one also where only sums are wanted
    row_grads_kernel[(d_sae + n_later, d_tiles)](
        weights,
        rows,
        order.order,
        work.examples,
        order.starts,
        work.owners,
        *result,
        *later,
        d_sae,
        d_model,
        rows.stride(0),
        CHUNK=CHUNK,
        ROWS=tile.rows,
        BLOCK_D=block_d,
        STAGES=tile.stages,
        ACC=acc,
        num_warps=warps,
    )
    if n_later:
        add_chunks_kernel[(n_later, d_tiles)](
            order.starts,
            work.owners,
            *result,
            *later,
            d_model,
            CHUNK=CHUNK,
            BLOCK_D=block_d,
            ACC=acc,
            num_warps=warps,
        )
    return result


def sum_rows(
    weights: Tensor, rows: Tensor, order: LatentOrder, pieces: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Row sums [d_sae, d_model], weight sums [d_sae], nonzero counts [d_sae]."""
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        if use_triton(rows):
            work = work_list(weights, order, pieces)
            return sparse_row_grads_triton(weights, rows, order, work)
        sums = sparse_row_grads_torch(weights, rows, order, pieces)
        return (*sums, count_nonzero(weights, order))


def grouped_by(
    indices: Tensor,
    d_sae: int,
    row_starts: Tensor | None,
    order: Tensor | None,
    starts: Tensor | None,
    examples: Tensor | None,
) -> LatentOrder:
    """The grouping that the caller has made already, or one of ``indices`` made now."""
    if order is None or starts is None:
        return sort_indices(indices, d_sae, row_starts)
    return LatentOrder(order, starts, examples)


@torch.library.custom_op("saesteer::sparse_row_grads", mutates_args=())
def sparse_row_grads_op(
    weights: Tensor,
    indices: Tensor,
    rows: Tensor,
    d_sae: int,
    row_starts: Tensor | None = None,
    order: Tensor | None = None,
    starts: Tensor | None = None,
    examples: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row sums [d_sae, d_model], weight sums [d_sae] and nonzero counts [d_sae] (int64).

    ``order``, ``starts``, ``examples``: the `LatentOrder` of the entries, where the caller has it.
    """
    check_entries(indices, d_sae, row_starts)
    return sum_rows(weights, rows, grouped_by(indices, d_sae, row_starts, order, starts, examples))


@sparse_row_grads_op.register_fake
def _(
    weights: Tensor,
    indices: Tensor,
    rows: Tensor,
    d_sae: int | torch.SymInt,
    row_starts: Tensor | None = None,
    order: Tensor | None = None,
    starts: Tensor | None = None,
    examples: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator_dtype(weights, rows)
    return (
        rows.new_empty((d_sae, rows.shape[1]), dtype=dtype),
        rows.new_empty((d_sae,), dtype=dtype),
        rows.new_empty((d_sae,), dtype=torch.int64),
    )
