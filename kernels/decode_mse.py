"""Decode, compare with the target, and take the gradient of the latent activations, in one pass.

``error[b] = b_dec + sum over i of latent_acts[b, i] * W_dec[latent_indices[b, i]] - target[b]``
``squared_error[b] = |error[b]|^2``
``act_grads[b, i] = <error[b], W_dec[latent_indices[b, i]]>``

``2 * error`` and ``2 * act_grads`` are the derivatives of the squared error by the decoded vector
and by the activations. They cost little while the k decoder rows of an example are still in the
cache, so they are taken in the forward pass; an upstream gradient only scales them.
"""

from typing import Any, no_type_check

import torch
from torch import Tensor

from saesteer.kernels.dispatch import (
    TRITON_INSTALLED,
    accumulator_dtype,
    check_indices,
    column_block,
    prefers_dense,
    unit_stride,
    use_triton,
)
from saesteer.kernels.gather_dot import gather_dot_op, gather_dot_torch
from saesteer.kernels.native import even_bounds, parts_of, run_parts, use_native
from saesteer.kernels.sparse_decode import sparse_decode_torch
from saesteer.kernels.sparse_row_grads import sparse_row_grads_op

Triple = tuple[Tensor, Tensor, Tensor]


def decode_mse_reference(
    latent_acts: Tensor, latent_indices: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor
) -> Triple:
    """What the op means, in dense, differentiable PyTorch. For tests and benchmarks."""
    dense = latent_acts.new_zeros((latent_acts.shape[0], W_dec.shape[0]))
    dense = dense.scatter_add(1, latent_indices, latent_acts)
    error = dense @ W_dec + b_dec - target
    return error.square().sum(1), error, (error @ W_dec.t()).gather(1, latent_indices)


def decode_mse_torch(
    latent_acts: Tensor, latent_indices: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor
) -> Triple:
    """PyTorch twin."""
    acc = accumulator_dtype(latent_acts, W_dec, target)
    acts, indices, W = latent_acts.to(acc), latent_indices.to(torch.int64), W_dec.to(acc)
    b_dec, target = b_dec.to(acc), target.to(acc)
    if prefers_dense(W_dec, acts.shape[1]):
        return decode_mse_reference(acts, indices, W, b_dec, target)
    error = sparse_decode_torch(acts, indices, W, b_dec) - target
    return error.square().sum(1), error, gather_dot_torch(error, W, indices)


if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["k"])
    @no_type_check
    def decode_mse_kernel(
        latent_acts,
        latent_indices,
        W_dec,
        b_dec,
        target,
        squared_error,
        error,
        act_grads,
        k,
        d_model,
        stride_acts,
        stride_indices,
        stride_W_dec,
        stride_target,
        BLOCK_K: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ACC: tl.constexpr,
    ):
        """One example, BLOCK_D columns at a time; a tile's rows are read twice, at once."""
        example = tl.program_id(0).to(tl.int64)
        square = tl.zeros([BLOCK_D], ACC)
        for start in range(0, d_model, BLOCK_D):
            col = start + tl.arange(0, BLOCK_D)
            col_ok = col < d_model
            line = tl.load(b_dec + col, mask=col_ok, other=0.0).to(ACC)
            line -= tl.load(target + example * stride_target + col, mask=col_ok, other=0.0).to(ACC)
            for first in range(0, k, BLOCK_K):
                slot = first + tl.arange(0, BLOCK_K)
                ok = slot < k
                act = tl.load(latent_acts + example * stride_acts + slot, mask=ok, other=0.0)
                row = tl.load(latent_indices + example * stride_indices + slot, mask=ok, other=0)
                tile = tl.load(
                    W_dec + row.to(tl.int64)[:, None] * stride_W_dec + col[None, :],
                    mask=ok[:, None] & col_ok[None, :],
                    other=0.0,
                ).to(ACC)
                line += tl.sum(act.to(ACC)[:, None] * tile, axis=0)
            tl.store(error + example * d_model + col, line, mask=col_ok)
            line = tl.where(col_ok, line, 0.0)
            square += line * line
            for first in range(0, k, BLOCK_K):
                slot = first + tl.arange(0, BLOCK_K)
                ok = slot < k
                row = tl.load(latent_indices + example * stride_indices + slot, mask=ok, other=0)
                tile = tl.load(
                    W_dec + row.to(tl.int64)[:, None] * stride_W_dec + col[None, :],
                    mask=ok[:, None] & col_ok[None, :],
                    other=0.0,
                ).to(ACC)
                at = act_grads + example * k + slot
                # Nothing is there yet at the first tile, whatever the memory holds.
                before = tl.load(at, mask=ok & (start > 0), other=0.0)
                tl.store(at, before + tl.sum(line[None, :] * tile, axis=1), mask=ok)
            tl.debug_barrier()  # what one warp stored, another may read at the next tile
        tl.store(squared_error + example, tl.sum(square, axis=0))


def decode_mse_triton(
    latent_acts: Tensor, latent_indices: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor
) -> Triple:
    """Triton kernel."""
    (batch, k), d_model = latent_acts.shape, W_dec.shape[1]
    dtype = accumulator_dtype(latent_acts, W_dec, target)
    latent_acts, latent_indices = unit_stride(latent_acts), unit_stride(latent_indices)
    W_dec, target = unit_stride(W_dec), unit_stride(target)
    squared_error = W_dec.new_empty((batch,), dtype=dtype)
    error = W_dec.new_empty((batch, d_model), dtype=dtype)
    act_grads = W_dec.new_empty((batch, k), dtype=dtype)
    if batch == 0 or d_model == 0:
        return squared_error.zero_(), error, act_grads.zero_()
    decode_mse_kernel[(batch,)](
        latent_acts,
        latent_indices,
        W_dec,
        b_dec.contiguous(),
        target,
        squared_error,
        error,
        act_grads,
        k,
        d_model,
        latent_acts.stride(0),
        latent_indices.stride(0),
        W_dec.stride(0),
        target.stride(0),
        BLOCK_K=4,  # with 8, compilers up to Triton 3.6 spill a few registers
        BLOCK_D=column_block(d_model, 512),
        ACC=tl.float64 if dtype == torch.float64 else tl.float32,
    )
    return squared_error, error, act_grads


def decode_mse_native(
    latent_acts: Tensor, latent_indices: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor
) -> Triple:
    """Compiled CPU loop, for float32."""
    from saesteer.kernels.decode_mse_cpu import decode_mse_rows

    (batch, k), d_model = latent_acts.shape, W_dec.shape[1]
    squared_error = target.new_empty((batch,))
    error = target.new_empty((batch, d_model))
    act_grads = target.new_empty((batch, k))
    operands = (latent_acts, latent_indices.to(torch.int64), W_dec, b_dec, target)
    run_parts(
        decode_mse_rows, even_bounds(batch, parts_of(batch, 8)),
        *(t.contiguous().numpy() for t in operands),
        squared_error.numpy(), error.numpy(), act_grads.numpy(),
    )  # fmt: skip
    return squared_error, error, act_grads


@torch.library.custom_op("saesteer::decode_mse", mutates_args=())
def decode_mse_op(
    latent_acts: Tensor, latent_indices: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error [batch], error [batch, d_model] and slot gradients [batch, k]."""
    check_indices(latent_indices, W_dec.shape[0])
    dense = prefers_dense(W_dec, latent_acts.shape[1])
    if use_triton(W_dec) and not dense:
        run = decode_mse_triton
    elif use_native(latent_acts, W_dec, b_dec, target) and not dense:
        run = decode_mse_native
    else:
        run = decode_mse_torch
    with torch.cuda.device_of(W_dec):  # Triton launches on the current device
        return run(latent_acts, latent_indices, W_dec, b_dec, target)


@decode_mse_op.register_fake
def _(
    latent_acts: Tensor, latent_indices: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor
) -> Triple:
    dtype = accumulator_dtype(latent_acts, W_dec, target)
    (batch, k), d_model = latent_acts.shape, W_dec.shape[1]
    return (
        target.new_empty((batch,), dtype=dtype),
        target.new_empty((batch, d_model), dtype=dtype),
        target.new_empty((batch, k), dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    latent_acts, latent_indices, W_dec, b_dec, target = inputs
    _, error, act_grads = output
    ctx.mark_non_differentiable(act_grads)
    ctx.save_for_backward(latent_acts, latent_indices, W_dec, error, act_grads)
    ctx.dtypes = b_dec.dtype, target.dtype


def _backward(ctx: Any, grad_squared: Tensor, grad_error: Tensor, grad_slots: Any) -> Any:
    latent_acts, latent_indices, W_dec, error, act_grads = ctx.saved_tensors
    bias_dtype, target_dtype = ctx.dtypes
    twice = 2 * grad_squared[:, None]
    upstream = twice * error + grad_error
    grad_acts = grad_W_dec = grad_b_dec = grad_target = None
    if ctx.needs_input_grad[0]:
        grad_acts = twice * act_grads + gather_dot_op(grad_error, W_dec, latent_indices)
        grad_acts = grad_acts.to(latent_acts.dtype)
    if ctx.needs_input_grad[2]:
        grad_W_dec, _, _ = sparse_row_grads_op(
            latent_acts, latent_indices, upstream, W_dec.shape[0], None, None
        )
        grad_W_dec = grad_W_dec.to(W_dec.dtype)
    if ctx.needs_input_grad[3]:
        grad_b_dec = upstream.sum(0).to(bias_dtype)
    if ctx.needs_input_grad[4]:
        grad_target = -upstream.to(target_dtype)
    return grad_acts, None, grad_W_dec, grad_b_dec, grad_target


decode_mse_op.register_autograd(_backward, setup_context=_setup_context)
