"""Straight-through gradients of JumpReLU's thresholds, from the pairs that are active or nearly so.

A latent is active where its pre-activation h is above its threshold t. That step has no derivative;
Rajamanoharan et al. (arXiv 2407.14435) take that of a step as wide as a window of ``bandwidth``
around t. With z the derivative of the loss by the latent's activation, c that of a penalty by one
more active pair, and K = 1 where ``|h - t| < bandwidth / 2``, else 0:

``pull[i] = K (t z[i] + c[i]) / bandwidth``
``threshold_grads[f] = - sum over the entries i of latent f of pull[i]``
``pre_act_grads[i] = z[i] where h > t, else 0``, plus ``pull[i]`` where the window moves the
pre-activations as well (Anthropic, January 2025).

All other pairs have derivatives of 0, so the entries above ``t - bandwidth / 2`` are enough.
Each latent's sum is taken by one program or thread in a fixed order: it repeats bit for bit.
"""

from typing import no_type_check

import torch
from torch import Tensor

from saesteer.kernels.dispatch import TRITON_INSTALLED, accumulator_dtype, use_triton
from saesteer.kernels.entries import batch_of, check_entries
from saesteer.kernels.native import even_bounds, parts_of, run_parts, use_native
from saesteer.kernels.sparse_row_grads import LatentOrder, grouped_by, sparse_row_grads_torch

BLOCK = 64
"""Entries of a latent that a Triton program looks at together."""


def threshold_grads_reference(
    pre_acts: Tensor, thresholds: Tensor, grads: Tensor, price: Tensor, bandwidth: float,
    to_input: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op's definition on dense [batch, d_sae] in PyTorch, for tests and benchmarks."""
    distance = pre_acts - thresholds
    pull = torch.where(distance.abs() < bandwidth / 2, thresholds * grads + price, 0) / bandwidth
    through = torch.where(distance > 0, grads, 0)
    return through + pull if to_input else through, -pull.sum(0)


def threshold_grads_torch(
    pre_acts: Tensor, indices: Tensor, thresholds: Tensor, act_grads: Tensor, price: Tensor,
    order: LatentOrder, batch: int, bandwidth: float, to_input: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """PyTorch twin; ``batch`` is the number of examples."""
    dtype = accumulator_dtype(pre_acts, act_grads)
    grads, own = act_grads.to(dtype), thresholds.to(dtype)[indices]
    distance = pre_acts.to(dtype) - own
    pull = torch.where(distance.abs() < bandwidth / 2, (own * grads + price) / bandwidth, 0)
    through = torch.where(distance > 0, grads, 0)
    _, sums = sparse_row_grads_torch(pull, pull.new_ones((batch, 1)), order)
    return through + pull if to_input else through, -sums


if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit
    @no_type_check
    def threshold_grads_kernel(
        pre_acts,
        thresholds,
        act_grads,
        price,
        order,
        starts,
        pre_act_grads,
        threshold_grads,
        bandwidth,
        ONE_PRICE: tl.constexpr,
        TO_INPUT: tl.constexpr,
        BLOCK: tl.constexpr,
        ACC: tl.constexpr,
    ):
        """All entries of one latent."""
        latent = tl.program_id(0).to(tl.int64)
        own = tl.load(thresholds + latent).to(ACC)
        begin = tl.load(starts + latent)
        end = tl.load(starts + latent + 1)
        total = tl.zeros([BLOCK], ACC)
        for first in range(begin, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            ok = at < end
            entry = tl.load(order + at, mask=ok, other=0)
            distance = tl.load(pre_acts + entry, mask=ok, other=0.0).to(ACC) - own
            grad = tl.load(act_grads + entry, mask=ok, other=0.0).to(ACC)
            if ONE_PRICE:
                cost = tl.load(price).to(ACC)
            else:
                cost = tl.load(price + entry, mask=ok, other=0.0).to(ACC)
            near = ok & (tl.abs(distance) < bandwidth / 2)
            pull = tl.where(near, (own * grad + cost) / bandwidth, 0.0)
            total += pull
            through = tl.where(distance > 0, grad, 0.0)
            if TO_INPUT:
                through += pull
            tl.store(pre_act_grads + entry, through, mask=ok)
        tl.store(threshold_grads + latent, -tl.sum(total, axis=0))


def threshold_grads_triton(
    pre_acts: Tensor, thresholds: Tensor, act_grads: Tensor, price: Tensor, order: LatentOrder,
    bandwidth: float, to_input: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Triton kernel."""
    dtype = accumulator_dtype(pre_acts, act_grads)
    pre_act_grads = act_grads.new_empty(act_grads.shape, dtype=dtype)
    sums = act_grads.new_empty((len(thresholds),), dtype=dtype)
    threshold_grads_kernel[(len(thresholds),)](
        pre_acts.contiguous(), thresholds.contiguous(), act_grads.contiguous(),
        price.contiguous(), order.order, order.starts, pre_act_grads, sums, bandwidth,
        ONE_PRICE=price.dim() == 0, TO_INPUT=to_input, BLOCK=BLOCK,
        ACC=tl.float64 if dtype == torch.float64 else tl.float32, num_warps=2,
    )  # fmt: skip
    return pre_act_grads, sums


def threshold_grads_native(
    pre_acts: Tensor, thresholds: Tensor, act_grads: Tensor, price: Tensor, order: LatentOrder,
    bandwidth: float, to_input: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compiled CPU loop, for float32."""
    import numpy as np

    from saesteer.kernels.threshold_grads_cpu import threshold_grads_latents

    pre_act_grads = act_grads.new_empty(act_grads.shape)
    sums = act_grads.new_empty((len(thresholds),))
    flat = (t.reshape(-1).contiguous().numpy() for t in (act_grads, price))
    run_parts(
        threshold_grads_latents,
        even_bounds(len(thresholds), parts_of(len(thresholds), 256)),
        pre_acts.reshape(-1).contiguous().numpy(), thresholds.contiguous().numpy(), *flat,
        order.order.numpy(), order.starts.numpy(), np.float32(bandwidth), to_input,
        pre_act_grads.view(-1).numpy(), sums.numpy(),
    )  # fmt: skip
    return pre_act_grads, sums


@torch.library.custom_op("saesteer::threshold_grads", mutates_args=())
def threshold_grads_op(
    pre_acts: Tensor,
    indices: Tensor,
    thresholds: Tensor,
    act_grads: Tensor,
    price: Tensor,
    bandwidth: float,
    to_input: bool,
    row_starts: Tensor | None = None,
    order: Tensor | None = None,
    starts: Tensor | None = None,
    examples: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the pre-activations, one for each index, and of the thresholds [d_sae]."""
    d_sae = len(thresholds)
    check_entries(indices, d_sae, row_starts)
    with torch.cuda.device_of(pre_acts):  # Triton launches on the current device
        by_latent = grouped_by(indices, d_sae, row_starts, order, starts, examples)
        if use_triton(pre_acts):
            return threshold_grads_triton(
                pre_acts, thresholds, act_grads, price, by_latent, bandwidth, to_input
            )
        if use_native(pre_acts, thresholds, act_grads, price):
            return threshold_grads_native(
                pre_acts, thresholds, act_grads, price, by_latent, bandwidth, to_input
            )
        batch = int(batch_of(indices, row_starts))
        return threshold_grads_torch(
            pre_acts, indices, thresholds, act_grads, price, by_latent, batch, bandwidth, to_input
        )


@threshold_grads_op.register_fake
def _(
    pre_acts: Tensor,
    indices: Tensor,
    thresholds: Tensor,
    act_grads: Tensor,
    price: Tensor,
    bandwidth: float,
    to_input: bool,
    row_starts: Tensor | None = None,
    order: Tensor | None = None,
    starts: Tensor | None = None,
    examples: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = accumulator_dtype(pre_acts, act_grads)
    grads = act_grads.new_empty(act_grads.shape, dtype=dtype)
    return grads, act_grads.new_empty((len(thresholds),), dtype=dtype)
