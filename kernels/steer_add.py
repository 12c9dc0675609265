"""Steering by addition: scaled decoder rows added at chosen positions, ragged batches at once.

``h[positions] += sum over j of alphas[set, j] * W_dec[latent_ids[set, j]]``
"""

from typing import Any, no_type_check

import torch
from torch import Tensor

from saesteer.kernels.dispatch import (
    TRITON_INSTALLED,
    accumulator_dtype,
    column_block,
    unit_stride,
    use_triton,
)
from saesteer.kernels.gather_dot import gather_dot_op
from saesteer.kernels.sparse_decode import sparse_decode_torch
from saesteer.kernels.sparse_row_grads import sparse_row_grads_op


def steer_add_reference(
    h: Tensor,
    positions: Tensor,
    set_ids: Tensor,
    latent_ids: Tensor,
    alphas: Tensor,
    W_dec: Tensor,
) -> Tensor:
    """What the op means, in dense, differentiable PyTorch. For tests and benchmarks."""
    present = (latent_ids >= 0)[:, :, None]
    rows = torch.where(present, W_dec[latent_ids.clamp(min=0)], 0)
    vectors = (alphas[:, :, None] * rows).sum(1)
    return h.index_add(0, positions, vectors[set_ids])


def steer_add_torch_(
    h: Tensor,
    positions: Tensor,
    set_ids: Tensor,
    latent_ids: Tensor,
    alphas: Tensor,
    W_dec: Tensor,
) -> None:
    """PyTorch twin, in place."""
    acc = accumulator_dtype(h, alphas, W_dec)
    weights = torch.where(latent_ids >= 0, alphas, 0).to(acc)
    vectors = sparse_decode_torch(weights, latent_ids.clamp(min=0), W_dec, None)
    h[positions] = (h[positions].to(acc) + vectors[set_ids]).to(h.dtype)


if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["n_slots"])
    @no_type_check
    def steer_add_kernel(
        h,
        positions,
        set_ids,
        set_latents,
        alphas,
        W_dec,
        n_slots,
        d_model,
        stride_h,
        stride_latents,
        stride_alphas,
        stride_W_dec,
        BLOCK_K: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ACC: tl.constexpr,
    ):
        """BLOCK_D columns of one position, in place."""
        row = tl.load(positions + tl.program_id(0)).to(tl.int64)
        chosen = tl.load(set_ids + tl.program_id(0)).to(tl.int64)
        col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        col_ok = col < d_model
        acc = tl.load(h + row * stride_h + col, mask=col_ok, other=0.0).to(ACC)
        for first in range(0, n_slots, BLOCK_K):
            slot = first + tl.arange(0, BLOCK_K)
            ok = slot < n_slots
            latent = tl.load(set_latents + chosen * stride_latents + slot, mask=ok, other=-1)
            latent = latent.to(tl.int64)
            ok = ok & (latent >= 0)
            alpha = tl.load(alphas + chosen * stride_alphas + slot, mask=ok, other=0.0).to(ACC)
            tile = tl.load(
                W_dec + latent[:, None] * stride_W_dec + col[None, :],
                mask=ok[:, None] & col_ok[None, :],
                other=0.0,
            ).to(ACC)
            acc += tl.sum(alpha[:, None] * tile, axis=0)
        tl.store(h + row * stride_h + col, acc, mask=col_ok)


def steer_add_triton_(
    h: Tensor,
    positions: Tensor,
    set_ids: Tensor,
    latent_ids: Tensor,
    alphas: Tensor,
    W_dec: Tensor,
) -> None:
    """Triton kernel, in place; the last axis of ``h`` is dense."""
    d_model = h.shape[1]
    latent_ids, alphas, W_dec = unit_stride(latent_ids), unit_stride(alphas), unit_stride(W_dec)
    double = accumulator_dtype(h, alphas, W_dec) == torch.float64
    block_d = column_block(d_model, 256)
    steer_add_kernel[(positions.shape[0], triton.cdiv(d_model, block_d))](
        h,
        positions.contiguous(),
        set_ids.contiguous(),
        latent_ids,
        alphas,
        W_dec,
        latent_ids.shape[1],
        d_model,
        h.stride(0),
        latent_ids.stride(0),
        alphas.stride(0),
        W_dec.stride(0),
        BLOCK_K=8,
        BLOCK_D=block_d,
        ACC=tl.float64 if double else tl.float32,
    )


def _check_add(h: Tensor, positions: Tensor, set_ids: Tensor, latent_ids: Tensor, F: int) -> None:
    """Refuse indices out of range and repeated positions on the CPU, where looking is cheap."""
    if h.device.type != "cpu" or positions.numel() == 0:
        return
    for name, indices, lowest, size in (
        ("positions", positions, 0, h.shape[0]),
        ("set_ids", set_ids, 0, latent_ids.shape[0]),
        ("latent_ids", latent_ids, -1, F),
    ):
        if indices.numel() == 0:
            continue
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if low < lowest or high >= size:
            wrong = low if low < lowest else high
            raise IndexError(f"{name} must be in {lowest}..{size - 1}, got {wrong}")
    if positions.unique().numel() != positions.numel():
        raise ValueError("positions must not repeat: give each position one set")


def _steer_add_into(
    h: Tensor,
    positions: Tensor,
    set_ids: Tensor,
    latent_ids: Tensor,
    alphas: Tensor,
    W_dec: Tensor,
) -> None:
    _check_add(h, positions, set_ids, latent_ids, W_dec.shape[0])
    if positions.numel() == 0 or latent_ids.numel() == 0 or h.shape[1] == 0:
        return
    run = steer_add_triton_ if use_triton(h) and h.stride(1) == 1 else steer_add_torch_
    with torch.cuda.device_of(h):  # Triton launches on the current device
        run(h, positions, set_ids, latent_ids, alphas, W_dec)


@torch.library.custom_op("saesteer::steer_add_", mutates_args=("h",))
def steer_add_inplace_op(
    h: Tensor,
    positions: Tensor,
    set_ids: Tensor,
    latent_ids: Tensor,
    alphas: Tensor,
    W_dec: Tensor,
) -> None:
    """Add to ``h`` in place."""
    _steer_add_into(h, positions, set_ids, latent_ids, alphas, W_dec)


@steer_add_inplace_op.register_fake
def _(
    h: Tensor,
    positions: Tensor,
    set_ids: Tensor,
    latent_ids: Tensor,
    alphas: Tensor,
    W_dec: Tensor,
) -> None:
    return None


@torch.library.custom_op("saesteer::steer_add", mutates_args=())
def steer_add_op(
    h: Tensor,
    positions: Tensor,
    set_ids: Tensor,
    latent_ids: Tensor,
    alphas: Tensor,
    W_dec: Tensor,
) -> Tensor:
    """A new ``h``, contiguous, with the chosen positions moved."""
    out = h.new_empty(h.shape)
    out.copy_(h)
    _steer_add_into(out, positions, set_ids, latent_ids, alphas, W_dec)
    return out


@steer_add_op.register_fake
def _(
    h: Tensor,
    positions: Tensor,
    set_ids: Tensor,
    latent_ids: Tensor,
    alphas: Tensor,
    W_dec: Tensor,
) -> Tensor:
    return h.new_empty(h.shape)


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    h, *rest = inputs
    ctx.save_for_backward(*rest)
    ctx.h_dtype = h.dtype


def _backward_add(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    positions, set_ids, latent_ids, alphas, W_dec = ctx.saved_tensors
    grad_alphas = grad_W_dec = None
    if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
        present, ids = latent_ids >= 0, latent_ids.clamp(min=0)
        # What reaches each set, from all its positions; the sums are made in a fixed order.
        ones = grad_out.new_ones((positions.shape[0], 1))
        reached, _, _ = sparse_row_grads_op(
            ones, set_ids[:, None], grad_out[positions], alphas.shape[0], None, None
        )
        if ctx.needs_input_grad[4]:
            grad_alphas = torch.where(present, gather_dot_op(reached, W_dec, ids), 0)
            grad_alphas = grad_alphas.to(alphas.dtype)
        if ctx.needs_input_grad[5]:
            weights = torch.where(present, alphas, 0)
            grad_W_dec, _, _ = sparse_row_grads_op(
                weights, ids, reached, W_dec.shape[0], None, None
            )
            grad_W_dec = grad_W_dec.to(W_dec.dtype)
    return grad_out.to(ctx.h_dtype), None, None, None, grad_alphas, grad_W_dec


steer_add_op.register_autograd(_backward_add, setup_context=_setup_add)
