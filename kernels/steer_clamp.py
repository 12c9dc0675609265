"""Steering by value: new activations for chosen latents, everything else left as it is.

``h += sum over i of (new_i - old_i) * W_dec[latent_ids[i]]``, where
``old_i = act(<h, W_enc_rows[latent_ids[i]]> + b_enc[latent_ids[i]])``

Only the chosen rows of both matrices are read, and what the autoencoder does not reconstruct stays
in ``h``. Each latent is read by itself, so the activation must be pointwise: ReLU or a threshold.
Which latents a TopK keeps depends on all of them.
"""

from typing import Any, no_type_check

import torch
from torch import Tensor

from saesteer.kernels.dispatch import (
    TRITON_INSTALLED,
    accumulator_dtype,
    check_indices,
    column_block,
    unit_stride,
    use_triton,
)

MODES = ("set", "min", "max", "scale", "add")
"""What becomes of an activation a, given v: v; at least v; at most v; a * v; a + v."""


def steer_clamp_reference(
    h: Tensor,
    W_enc_rows: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    latent_ids: Tensor,
    values: Tensor,
    threshold: Tensor,
    mode: str,
) -> Tensor:
    """What the op means: encode everything, edit, decode the difference. For tests."""
    everywhere = h.new_zeros(W_dec.shape[0]).index_copy(0, latent_ids, threshold.to(h.dtype))
    pre_acts = h @ W_enc_rows.t() + b_enc
    acts = torch.where(pre_acts > everywhere, pre_acts.relu(), 0)
    edited = acts.index_copy(1, latent_ids, _edited(acts[:, latent_ids], values, mode)[0])
    return h + (edited - acts) @ W_dec


def _edited(acts: Tensor, values: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """New activations, and their derivatives with respect to the old ones and to ``values``."""
    one, zero = torch.ones_like(acts), torch.zeros_like(acts)
    if mode == "set":
        return values.expand_as(acts), zero, one
    if mode == "scale":
        return acts * values, values.expand_as(acts), acts
    if mode == "add":
        return acts + values, one, one
    keep = acts >= values if mode == "min" else acts <= values
    return torch.where(keep, acts, values), torch.where(keep, one, zero), (~keep).to(acts.dtype)


def steer_clamp_torch(
    h: Tensor,
    W_enc_rows: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    latent_ids: Tensor,
    values: Tensor,
    threshold: Tensor,
    mode: str,
) -> Tensor:
    """PyTorch twin."""
    acc = accumulator_dtype(h, W_enc_rows, W_dec)
    _, acts = _latents(h.to(acc), W_enc_rows, b_enc, latent_ids, threshold)
    moved = _edited(acts, values.to(acc), mode)[0] - acts
    return torch.addmm(h.to(acc), moved, W_dec[latent_ids].to(acc)).to(h.dtype)


def _latents(
    h: Tensor, W_enc_rows: Tensor, b_enc: Tensor, latent_ids: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """Which chosen latents are active, and their activations, in the dtype of ``h``."""
    bias = b_enc[latent_ids].to(h.dtype)
    pre_acts = torch.addmm(bias, h, W_enc_rows[latent_ids].to(h.dtype).t())
    active = (pre_acts > threshold.to(h.dtype)) & (pre_acts > 0)
    return active, torch.where(active, pre_acts, 0)


if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["n_latents"])
    @no_type_check
    def steer_clamp_kernel(
        h,
        W_enc,
        b_enc,
        W_dec,
        latent_ids,
        values,
        threshold,
        moved,
        out,
        n_latents,
        d_model,
        stride_h,
        stride_W_enc,
        stride_W_dec,
        MODE: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ACC: tl.constexpr,
    ):
        """One example: first how far each chosen latent moves, then the sum of the moves."""
        row = tl.program_id(0).to(tl.int64)
        for first in range(0, n_latents, BLOCK_M):
            slot = first + tl.arange(0, BLOCK_M)
            ok = slot < n_latents
            latent = tl.load(latent_ids + slot, mask=ok, other=0).to(tl.int64)
            dots = tl.zeros([BLOCK_M, BLOCK_D], ACC)
            for start in range(0, d_model, BLOCK_D):
                col = start + tl.arange(0, BLOCK_D)
                col_ok = col < d_model
                vector = tl.load(h + row * stride_h + col, mask=col_ok, other=0.0).to(ACC)
                tile = tl.load(
                    W_enc + latent[:, None] * stride_W_enc + col[None, :],
                    mask=ok[:, None] & col_ok[None, :],
                    other=0.0,
                ).to(ACC)
                dots += tile * vector[None, :]
            pre_act = tl.sum(dots, axis=1) + tl.load(b_enc + latent, mask=ok, other=0.0).to(ACC)
            value = tl.load(values + slot, mask=ok, other=0.0).to(ACC)
            limit = tl.load(threshold + slot, mask=ok, other=0.0).to(ACC)
            act = tl.where((pre_act > limit) & (pre_act > 0), pre_act, 0.0)
            if MODE == "set":
                new = value
            elif MODE == "scale":
                new = act * value
            elif MODE == "add":
                new = act + value
            elif MODE == "min":
                new = tl.where(act >= value, act, value)
            else:
                new = tl.where(act <= value, act, value)
            tl.store(moved + row * n_latents + slot, new - act, mask=ok)
        tl.debug_barrier()  # the threads read one another's moves
        for start in range(0, d_model, BLOCK_D):
            col = start + tl.arange(0, BLOCK_D)
            col_ok = col < d_model
            acc = tl.load(h + row * stride_h + col, mask=col_ok, other=0.0).to(ACC)
            for first in range(0, n_latents, BLOCK_M):
                slot = first + tl.arange(0, BLOCK_M)
                ok = slot < n_latents
                latent = tl.load(latent_ids + slot, mask=ok, other=0).to(tl.int64)
                move = tl.load(moved + row * n_latents + slot, mask=ok, other=0.0)
                tile = tl.load(
                    W_dec + latent[:, None] * stride_W_dec + col[None, :],
                    mask=ok[:, None] & col_ok[None, :],
                    other=0.0,
                ).to(ACC)
                acc += tl.sum(move[:, None] * tile, axis=0)
            tl.store(out + row * d_model + col, acc, mask=col_ok)


def steer_clamp_triton(
    h: Tensor,
    W_enc_rows: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    latent_ids: Tensor,
    values: Tensor,
    threshold: Tensor,
    mode: str,
) -> Tensor:
    """Triton kernel."""
    (rows, d_model), n_latents = h.shape, latent_ids.shape[0]
    dtype = accumulator_dtype(h, W_enc_rows, W_dec)
    h, W_enc, W_dec = unit_stride(h), unit_stride(W_enc_rows), unit_stride(W_dec)
    out = h.new_empty((rows, d_model))
    moved = h.new_empty((rows, n_latents), dtype=dtype)
    steer_clamp_kernel[(rows,)](
        h,
        W_enc,
        b_enc.contiguous(),
        W_dec,
        latent_ids.contiguous(),
        values.contiguous(),
        threshold.contiguous(),
        moved,
        out,
        n_latents,
        d_model,
        h.stride(0),
        W_enc.stride(0),
        W_dec.stride(0),
        MODE=mode,
        BLOCK_M=8,
        BLOCK_D=column_block(d_model, 256),
        ACC=tl.float64 if dtype == torch.float64 else tl.float32,
    )
    return out


@torch.library.custom_op("saesteer::steer_clamp", mutates_args=())
def steer_clamp_op(
    h: Tensor,
    W_enc_rows: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    latent_ids: Tensor,
    values: Tensor,
    threshold: Tensor,
    mode: str,
) -> Tensor:
    """A new ``h`` [rows, d_model], contiguous. ``threshold`` and ``values``: one per chosen latent.

    A latent is active where its pre-activation is above its threshold and above 0.
    """
    check_indices(latent_ids, W_dec.shape[0])
    if h.numel() == 0 or latent_ids.numel() == 0:
        return h.new_empty(h.shape).copy_(h)
    run = steer_clamp_triton if use_triton(h) else steer_clamp_torch
    with torch.cuda.device_of(h):  # Triton launches on the current device
        return run(h, W_enc_rows, b_enc, W_dec, latent_ids, values, threshold, mode)


@steer_clamp_op.register_fake
def _(
    h: Tensor,
    W_enc_rows: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    latent_ids: Tensor,
    values: Tensor,
    threshold: Tensor,
    mode: str,
) -> Tensor:
    return h.new_empty(h.shape)


def _setup_clamp(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, mode = inputs
    ctx.save_for_backward(*tensors)
    ctx.mode = mode


def _backward_clamp(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    """From products of [rows, m] and [m, d_model]. A threshold has no gradient."""
    h, W_enc_rows, b_enc, W_dec, latent_ids, values, threshold = ctx.saved_tensors
    acc = accumulator_dtype(h, W_enc_rows, W_dec)
    wide, grad = h.to(acc), grad_out.to(acc)
    active, acts = _latents(wide, W_enc_rows, b_enc, latent_ids, threshold)
    new, by_old, by_value = _edited(acts, values.to(acc), ctx.mode)
    grad_moved = grad @ W_dec[latent_ids].to(acc).t()
    grad_pre = torch.where(active, grad_moved * (by_old - 1), 0)
    grads: list[Tensor | None] = [None] * 8
    if ctx.needs_input_grad[0]:
        grads[0] = torch.addmm(grad, grad_pre, W_enc_rows[latent_ids].to(acc)).to(h.dtype)
    for place, matrix, rows in (
        (1, W_enc_rows, lambda: grad_pre.t() @ wide),
        (2, b_enc, lambda: grad_pre.sum(0)),
        (3, W_dec, lambda: (new - acts).t() @ grad),
    ):
        if ctx.needs_input_grad[place]:
            zeros = torch.zeros_like(matrix, dtype=acc)
            grads[place] = zeros.index_add(0, latent_ids, rows()).to(matrix.dtype)
    if ctx.needs_input_grad[5]:
        grads[5] = (grad_moved * by_value).sum(0).to(values.dtype)
    return tuple(grads)


steer_clamp_op.register_autograd(_backward_clamp, setup_context=_setup_clamp)
