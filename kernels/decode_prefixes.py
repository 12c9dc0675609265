"""Decode nested prefixes of the latents, compare each with the target, and take the gradients.

The entries of an example come in pieces, one for each of ``levels`` prefixes: piece g holds the
latents that belong to prefix g and not to the one before. With ``x^_g = b_dec +`` what pieces 0..g
add up to,

``squared_error[b, g] = |x^_g - target[b]|^2``
``suffix_errors[b, g] = sum over j >= g of (x^_j - target[b])``
``act_grads[i] = <suffix_errors[b, g], W_dec[latent_indices[i]]>`` for entry i of piece g.

Twice the last two are the derivatives of the sum of all squared errors by what piece g adds and by
the activations. An example's rows are read once and are still in the cache for their second use, as
in `decode_mse`, which this is with one level.
"""

from typing import no_type_check

import torch
from torch import Tensor

from saesteer.kernels.decode_mse import TILES
from saesteer.kernels.derivatives import gather_dot_op, sparse_decode_op
from saesteer.kernels.dispatch import (
    TRITON_INSTALLED,
    accumulator_dtype,
    unit_stride,
    use_triton,
)
from saesteer.kernels.entries import check_entries, to_dense
from saesteer.kernels.native import even_bounds, parts_of, result_memory, run_parts, use_native

Decoded = tuple[Tensor, Tensor, Tensor, Tensor]


def decode_prefixes_reference(
    latent_acts: Tensor, latent_indices: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor,
    piece_starts: Tensor, levels: int,
) -> Decoded:  # fmt: skip
    """What the op means, in dense PyTorch. For tests and benchmarks."""
    pieces = to_dense(latent_acts, latent_indices, W_dec.shape[0], piece_starts) @ W_dec
    errors = pieces.view(-1, levels, W_dec.shape[1]).cumsum(1) + (b_dec - target)[:, None]
    suffix = errors.flip(1).cumsum(1).flip(1)
    grads = gather_dot_op(suffix.flatten(0, 1), W_dec, latent_indices, piece_starts)
    return errors.square().sum(2), errors[:, -1].clone(), suffix, grads


def decode_prefixes_torch(
    latent_acts: Tensor, latent_indices: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor,
    piece_starts: Tensor, levels: int,
) -> Decoded:  # fmt: skip
    """PyTorch twin."""
    dtype = accumulator_dtype(latent_acts, W_dec, target)
    added = sparse_decode_op(latent_acts.to(dtype), latent_indices, W_dec, None, piece_starts)
    errors = added.view(-1, levels, W_dec.shape[1])
    errors[:, 0] += b_dec.to(dtype) - target.to(dtype)
    for level in range(1, levels):
        errors[:, level] += errors[:, level - 1]
    squared, last = errors.square().sum(2), errors[:, -1].clone()
    for level in range(levels - 2, -1, -1):
        errors[:, level] += errors[:, level + 1]
    act_grads = gather_dot_op(errors.flatten(0, 1), W_dec, latent_indices, piece_starts)
    return squared, last, errors, act_grads


if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["levels", "batch", "n_entries"])
    @no_type_check
    def decode_prefixes_kernel(
        latent_acts,
        latent_indices,
        piece_starts,
        W_dec,
        b_dec,
        target,
        squared_error,
        last_error,
        suffix_errors,
        act_grads,
        levels,
        batch,
        n_entries,
        d_model,
        stride_W_dec,
        stride_target,
        ROWS: tl.constexpr,
        BLOCK_D: tl.constexpr,
        STAGES: tl.constexpr,
        ACC: tl.constexpr,
    ):
        """BLOCK_D columns of one example: its errors, and their part of squares and dots.

        Upwards through the levels the errors go into suffix_errors, downwards each becomes the sum
        of those from it on.
        """
        example = tl.program_id(0).to(tl.int64)
        block = tl.program_id(1).to(tl.int64)
        first_piece = example * levels
        col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        col_ok = col < d_model
        line = tl.load(b_dec + col, mask=col_ok, other=0.0).to(ACC)
        line -= tl.load(target + example * stride_target + col, mask=col_ok, other=0.0).to(ACC)
        for level in range(levels):
            piece = first_piece + level
            begin = tl.load(piece_starts + piece)
            end = tl.load(piece_starts + piece + 1)
            for first in tl.range(begin, end, ROWS, num_stages=STAGES):
                at = first + tl.arange(0, ROWS)
                ok = at < end
                act = tl.load(latent_acts + at, mask=ok, other=0.0).to(ACC)
                row = tl.load(latent_indices + at, mask=ok, other=0).to(tl.int64)
                tile = tl.load(
                    W_dec + row[:, None] * stride_W_dec + col[None, :],
                    mask=ok[:, None] & col_ok[None, :],
                    other=0.0,
                ).to(ACC)
                line += tl.sum(act[:, None] * tile, axis=0)
            tl.store(suffix_errors + piece * d_model + col, line, mask=col_ok)
            square = tl.sum(tl.where(col_ok, line * line, 0.0), axis=0)
            tl.store(squared_error + block * batch * levels + piece, square)
        tl.store(last_error + example * d_model + col, line, mask=col_ok)
        tl.debug_barrier()  # the way down reads what other threads may have written
        line = tl.zeros([BLOCK_D], ACC)
        for below in range(levels):
            piece = first_piece + levels - 1 - below
            at_line = suffix_errors + piece * d_model + col
            line += tl.load(at_line, mask=col_ok, other=0.0)
            tl.store(at_line, line, mask=col_ok)
            begin = tl.load(piece_starts + piece)
            end = tl.load(piece_starts + piece + 1)
            # The same rows again: those of one program fit into the L1 cache.
            for first in tl.range(begin, end, ROWS, num_stages=STAGES):
                at = first + tl.arange(0, ROWS)
                ok = at < end
                row = tl.load(latent_indices + at, mask=ok, other=0).to(tl.int64)
                tile = tl.load(
                    W_dec + row[:, None] * stride_W_dec + col[None, :],
                    mask=ok[:, None] & col_ok[None, :],
                    other=0.0,
                ).to(ACC)
                dots = tl.sum(line[None, :] * tile, axis=1)
                tl.store(act_grads + block * n_entries + at, dots, mask=ok)


def decode_prefixes_triton(
    latent_acts: Tensor, latent_indices: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor,
    piece_starts: Tensor, levels: int,
) -> Decoded:  # fmt: skip
    """Triton kernel. Each block of columns gives partial sums, which are added in order."""
    batch, d_model = target.shape
    dtype = accumulator_dtype(latent_acts, W_dec, target)
    W_dec, target = unit_stride(W_dec), unit_stride(target)
    n_entries = latent_indices.numel()
    last = target.new_empty((batch, d_model), dtype=dtype)
    suffix = target.new_empty((batch, levels, d_model), dtype=dtype)
    if batch == 0 or d_model == 0:
        return last.new_zeros((batch, levels)), last, suffix, last.new_zeros((n_entries,))
    tile = TILES[0]
    block_d, warps = tile.fit(d_model, W_dec.element_size())
    blocks = triton.cdiv(d_model, block_d)
    parts = (blocks,) if blocks > 1 else ()
    squared = target.new_empty((*parts, batch, levels), dtype=dtype)
    act_grads = target.new_empty((*parts, n_entries), dtype=dtype)
    decode_prefixes_kernel[(batch, blocks)](
        latent_acts.contiguous(), latent_indices.contiguous(), piece_starts.contiguous(),
        W_dec, b_dec.contiguous(), target, squared, last, suffix, act_grads,
        levels, batch, n_entries, d_model, W_dec.stride(0), target.stride(0),
        ROWS=tile.rows, BLOCK_D=block_d, STAGES=tile.stages,
        ACC=tl.float64 if dtype == torch.float64 else tl.float32, num_warps=warps,
    )  # fmt: skip
    if parts:
        squared, act_grads = squared.sum(0), act_grads.sum(0)
    return squared, last, suffix, act_grads


def decode_prefixes_native(
    latent_acts: Tensor, latent_indices: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor,
    piece_starts: Tensor, levels: int,
) -> Decoded:  # fmt: skip
    """Compiled CPU loop, for float32."""
    from saesteer.kernels.decode_prefixes_cpu import decode_prefixes_rows

    batch, d_model = target.shape
    squared = target.new_empty((batch, levels))
    last = target.new_empty((batch, d_model))
    suffix = result_memory((batch, levels, d_model))
    act_grads = target.new_empty(latent_indices.shape)
    run_parts(
        decode_prefixes_rows, even_bounds(batch, parts_of(batch, 8)),
        latent_acts.contiguous().numpy(), latent_indices.to(torch.int64).contiguous().numpy(),
        piece_starts.contiguous().numpy(),
        *(t.contiguous().numpy() for t in (W_dec, b_dec, target)),
        squared.numpy(), last.numpy(), suffix.numpy(), act_grads.numpy(),
    )  # fmt: skip
    return squared, last, suffix, act_grads


@torch.library.custom_op("saesteer::decode_prefixes", mutates_args=())
def decode_prefixes_op(
    latent_acts: Tensor,
    latent_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    piece_starts: Tensor,
    levels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared errors [batch, levels], the last error [batch, d_model], suffix sums [batch, levels,
    d_model] and entry gradients [entries]. Not differentiable: it gives gradients."""
    check_entries(latent_indices, W_dec.shape[0], piece_starts)
    if use_triton(W_dec):
        run = decode_prefixes_triton
    elif use_native(latent_acts, W_dec, b_dec, target):
        run = decode_prefixes_native
    else:
        run = decode_prefixes_torch
    with torch.cuda.device_of(W_dec):  # Triton launches on the current device
        return run(latent_acts, latent_indices, W_dec, b_dec, target, piece_starts, levels)


@decode_prefixes_op.register_fake
def _(
    latent_acts: Tensor,
    latent_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    piece_starts: Tensor,
    levels: int,
) -> Decoded:
    dtype = accumulator_dtype(latent_acts, W_dec, target)
    batch, d_model = target.shape
    return (
        target.new_empty((batch, levels), dtype=dtype),
        target.new_empty((batch, d_model), dtype=dtype),
        target.new_empty((batch, levels, d_model), dtype=dtype),
        target.new_empty(latent_indices.shape, dtype=dtype),
    )
