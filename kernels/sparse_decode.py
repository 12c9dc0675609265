"""Decode from the few active latents: a weighted sum of k decoder rows per example.

``out[b] = b_dec + sum over i of latent_acts[b, i] * W_dec[latent_indices[b, i]]``

Costs 2 * batch * k * d_model operations where the dense product costs 2 * batch * d_sae * d_model.
"""

from typing import Any, no_type_check

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
from saesteer.kernels.gather_dot import gather_dot_op
from saesteer.kernels.sparse_row_grads import sparse_row_grads_op


def sparse_decode_reference(
    latent_acts: Tensor, latent_indices: Tensor, W_dec: Tensor, b_dec: Tensor
) -> Tensor:
    """What the op means, in dense, differentiable PyTorch. For tests and benchmarks."""
    dense = latent_acts.new_zeros((latent_acts.shape[0], W_dec.shape[0]))
    return dense.scatter_add(1, latent_indices, latent_acts) @ W_dec + b_dec


def _result_dtype(latent_acts: Tensor, W_dec: Tensor) -> torch.dtype:
    return torch.promote_types(latent_acts.dtype, W_dec.dtype)


def sparse_decode_torch(
    latent_acts: Tensor, latent_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    """PyTorch twin."""
    acc = accumulator_dtype(latent_acts, W_dec)
    out = F.embedding_bag(
        latent_indices.contiguous(),
        W_dec.to(acc).contiguous(),
        mode="sum",
        per_sample_weights=latent_acts.to(acc).contiguous(),
    )
    if b_dec is not None:
        out += b_dec
    return out.to(_result_dtype(latent_acts, W_dec))


if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["k"])
    @no_type_check
    def sparse_decode_kernel(
        latent_acts,
        latent_indices,
        W_dec,
        b_dec,
        out,
        k,
        d_model,
        stride_acts,
        stride_indices,
        stride_W_dec,
        HAS_BIAS: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ACC: tl.constexpr,
    ):
        """BLOCK_D columns of one example. BLOCK_K row loads are in flight at a time."""
        example = tl.program_id(0).to(tl.int64)
        col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        col_ok = col < d_model
        acc = tl.zeros([BLOCK_D], ACC)
        for first in range(0, k, BLOCK_K):
            slot = first + tl.arange(0, BLOCK_K)
            ok = slot < k
            act = tl.load(latent_acts + example * stride_acts + slot, mask=ok, other=0.0).to(ACC)
            row = tl.load(latent_indices + example * stride_indices + slot, mask=ok, other=0)
            tile = tl.load(
                W_dec + row.to(tl.int64)[:, None] * stride_W_dec + col[None, :],
                mask=ok[:, None] & col_ok[None, :],
                other=0.0,
            ).to(ACC)
            acc += tl.sum(act[:, None] * tile, axis=0)
        if HAS_BIAS:
            acc += tl.load(b_dec + col, mask=col_ok, other=0.0).to(ACC)
        tl.store(out + example * d_model + col, acc, mask=col_ok)


def sparse_decode_triton(
    latent_acts: Tensor, latent_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    """Triton kernel."""
    (batch, k), d_model = latent_acts.shape, W_dec.shape[1]
    dtype = accumulator_dtype(latent_acts, W_dec)
    latent_acts, latent_indices = unit_stride(latent_acts), unit_stride(latent_indices)
    W_dec = unit_stride(W_dec)
    out = W_dec.new_empty((batch, d_model), dtype=_result_dtype(latent_acts, W_dec))
    if out.numel() == 0:
        return out
    block_d = column_block(d_model, 512)
    sparse_decode_kernel[(batch, triton.cdiv(d_model, block_d))](
        latent_acts,
        latent_indices,
        W_dec,
        W_dec if b_dec is None else b_dec.contiguous(),
        out,
        k,
        d_model,
        latent_acts.stride(0),
        latent_indices.stride(0),
        W_dec.stride(0),
        HAS_BIAS=b_dec is not None,
        BLOCK_K=8,
        BLOCK_D=block_d,
        ACC=tl.float64 if dtype == torch.float64 else tl.float32,
    )
    return out


@torch.library.custom_op("saesteer::sparse_decode", mutates_args=())
def sparse_decode_op(
    latent_acts: Tensor, latent_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    """Decoded [batch, d_model], in the promoted dtype of ``latent_acts`` and ``W_dec``."""
    check_indices(latent_indices, W_dec.shape[0])
    run = sparse_decode_triton if use_triton(W_dec) else sparse_decode_torch
    with torch.cuda.device_of(W_dec):  # Triton launches on the current device
        return run(latent_acts, latent_indices, W_dec, b_dec)


@sparse_decode_op.register_fake
def _(latent_acts: Tensor, latent_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    shape = (latent_acts.shape[0], W_dec.shape[1])
    return W_dec.new_empty(shape, dtype=_result_dtype(latent_acts, W_dec))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    latent_acts, latent_indices, W_dec, b_dec = inputs
    ctx.save_for_backward(latent_acts, latent_indices, W_dec)
    ctx.bias_dtype = None if b_dec is None else b_dec.dtype


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    latent_acts, latent_indices, W_dec = ctx.saved_tensors
    grad_acts = grad_W_dec = grad_b_dec = None
    if ctx.needs_input_grad[0]:
        grad_acts = gather_dot_op(grad_out, W_dec, latent_indices).to(latent_acts.dtype)
    if ctx.needs_input_grad[2]:
        grad_W_dec, _, _ = sparse_row_grads_op(
            latent_acts, latent_indices, grad_out, W_dec.shape[0], None, None
        )
        grad_W_dec = grad_W_dec.to(W_dec.dtype)
    if ctx.needs_input_grad[3]:
        grad_b_dec = grad_out.sum(0, dtype=accumulator_dtype(grad_out)).to(ctx.bias_dtype)
    return grad_acts, None, grad_W_dec, grad_b_dec


sparse_decode_op.register_autograd(_backward, setup_context=_setup_context)
