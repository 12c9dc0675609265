"""Decode, compare with the target, and take the gradient of the latent activations, in one pass.

``error[b] = b_dec + sum over i of latent_acts[b, i] * W_dec[latent_indices[b, i]] - target[b]``
``squared_error[b] = |error[b]|^2``
``act_grads[b, i] = <error[b], W_dec[latent_indices[b, i]]>``

``2 * error`` and ``2 * act_grads`` are the derivatives of the squared error by the decoded vector
and by the activations. They cost little while the decoder rows of an example are still in the
cache, so they are taken in the forward pass; an upstream gradient only scales them. Entries may be
ragged (`saesteer.kernels.entries`).
"""

from typing import Any, no_type_check

import torch
from torch import Tensor

from saesteer.kernels.derivatives import gather_dot_op, sparse_row_grads_op
from saesteer.kernels.dispatch import (
    TRITON_INSTALLED,
    Tile,
    accumulator_dtype,
    prefers_dense,
    unit_stride,
    use_triton,
)
from saesteer.kernels.entries import (
    batch_of,
    check_entries,
    from_dense,
    mean_length,
    per_entry,
    row_starts_of,
    to_dense,
)
from saesteer.kernels.gather_dot import gather_dot_torch
from saesteer.kernels.native import even_bounds, parts_of, result_memory, run_parts, use_native
from saesteer.kernels.sparse_decode import sparse_decode_torch

Triple = tuple[Tensor, Tensor, Tensor]

TILES = (Tile(8, 256, 1), Tile(16, 512, 1), Tile(8, 512, 1), Tile(8, 1024, 2))
"""The first, the fastest on an H100, is used; `benchmarks/kernel_tiles.py` times all of them."""


def decode_mse_reference(
    latent_acts: Tensor,
    latent_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    row_starts: Tensor | None = None,
) -> Triple:
    """The op's definition in dense, differentiable PyTorch, for tests and benchmarks."""
    dense = to_dense(latent_acts, latent_indices, W_dec.shape[0], row_starts)
    error = dense @ W_dec + b_dec - target
    return error.square().sum(1), error, from_dense(error @ W_dec.t(), latent_indices, row_starts)


def decode_mse_torch(
    latent_acts: Tensor,
    latent_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    row_starts: Tensor | None = None,
) -> Triple:
    """PyTorch twin."""
    acc = accumulator_dtype(latent_acts, W_dec, target)
    acts, indices, W = latent_acts.to(acc), latent_indices.to(torch.int64), W_dec.to(acc)
    b_dec, target = b_dec.to(acc), target.to(acc)
    if prefers_dense(W_dec, mean_length(indices, row_starts)):
        return decode_mse_reference(acts, indices, W, b_dec, target, row_starts)
    error = sparse_decode_torch(acts, indices, W, b_dec, row_starts) - target
    return error.square().sum(1), error, gather_dot_torch(error, W, indices, row_starts)


if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["k", "batch", "n_entries"])
    @no_type_check
    def decode_mse_kernel(
        latent_acts,
        latent_indices,
        row_starts,
        W_dec,
        b_dec,
        target,
        squared_error,
        error,
        act_grads,
        k,
        batch,
        n_entries,
        d_model,
        stride_W_dec,
        stride_target,
        RAGGED: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_D: tl.constexpr,
        STAGES: tl.constexpr,
        ACC: tl.constexpr,
    ):
        """BLOCK_D columns of one example's error, and their part of its square and its dots."""
        example = tl.program_id(0).to(tl.int64)
        block = tl.program_id(1).to(tl.int64)
        if RAGGED:
            begin = tl.load(row_starts + example)
            end = tl.load(row_starts + example + 1)
        else:
            begin = example * k
            end = begin + k
        col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        col_ok = col < d_model
        line = tl.load(b_dec + col, mask=col_ok, other=0.0).to(ACC)
        line -= tl.load(target + example * stride_target + col, mask=col_ok, other=0.0).to(ACC)
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
        tl.store(error + example * d_model + col, line, mask=col_ok)
        line = tl.where(col_ok, line, 0.0)
        tl.store(squared_error + block * batch + example, tl.sum(line * line, axis=0))
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


def decode_mse_triton(
    latent_acts: Tensor,
    latent_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    row_starts: Tensor | None = None,
) -> Triple:
    """Triton kernel. Each block of columns gives partial sums, which are added in order."""
    batch, d_model = target.shape
    dtype = accumulator_dtype(latent_acts, W_dec, target)
    W_dec, target = unit_stride(W_dec), unit_stride(target)
    error = W_dec.new_empty((batch, d_model), dtype=dtype)
    if batch == 0 or d_model == 0:
        return error.new_zeros((batch,)), error, error.new_zeros(latent_indices.shape)
    tile = TILES[0]
    block_d, warps = tile.fit(d_model, W_dec.element_size())
    blocks = triton.cdiv(d_model, block_d)
    parts = (blocks,) if blocks > 1 else ()
    squared_error = error.new_empty((*parts, batch))
    act_grads = error.new_empty((*parts, *latent_indices.shape))
    latent_indices = latent_indices.contiguous()
    decode_mse_kernel[(batch, blocks)](
        latent_acts.contiguous(),
        latent_indices,
        latent_indices if row_starts is None else row_starts.contiguous(),
        W_dec,
        b_dec.contiguous(),
        target,
        squared_error,
        error,
        act_grads,
        latent_indices.shape[-1],
        batch,
        latent_indices.numel(),
        d_model,
        W_dec.stride(0),
        target.stride(0),
        RAGGED=row_starts is not None,
        ROWS=tile.rows,
        BLOCK_D=block_d,
        STAGES=tile.stages,
        ACC=tl.float64 if dtype == torch.float64 else tl.float32,
        num_warps=warps,
    )
    if parts:
        squared_error, act_grads = squared_error.sum(0), act_grads.sum(0)
    return squared_error, error, act_grads


def decode_mse_native(
    latent_acts: Tensor,
    latent_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    row_starts: Tensor | None = None,
) -> Triple:
    """Compiled CPU loop, for float32."""
    from saesteer.kernels.decode_mse_cpu import decode_mse_rows

    batch, d_model = target.shape
    squared_error = target.new_empty((batch,))
    error = result_memory((batch, d_model))
    act_grads = target.new_empty(latent_indices.shape)
    run_parts(
        decode_mse_rows,
        even_bounds(batch, parts_of(batch, 8)),
        latent_acts.reshape(-1).contiguous().numpy(),
        latent_indices.to(torch.int64).reshape(-1).contiguous().numpy(),
        row_starts_of(latent_indices, row_starts).contiguous().numpy(),
        *(t.contiguous().numpy() for t in (W_dec, b_dec, target)),
        squared_error.numpy(),
        error.numpy(),
        act_grads.view(-1).numpy(),
    )
    return squared_error, error, act_grads


@torch.library.custom_op("saesteer::decode_mse", mutates_args=())
def decode_mse_op(
    latent_acts: Tensor,
    latent_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    row_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared errors [batch], errors [batch, d_model] and slot gradients, one per index."""
    check_entries(latent_indices, W_dec.shape[0], row_starts)
    dense = prefers_dense(W_dec, mean_length(latent_indices, row_starts))
    if use_triton(W_dec) and not dense:
        run = decode_mse_triton
    elif use_native(latent_acts, W_dec, b_dec, target) and not dense:
        run = decode_mse_native
    else:
        run = decode_mse_torch
    with torch.cuda.device_of(W_dec):  # Triton launches on the current device
        return run(latent_acts, latent_indices, W_dec, b_dec, target, row_starts)


@decode_mse_op.register_fake
def _(
    latent_acts: Tensor,
    latent_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    row_starts: Tensor | None = None,
) -> Triple:
    dtype = accumulator_dtype(latent_acts, W_dec, target)
    batch, d_model = batch_of(latent_indices, row_starts), W_dec.shape[1]
    return (
        target.new_empty((batch,), dtype=dtype),
        target.new_empty((batch, d_model), dtype=dtype),
        target.new_empty(latent_indices.shape, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    latent_acts, latent_indices, W_dec, b_dec, target, row_starts = inputs
    _, error, act_grads = output
    ctx.mark_non_differentiable(act_grads)
    ctx.save_for_backward(latent_acts, latent_indices, W_dec, error, act_grads, row_starts)
    ctx.dtypes = b_dec.dtype, target.dtype


def _backward(ctx: Any, grad_squared: Tensor, grad_error: Tensor, grad_slots: Any) -> Any:
    latent_acts, latent_indices, W_dec, error, act_grads, row_starts = ctx.saved_tensors
    bias_dtype, target_dtype = ctx.dtypes
    upstream = 2 * grad_squared[:, None] * error + grad_error
    grad_acts = grad_W_dec = grad_b_dec = grad_target = None
    if ctx.needs_input_grad[0]:
        grad_acts = per_entry(2 * grad_squared, latent_indices, row_starts) * act_grads
        grad_acts = grad_acts + gather_dot_op(grad_error, W_dec, latent_indices, row_starts)
        grad_acts = grad_acts.to(latent_acts.dtype)
    if ctx.needs_input_grad[2]:
        grad_W_dec, _, _ = sparse_row_grads_op(
            latent_acts, latent_indices, upstream, W_dec.shape[0], row_starts
        )
        grad_W_dec = grad_W_dec.to(W_dec.dtype)
    if ctx.needs_input_grad[3]:
        grad_b_dec = upstream.sum(0).to(bias_dtype)
    if ctx.needs_input_grad[4]:
        grad_target = -upstream.to(target_dtype)
    return grad_acts, None, grad_W_dec, grad_b_dec, grad_target, None


decode_mse_op.register_autograd(_backward, setup_context=_setup_context)
