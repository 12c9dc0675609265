"""Adam, optionally on a matrix whose rows stay of unit length, in one pass over the rows.

With ``unit_rows`` each row's gradient first loses its component along the row (a step along it
would be undone anyway, yet it would enter Adam's moments), and the row is scaled back to length 1
after the step. A row of zeros has no direction: it stays zero.

The same pass can scale the gradient (by a clip factor that only the device knows), write a bfloat16
copy of the parameter for the products of the next step, and keep the moments in bfloat16. Those are
rounded stochastically: exp_avg_sq changes by a thousandth of itself at a step, less than half a
unit in its last place, so rounding to the nearest would never change it.

What changes from step to step is read from a tensor, ``schedule``, so that a captured CUDA graph
can be replayed with new values.
"""

from typing import no_type_check

import torch
from torch import Tensor

from saesteer.kernels.dispatch import TRITON_INSTALLED, use_triton

CHUNK_ELEMENTS = 2**19
"""Elements of a chunk of rows on the CPU: the temporaries of one chunk stay in the cache."""

MAX_WIDTH = 8192
"""Widest row that one Triton program holds in registers. Wider ones use PyTorch."""


def adam_schedule(step: int, lr: float, beta1: float, beta2: float) -> tuple[float, float, float]:
    """The three numbers about a step that `adam_rows` reads from `schedule`.

    Computed in double precision: 1 - beta2 in float32 is off by up to 6e-5 of itself.

    Args:
        step: the number of the step, counted from 1.
        lr: its learning rate.

    Returns:
        ``lr`` divided by the bias correction of exp_avg, the square root of the bias correction of
        exp_avg_sq, and ``step``.
    """
    return lr / (1 - beta1**step), (1 - beta2**step) ** 0.5, float(step)


def adam_rows_reference(
    param: Tensor,
    grad: Tensor,
    optimizer: torch.optim.Adam,
    unit_rows: bool,
) -> None:
    """The op's definition: torch.optim.Adam between a projection and a normalisation.

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


def random_bits(index: Tensor, step: int | Tensor) -> Tensor:
    """16 pseudo-random bits for each index (int64 in 0..65535), a function of index and step.

    A published 32-bit mixing function (Wellons' lowbias32), in arithmetic modulo 2^32.
    """
    low = 0xFFFFFFFF
    h = (index ^ (step * 0x9E3779B9)) & low
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & low
    h = ((h ^ (h >> 15)) * 0x846CA68B) & low
    return (h ^ (h >> 16)) & 0xFFFF


def round_stochastically(values: Tensor, index: Tensor, step: int | Tensor) -> Tensor:
    """float32 ``values`` rounded stochastically to bfloat16; NaN stays NaN.

    A value is rounded up with a probability equal to the fraction of a unit that is cut off.
    """
    bits = values.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    finite = (bits & 0x7F800000) != 0x7F800000
    bits = torch.where(finite, bits + random_bits(index, step), bits) & 0xFFFF0000
    # Wrap to int32 explicitly: values from 2^31 on are the bits of negative numbers.
    bits = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)
    return bits.view(torch.float32).to(torch.bfloat16)


def _adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    schedule: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    first: int,
) -> None:
    """One Adam step in place, in the order of operations of torch.optim.Adam.

    ``first``: number of the first element, for the random bits of bfloat16 moments.
    """
    tensors = (param, grad, exp_avg, exp_avg_sq)
    if param.device.type == "cpu" and all(
        t.is_contiguous() and t.dtype == param.dtype for t in tensors
    ):
        # The kernel under torch.optim.Adam(fused=True): one pass, no temporaries.
        rate, _, step = schedule.tolist()
        torch._fused_adam_(
            [param],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [torch.tensor(step)],
            lr=rate * (1 - beta1**step),
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        return
    rate, root, step = schedule.to(param.dtype if param.dtype == torch.float64 else torch.float32)
    grad = grad.to(param.dtype)
    mean = exp_avg.to(param.dtype).lerp(grad, 1 - beta1)
    second = exp_avg_sq.to(param.dtype).mul(beta2).addcmul_(grad, grad, value=1 - beta2)
    param.sub_(rate * mean / (second.sqrt() / root + eps))
    if exp_avg.dtype == torch.bfloat16:
        index = torch.arange(first, first + param.numel(), device=param.device).view(param.shape)
        number = step.to(torch.int64)
        exp_avg.copy_(round_stochastically(mean, 2 * index, number))
        exp_avg_sq.copy_(round_stochastically(second, 2 * index + 1, number))
    else:
        exp_avg.copy_(mean)
        exp_avg_sq.copy_(second)


def adam_rows_torch(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    shadow: Tensor | None,
    schedule: Tensor,
    grad_scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    unit_rows: bool,
) -> None:
    """PyTorch twin."""
    hyper = (schedule, beta1, beta2, eps)
    if grad_scale is not None and bool(grad_scale.isnan()):
        return
    if not unit_rows:
        if grad_scale is not None:
            grad = grad.to(param.dtype) * grad_scale.to(param.dtype)
        _adam_step(param, grad, exp_avg, exp_avg_sq, *hyper, 0)
    else:
        rows = max(1, CHUNK_ELEMENTS // max(1, param.shape[1]))
        for first in range(0, param.shape[0], rows):
            part = slice(first, first + rows)
            row, row_grad = param[part], grad[part].to(param.dtype)
            if grad_scale is not None:
                row_grad = row_grad * grad_scale.to(param.dtype)
            was_zero = torch.linalg.vector_norm(row, dim=1, keepdim=True) == 0
            along = torch.linalg.vecdot(row_grad, row)[:, None]
            row_grad = torch.addcmul(row_grad, row, along, value=-1)
            at = first * param.shape[1]
            _adam_step(row, row_grad, exp_avg[part], exp_avg_sq[part], *hyper, at)
            norm = torch.linalg.vector_norm(row, dim=1, keepdim=True)
            row.div_(norm.masked_fill_(was_zero | (norm == 0), torch.inf))
    if shadow is not None:
        shadow.copy_(param)


if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit
    @no_type_check
    def _random_bits(index, step):
        """As `random_bits`, for uint32."""
        h = index ^ (step * 0x9E3779B9)
        h = (h ^ (h >> 16)) * 0x7FEB352D
        h = (h ^ (h >> 15)) * 0x846CA68B
        return (h ^ (h >> 16)) & 0xFFFF

    @triton.jit
    @no_type_check
    def _store_moment(at, values, index, step, ok, RANDOM: tl.constexpr):
        if RANDOM:
            bits = values.to(tl.uint32, bitcast=True)
            finite = (bits & 0x7F800000) != 0x7F800000
            bits = tl.where(finite, bits + _random_bits(index, step), bits) & 0xFFFF0000
            # Exact: the lower half is zero.
            tl.store(at, bits.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=ok)
        else:
            tl.store(at, values, mask=ok)

    @triton.jit
    @no_type_check
    def _nearest_bfloat16(values):
        """float32 to the nearest bfloat16, ties to even, also where the cast would truncate."""
        bits = values.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        near = tl.where(finite, bits + 0x7FFF + ((bits >> 16) & 1), bits) & 0xFFFF0000
        return near.to(tl.float32, bitcast=True).to(tl.bfloat16)

    @triton.jit
    @no_type_check
    def adam_kernel(
        weights,
        grads,
        exp_avgs,
        exp_avg_sqs,
        shadows,
        schedule,
        grad_scales,
        n_elements,
        decay1,
        beta2,
        decay2,
        eps,
        SCALED: tl.constexpr,
        SHADOW: tl.constexpr,
        RANDOM: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Adam on BLOCK elements."""
        if SCALED:
            factor = tl.load(grad_scales).to(tl.float32)
            if factor != factor:
                return
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        ok = at < n_elements
        rate = tl.load(schedule).to(tl.float32)
        root = tl.load(schedule + 1).to(tl.float32)
        step = tl.load(schedule + 2).to(tl.int64).to(tl.uint32)
        grad = tl.load(grads + at, mask=ok, other=0.0).to(tl.float32)
        if SCALED:
            grad *= factor
        param = tl.load(weights + at, mask=ok, other=0.0).to(tl.float32)
        mean = tl.load(exp_avgs + at, mask=ok, other=0.0).to(tl.float32)
        second = tl.load(exp_avg_sqs + at, mask=ok, other=0.0).to(tl.float32)
        mean += (grad - mean) * decay1
        second = second * beta2 + grad * grad * decay2
        param -= rate * mean / (tl.sqrt(second) / root + eps)
        tl.store(weights + at, param, mask=ok)
        if SHADOW:
            tl.store(shadows + at, _nearest_bfloat16(param), mask=ok)
        index = at.to(tl.uint32) * 2
        _store_moment(exp_avgs + at, mean, index, step, ok, RANDOM)
        _store_moment(exp_avg_sqs + at, second, index + 1, step, ok, RANDOM)

    @triton.jit
    @no_type_check
    def adam_unit_rows_kernel(
        weights,
        grads,
        exp_avgs,
        exp_avg_sqs,
        shadows,
        schedule,
        grad_scales,
        d_model,
        decay1,
        beta2,
        decay2,
        eps,
        SCALED: tl.constexpr,
        SHADOW: tl.constexpr,
        RANDOM: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Project, Adam and renormalise one row of at most BLOCK elements, held in registers."""
        if SCALED:
            factor = tl.load(grad_scales).to(tl.float32)
            if factor != factor:
                return
        col = tl.arange(0, BLOCK)
        at = tl.program_id(0).to(tl.int64) * d_model + col
        ok = col < d_model
        rate = tl.load(schedule).to(tl.float32)
        root = tl.load(schedule + 1).to(tl.float32)
        step = tl.load(schedule + 2).to(tl.int64).to(tl.uint32)
        grad = tl.load(grads + at, mask=ok, other=0.0).to(tl.float32)
        if SCALED:
            grad *= factor
        row = tl.load(weights + at, mask=ok, other=0.0).to(tl.float32)
        nonzero = tl.sum(row * row, axis=0) > 0
        grad -= tl.sum(grad * row, axis=0) * row
        mean = tl.load(exp_avgs + at, mask=ok, other=0.0).to(tl.float32)
        second = tl.load(exp_avg_sqs + at, mask=ok, other=0.0).to(tl.float32)
        mean += (grad - mean) * decay1
        second = second * beta2 + grad * grad * decay2
        row -= rate * mean / (tl.sqrt(second) / root + eps)
        square = tl.sum(tl.where(ok, row * row, 0.0), axis=0)
        nonzero = nonzero & (square != 0)
        scale = tl.where(nonzero, 1.0 / tl.sqrt(tl.where(nonzero, square, 1.0)), 0.0)
        row *= scale
        tl.store(weights + at, row, mask=ok)
        if SHADOW:
            tl.store(shadows + at, _nearest_bfloat16(row), mask=ok)
        index = at.to(tl.uint32) * 2
        _store_moment(exp_avgs + at, mean, index, step, ok, RANDOM)
        _store_moment(exp_avg_sqs + at, second, index + 1, step, ok, RANDOM)


def adam_rows_triton(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    shadow: Tensor | None,
    schedule: Tensor,
    grad_scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    unit_rows: bool,
) -> None:
    """Triton kernel, for contiguous state: one read and one write of every element."""
    if param.numel() == 0:
        return
    tensors = (
        param,
        grad.contiguous(),
        exp_avg,
        exp_avg_sq,
        param if shadow is None else shadow,
        schedule,
        param if grad_scale is None else grad_scale,
    )
    hyper = (1 - beta1, beta2, 1 - beta2, eps)
    flags = {
        "SCALED": grad_scale is not None,
        "SHADOW": shadow is not None,
        "RANDOM": exp_avg.dtype == torch.bfloat16,
    }
    if unit_rows:
        rows, d_model = param.shape
        block = triton.next_power_of_2(d_model)
        warps = 4 if block <= 2048 else 8
        adam_unit_rows_kernel[(rows,)](
            *tensors, d_model, *hyper, BLOCK=block, num_warps=warps, **flags
        )
    else:
        n = param.numel()
        adam_kernel[(triton.cdiv(n, 1024),)](*tensors, n, *hyper, BLOCK=1024, **flags)


@torch.library.custom_op(
    "saesteer::adam_rows_", mutates_args=("param", "exp_avg", "exp_avg_sq", "shadow")
)
def adam_rows_op(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    shadow: Tensor | None,
    schedule: Tensor,
    grad_scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    unit_rows: bool,
) -> None:
    """One Adam step in place on ``param``, the moments and the bfloat16 ``shadow``."""
    written = [t for t in (param, exp_avg, exp_avg_sq, shadow) if t is not None]
    fits = (
        use_triton(param)
        and param.dtype == torch.float32
        and all(t.is_contiguous() for t in written)
        and not (unit_rows and param.shape[1] > MAX_WIDTH)
    )
    run = adam_rows_triton if fits else adam_rows_torch
    with torch.cuda.device_of(param):  # Triton launches on the current device
        run(
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            shadow,
            schedule,
            grad_scale,
            beta1,
            beta2,
            eps,
            unit_rows,
        )


@adam_rows_op.register_fake
def _(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    shadow: Tensor | None,
    schedule: Tensor,
    grad_scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    unit_rows: bool,
) -> None:
    return None
