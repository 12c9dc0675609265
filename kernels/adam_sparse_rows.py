"""Adam on a weight matrix straight from the entries its gradient is made of.

``grad[f] = factor * sum over (b, i) with indices[b, i] == f of weights[b, i] * rows[b]``, plus the
rows of ``extra`` for the few latents that have one; then `adam_rows`. On the CPU the gradient never
becomes a matrix: each row of it lives in the cache from its first term to the step it causes.
Where the gradient has to be known as a whole (clipping, accumulation, several devices), sum it with
`sparse_pair_grads` and step with `adam_rows`. Entries may be ragged (`saesteer.kernels.entries`),
and ``pieces`` examples in a row may share a row.
"""

import torch
from torch import Tensor

from saesteer.kernels.adam_rows import adam_rows_op
from saesteer.kernels.native import parts_of, run_parts, use_native
from saesteer.kernels.sparse_row_grads import LatentOrder, sum_rows

# Updating a latent's row of the parameter and its moments takes about as long as this many entries.
_ROW_COST = 4


def _balanced(starts: Tensor, parts: int) -> list[int]:
    """``parts + 1`` bounds that cut the latents into ranges of about equal work."""
    d_sae = len(starts) - 1
    cost = starts + _ROW_COST * torch.arange(d_sae + 1)
    goals = torch.linspace(0, float(cost[-1]), parts + 1)
    bounds = torch.searchsorted(cost.to(goals.dtype), goals).tolist()
    return [0, *(min(int(bound), d_sae) for bound in bounds[1:-1]), d_sae]


def adam_sparse_rows_torch(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Tensor,
    rows: Tensor,
    order: LatentOrder,
    pieces: int,
    factor: float,
    schedule: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    unit_rows: bool,
    extra: Tensor | None,
    extra_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """PyTorch twin: the sum, then the step."""
    grads, sums, counts = sum_rows(weights, rows, order, pieces)
    grads.mul_(factor)
    if extra is not None and extra_ids is not None:
        grads[extra_ids] += extra.to(grads.dtype)
    adam_rows_op(
        param, grads, exp_avg, exp_avg_sq, None, schedule, None, beta1, beta2, eps, unit_rows
    )
    return sums * factor, counts


def adam_sparse_rows_native(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Tensor,
    rows: Tensor,
    order: LatentOrder,
    pieces: int,
    factor: float,
    schedule: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    unit_rows: bool,
    extra: Tensor | None,
    extra_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compiled CPU loop, for contiguous float32."""
    import numpy as np

    from saesteer.kernels.adam_sparse_rows_cpu import adam_sparse_rows

    d_sae, k = len(param), weights.shape[-1]
    ragged = order.examples is not None
    examples = order.order if order.examples is None else order.examples
    sums = param.new_empty((d_sae,))
    counts = param.new_empty((d_sae,), dtype=torch.int64)
    extra_at = torch.full((d_sae,), -1, dtype=torch.int64)
    if extra is None or extra_ids is None:
        extra = param.new_empty((0, param.shape[1]))
    else:
        extra_at[extra_ids] = torch.arange(len(extra_ids))
    rate, root, _ = schedule.tolist()
    float32 = np.float32
    run_parts(
        adam_sparse_rows,
        _balanced(order.starts, parts_of(weights.numel() + d_sae, 256)),
        param.detach().numpy(),
        exp_avg.numpy(),
        exp_avg_sq.numpy(),
        weights.contiguous().view(-1).numpy(),
        rows.contiguous().numpy(),
        order.order.numpy(),
        order.starts.numpy(),
        ragged,
        examples.numpy(),
        k,
        pieces,
        float32(factor),
        float32(rate),
        float32(1 - beta1),
        float32(beta2),
        float32(1 - beta2),
        float32(root),
        float32(eps),
        unit_rows,
        extra.contiguous().numpy(),
        extra_at.numpy(),
        sums.numpy(),
        counts.numpy(),
    )
    return sums, counts


@torch.library.custom_op(
    "saesteer::adam_sparse_rows_", mutates_args=("param", "exp_avg", "exp_avg_sq")
)
def adam_sparse_rows_op(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Tensor,
    rows: Tensor,
    order: Tensor,
    starts: Tensor,
    examples: Tensor | None,
    pieces: int,
    factor: float,
    schedule: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    unit_rows: bool,
    extra: Tensor | None,
    extra_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Step ``param`` and its moments; returns factor * sums of weights, and nonzero counts."""
    state = (param, exp_avg, exp_avg_sq)
    native = use_native(*state, weights, rows) and all(t.is_contiguous() for t in state)
    run = adam_sparse_rows_native if native else adam_sparse_rows_torch
    with torch.cuda.device_of(param):
        return run(
            *state,
            weights,
            rows,
            LatentOrder(order, starts, examples),
            pieces,
            factor,
            schedule,
            beta1,
            beta2,
            eps,
            unit_rows,
            extra,
            extra_ids,
        )


@adam_sparse_rows_op.register_fake
def _(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Tensor,
    rows: Tensor,
    order: Tensor,
    starts: Tensor,
    examples: Tensor | None,
    pieces: int,
    factor: float,
    schedule: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    unit_rows: bool,
    extra: Tensor | None,
    extra_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    sums = param.new_empty((param.shape[0],))
    return sums, param.new_empty((param.shape[0],), dtype=torch.int64)
