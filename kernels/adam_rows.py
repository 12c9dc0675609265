"""Adam, optionally on a matrix whose rows stay of unit length, in one pass over the rows.

With ``unit_rows`` each row's gradient first loses its component along the row (a step along it
would be undone anyway, yet it would enter Adam's moments), and the row is scaled back to length 1
after the step. A row of zeros has no direction: it stays zero.
"""

from typing import no_type_check

import torch
from torch import Tensor

from saesteer.kernels.dispatch import TRITON_INSTALLED, use_triton

CHUNK_ELEMENTS = 2**19
"""Elements of a chunk of rows on the CPU: the temporaries of one chunk stay in the cache."""

MAX_WIDTH = 8192
"""Widest row that one Triton program holds in registers. Wider ones use PyTorch."""


def adam_rows_reference(
    param: Tensor,
    grad: Tensor,
    optimizer: torch.optim.Adam,
    unit_rows: bool,
) -> None:
    """What the op means: torch.optim.Adam between a projection and a normalisation.

    ``optimizer`` holds ``param`` alone. For tests and benchmarks.
    """
    with torch.no_grad():
        zero = (param == 0).all(-1, keepdim=True)
        if unit_rows:
            grad = grad - (grad * param).sum(1, keepdim=True) * param
        param.grad = grad
        optimizer.step()
        if unit_rows:
            param.copy_(torch.where(zero, 0, param / param.norm(dim=1, keepdim=True)))


def _adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One Adam step in place, in the order of operations of torch.optim.Adam."""
    tensors = (param, grad, exp_avg, exp_avg_sq)
    if param.device.type == "cpu" and all(
        t.is_contiguous() and t.dtype == param.dtype for t in tensors
    ):
        # The kernel under torch.optim.Adam(fused=True): one pass, no temporaries.
        torch._fused_adam_(
            [param],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [torch.tensor(float(step))],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        return
    grad = grad.to(exp_avg.dtype)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


def adam_rows_torch(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    unit_rows: bool,
) -> None:
    """PyTorch twin."""
    hyper = (step, lr, beta1, beta2, eps)
    if not unit_rows:
        _adam_step(param, grad, exp_avg, exp_avg_sq, *hyper)
        return
    rows = max(1, CHUNK_ELEMENTS // max(1, param.shape[1]))
    for first in range(0, param.shape[0], rows):
        part = slice(first, first + rows)
        row, row_grad = param[part], grad[part].to(param.dtype)
        dead = torch.linalg.vector_norm(row, dim=1, keepdim=True) == 0
        along = torch.linalg.vecdot(row_grad, row)[:, None]
        row_grad = torch.addcmul(row_grad, row, along, value=-1)
        _adam_step(row, row_grad, exp_avg[part], exp_avg_sq[part], *hyper)
        norm = torch.linalg.vector_norm(row, dim=1, keepdim=True)
        row.div_(norm.masked_fill_(dead | (norm == 0), torch.inf))


if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit
    @no_type_check
    def _update(param, grad, exp_avg, exp_avg_sq, rate, decay1, beta2, decay2, root, eps):
        exp_avg += (grad - exp_avg) * decay1
        exp_avg_sq = exp_avg_sq * beta2 + grad * grad * decay2
        return param - rate * exp_avg / (tl.sqrt(exp_avg_sq) / root + eps), exp_avg, exp_avg_sq

    @triton.jit
    @no_type_check
    def adam_kernel(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        n_elements,
        rate,
        decay1,
        beta2,
        decay2,
        root,
        eps,
        BLOCK: tl.constexpr,
    ):
        """Adam on BLOCK elements."""
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        ok = at < n_elements
        param, exp_avg, exp_avg_sq = _update(
            tl.load(params + at, mask=ok, other=0.0).to(tl.float32),
            tl.load(grads + at, mask=ok, other=0.0).to(tl.float32),
            tl.load(exp_avgs + at, mask=ok, other=0.0).to(tl.float32),
            tl.load(exp_avg_sqs + at, mask=ok, other=0.0).to(tl.float32),
            rate,
            decay1,
            beta2,
            decay2,
            root,
            eps,
        )
        tl.store(params + at, param, mask=ok)
        tl.store(exp_avgs + at, exp_avg, mask=ok)
        tl.store(exp_avg_sqs + at, exp_avg_sq, mask=ok)

    @triton.jit
    @no_type_check
    def adam_unit_rows_kernel(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        d_model,
        rate,
        decay1,
        beta2,
        decay2,
        root,
        eps,
        BLOCK: tl.constexpr,
    ):
        """Project, Adam and renormalise one row of at most BLOCK elements, held in registers."""
        col = tl.arange(0, BLOCK)
        at = tl.program_id(0).to(tl.int64) * d_model + col
        ok = col < d_model
        row = tl.load(params + at, mask=ok, other=0.0).to(tl.float32)
        grad = tl.load(grads + at, mask=ok, other=0.0).to(tl.float32)
        alive = tl.sum(row * row, axis=0) > 0
        grad -= tl.sum(grad * row, axis=0) * row
        row, exp_avg, exp_avg_sq = _update(
            row,
            grad,
            tl.load(exp_avgs + at, mask=ok, other=0.0).to(tl.float32),
            tl.load(exp_avg_sqs + at, mask=ok, other=0.0).to(tl.float32),
            rate,
            decay1,
            beta2,
            decay2,
            root,
            eps,
        )
        square = tl.sum(tl.where(ok, row * row, 0.0), axis=0)
        alive = alive & (square != 0)
        scale = tl.where(alive, 1.0 / tl.sqrt(tl.where(alive, square, 1.0)), 0.0)
        tl.store(params + at, row * scale, mask=ok)
        tl.store(exp_avgs + at, exp_avg, mask=ok)
        tl.store(exp_avg_sqs + at, exp_avg_sq, mask=ok)


def adam_rows_triton(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    unit_rows: bool,
) -> None:
    """Triton kernel, for contiguous state: one read and one write of every element."""
    if param.numel() == 0:
        return
    tensors = (param, grad.contiguous(), exp_avg, exp_avg_sq)
    # Worked out in double precision: 1 - beta2 in float32 is off by up to 6e-5 of itself.
    hyper = (
        lr / (1 - beta1**step),
        1 - beta1,
        beta2,
        1 - beta2,
        (1 - beta2**step) ** 0.5,
        eps,
    )
    if unit_rows:
        rows, d_model = param.shape
        block = triton.next_power_of_2(d_model)
        warps = 4 if block <= 2048 else 8
        adam_unit_rows_kernel[(rows,)](*tensors, d_model, *hyper, BLOCK=block, num_warps=warps)
    else:
        n = param.numel()
        adam_kernel[(triton.cdiv(n, 1024),)](*tensors, n, *hyper, BLOCK=1024)


@torch.library.custom_op("saesteer::adam_rows_", mutates_args=("param", "exp_avg", "exp_avg_sq"))
def adam_rows_op(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    unit_rows: bool,
) -> None:
    """One Adam step in place on ``param``, ``exp_avg`` and ``exp_avg_sq``. ``step`` starts at 1."""
    fits = (
        use_triton(param)
        and param.dtype != torch.float64
        and all(t.is_contiguous() for t in (param, exp_avg, exp_avg_sq))
        and not (unit_rows and param.shape[1] > MAX_WIDTH)
    )
    run = adam_rows_triton if fits else adam_rows_torch
    with torch.cuda.device_of(param):  # Triton launches on the current device
        run(param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, unit_rows)


@adam_rows_op.register_fake
def _(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    unit_rows: bool,
) -> None:
    return None
