"""The auxiliary loss of dead latents (AuxK) and its gradients, on the dead latents alone.

``estimate[b] = sum over the k_aux largest positive pre-activations among the given latents``, and
``loss = |estimate - residual|^2 / |residual - mean(residual)|^2`` over the batch, no b_dec (Gao et
al., arXiv 2406.04093, section 2.2 and appendix A.2; the residual's variance as divisor). The
residual is what the SAE does not reconstruct; it is held constant.

k_aux is in the hundreds and the dead are few, so dense products over them beat gathering rows. The
gradient is taken in the forward pass, for the rows that were given and no others; it reaches W_enc,
b_enc and W_dec. bfloat16 operands on CUDA are multiplied in bfloat16, for which activations and
errors are rounded; sums, residual and loss are float32.
"""

from typing import Any, no_type_check

import torch
from torch import Tensor

from saesteer.kernels.dispatch import TRITON_INSTALLED, accumulator_dtype, use_triton
from saesteer.kernels.native import even_bounds, parts_of, run_parts, use_native
from saesteer.kernels.topk_encode import select_topk_torch

Grads = tuple[Tensor, Tensor, Tensor, Tensor]

WIDEST = 16384
"""Longest row that one Triton program searches without spilling registers."""


def auxk_reference(
    x: Tensor,
    residual: Tensor,
    W_enc_rows: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    ids: Tensor,
    k_aux: int,
) -> Tensor:
    """The loss's definition in dense, differentiable PyTorch, for tests and benchmarks."""
    pre_acts = x @ W_enc_rows[ids].t() + b_enc[ids]
    pre_acts = pre_acts.masked_fill(pre_acts.isnan(), 0)
    ranked = torch.sort(pre_acts, dim=1, descending=True, stable=True).indices
    chosen = ranked[:, : min(k_aux, len(ids))]
    acts = torch.zeros_like(pre_acts).scatter(1, chosen, pre_acts.gather(1, chosen).relu())
    variance = (residual - residual.mean(0)).square().sum().clamp_min(1e-12)
    return (acts @ W_dec[ids] - residual).square().sum() / variance


if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    from saesteer.kernels.topk_encode import _first_k, _ranked

    @triton.jit(do_not_specialize=["k"])
    @no_type_check
    def keep_largest_kernel(
        pre_acts,
        k,
        width,
        BLOCK: tl.constexpr,
        KEY: tl.constexpr,
        MAX: tl.constexpr,
        BITS: tl.constexpr,
    ):
        """Set all but the k largest positive entries of one row to 0, in place."""
        col = tl.arange(0, BLOCK)
        ok = col < width
        at = pre_acts + tl.program_id(0).to(tl.int64) * width + col
        values, keys = _ranked(tl.load(at, mask=ok, other=0.0), KEY, MAX)
        chosen, _ = _first_k(tl.where(ok, keys, -MAX - 1), k, KEY, MAX, BITS)
        tl.store(at, tl.where(chosen & (values > 0), values, 0.0), mask=ok)


def _keep_largest_triton(pre_acts: Tensor, k: int) -> None:
    rows, width = pre_acts.shape
    block = triton.next_power_of_2(width)
    bits = 8 * pre_acts.element_size()
    if rows:
        keep_largest_kernel[(rows,)](
            pre_acts,
            k,
            width,
            BLOCK=block,
            KEY=tl.int64 if bits == 64 else tl.int32,
            MAX=2 ** (bits - 1) - 1,
            BITS=bits,
            num_warps=max(4, block // 1024),
        )


def keep_largest_(pre_acts: Tensor, k: int) -> Tensor:
    """Set all but the k largest positive entries of each row to 0, in place."""
    rows, width = pre_acts.shape
    if k >= width:
        return pre_acts.masked_fill_(~(pre_acts > 0), 0)  # also NaN, which clamp would keep
    if use_native(pre_acts) and pre_acts.is_contiguous():
        from saesteer.kernels.topk_encode_cpu import keep_largest_rows

        run_parts(keep_largest_rows, even_bounds(rows, parts_of(rows, 16)), pre_acts.numpy(), k)
        return pre_acts
    if use_triton(pre_acts) and width <= WIDEST and pre_acts.is_contiguous():
        _keep_largest_triton(pre_acts, k)
        return pre_acts
    values, places = select_topk_torch(pre_acts, k)
    return pre_acts.zero_().scatter_(1, places, values)


def _product_dtype(dtype: torch.dtype, *operands: Tensor) -> torch.dtype:
    """Dtype of the factors: that of the sums, or bfloat16 where all operands on a GPU have it."""
    narrow = all(t.is_cuda and t.dtype == torch.bfloat16 for t in operands)
    return torch.bfloat16 if narrow and dtype == torch.float32 else dtype


def _product(
    a: Tensor, b: Tensor, dtype: torch.dtype, plus: Tensor | None = None, sign: int = 1
) -> Tensor:
    """``a @ b + sign * plus``, accumulated and returned in ``dtype``."""
    if a.dtype == dtype:
        return a @ b if plus is None else torch.addmm(plus, a, b, beta=sign)
    out = torch.mm(a, b, out_dtype=dtype)
    return out if plus is None else out.add_(plus, alpha=sign)


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

    ``ids`` [n] are distinct. Where ``is_filler`` [n] is true they only pad the list: they take no
    part and their gradients are 0. On a GPU the list has a fixed length, because the host would
    have to wait for the true number of dead latents.
    """
    dtype = accumulator_dtype(x, residual, W_enc_rows, W_dec)
    factor_dtype = _product_dtype(dtype, x, W_enc_rows, W_dec)
    x, residual = x.to(factor_dtype), residual.to(dtype)
    W_enc_ids, W_dec_ids = W_enc_rows[ids].to(factor_dtype), W_dec[ids].to(factor_dtype)
    acts = _product(x, W_enc_ids.t(), dtype, plus=b_enc[ids].to(dtype))
    if is_filler is not None:
        acts.masked_fill_(is_filler, 0)
    acts = keep_largest_(acts, k_aux).to(factor_dtype)
    difference = _product(acts, W_dec_ids, dtype, plus=residual, sign=-1)
    variance = (residual - residual.mean(0)).square().sum().clamp_min(1e-12)
    loss = difference.square().sum() / variance
    difference = difference.mul_(2 / variance).to(factor_dtype)
    pre_grads = _product(difference, W_dec_ids.t(), dtype).mul_(acts > 0)
    W_enc_grads = _product(pre_grads.to(factor_dtype).t(), x, dtype)
    return loss, W_enc_grads, pre_grads.sum(0), _product(acts.t(), difference, dtype)


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
    """Put the gradients into the rows ``ids`` of each parameter. x and residual get none."""
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
