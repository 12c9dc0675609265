"""The auxiliary loss of dead latents (AuxK) and its gradients, on the dead latents alone.

``estimate[b] = sum over the k_aux largest positive pre-activations among the given latents``, and
``loss = |estimate - residual|^2 / |residual - mean(residual)|^2`` over the batch, no b_dec (Gao et
al., arXiv 2406.04093, section 2.2 and appendix A.2; the residual's variance as divisor). The
residual is what the SAE left over, held constant.

k_aux is in the hundreds and the dead are few, so dense products over them beat gathering rows. The
gradient is taken in the forward pass, for the rows that were given and no others; it reaches W_enc,
b_enc and W_dec.
"""

from typing import Any

import torch
from torch import Tensor

from saesteer.kernels.dispatch import accumulator_dtype
from saesteer.kernels.native import even_bounds, parts_of, run_parts, use_native
from saesteer.kernels.topk_encode import select_topk_torch

Grads = tuple[Tensor, Tensor, Tensor, Tensor]


def auxk_reference(
    x: Tensor,
    residual: Tensor,
    W_enc_rows: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    ids: Tensor,
    k_aux: int,
) -> Tensor:
    """What the loss means, in dense, differentiable PyTorch. For tests and benchmarks."""
    pre_acts = x @ W_enc_rows[ids].t() + b_enc[ids]
    pre_acts = pre_acts.masked_fill(pre_acts.isnan(), 0)
    ranked = torch.sort(pre_acts, dim=1, descending=True, stable=True).indices
    chosen = ranked[:, : min(k_aux, len(ids))]
    acts = torch.zeros_like(pre_acts).scatter(1, chosen, pre_acts.gather(1, chosen).relu())
    variance = (residual - residual.mean(0)).square().sum().clamp_min(1e-12)
    return (acts @ W_dec[ids] - residual).square().sum() / variance


def keep_largest_(pre_acts: Tensor, k: int) -> Tensor:
    """Set all but the k largest positive entries of each row to 0, in place."""
    rows, width = pre_acts.shape
    if k >= width:
        return pre_acts.masked_fill_(~(pre_acts > 0), 0)  # also NaN, which clamp would keep
    if use_native(pre_acts) and pre_acts.is_contiguous():
        from saesteer.kernels.topk_encode_cpu import keep_largest_rows

        run_parts(keep_largest_rows, even_bounds(rows, parts_of(rows, 16)), pre_acts.numpy(), k)
        return pre_acts
    values, places = select_topk_torch(pre_acts, k)
    return pre_acts.zero_().scatter_(1, places, values)


@torch.library.custom_op("saesteer::auxk", mutates_args=())
def auxk_op(
    x: Tensor,
    residual: Tensor,
    W_enc_rows: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    ids: Tensor,
    is_filler: Tensor | None,
    k_aux: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients by ``W_enc_rows[ids]``, ``b_enc[ids]`` and ``W_dec[ids]``.

    ``ids`` [n] are distinct. Where ``is_filler`` [n] is true they only fill the list: they take no
    part and their gradients are 0 (a list whose true length only the device knows has a fixed
    length so).
    """
    dtype = accumulator_dtype(x, residual, W_enc_rows, W_dec)
    x, residual = x.to(dtype), residual.to(dtype)
    W_enc_ids, W_dec_ids = W_enc_rows[ids].to(dtype), W_dec[ids].to(dtype)
    acts = torch.addmm(b_enc[ids].to(dtype), x, W_enc_ids.t())
    if is_filler is not None:
        acts.masked_fill_(is_filler, 0)
    keep_largest_(acts, k_aux)
    difference = torch.addmm(residual, acts, W_dec_ids, beta=-1)
    variance = (residual - residual.mean(0)).square().sum().clamp_min(1e-12)
    loss = difference.square().sum() / variance
    difference.mul_(2 / variance)
    pre_grads = (difference @ W_dec_ids.t()).mul_(acts > 0)
    return loss, pre_grads.t() @ x, pre_grads.sum(0), acts.t() @ difference


@auxk_op.register_fake
def _(
    x: Tensor,
    residual: Tensor,
    W_enc_rows: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    ids: Tensor,
    is_filler: Tensor | None,
    k_aux: int,
) -> Grads:
    dtype = accumulator_dtype(x, residual, W_enc_rows, W_dec)
    matrix = (ids.shape[0], x.shape[1])
    return (
        x.new_empty((), dtype=dtype),
        x.new_empty(matrix, dtype=dtype),
        x.new_empty((ids.shape[0],), dtype=dtype),
        x.new_empty(matrix, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, W_enc_rows, b_enc, W_dec, ids, _, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(ids, *output[1:])
    ctx.like = [(t.shape, t.dtype) for t in (W_enc_rows, b_enc, W_dec)]


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    """Into the rows ``ids`` of each parameter. x and residual are data: they get none."""
    ids, *compact = ctx.saved_tensors
    grads: list[Tensor | None] = []
    for needed, rows, (shape, dtype) in zip(
        ctx.needs_input_grad[2:5], compact, ctx.like, strict=True
    ):
        if not needed:
            grads.append(None)
            continue
        full = rows.new_zeros(shape)
        full[ids] = rows * grad_loss
        grads.append(full.to(dtype))
    return None, None, *grads, None, None, None


auxk_op.register_autograd(_backward, setup_context=_setup_context)
