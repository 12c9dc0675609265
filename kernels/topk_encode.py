"""TopK encoder: the k largest pre-activations of each example, as values and latent indices.

The dense pre-activations [batch, d_sae] exist for a chunk of rows at a time and are dropped once
its k best are known; the backward pass works from the k chosen entries alone.

Order of latents: by pre-activation, larger first, then by index, lower first. NaN counts as 0.
Both implementations select exactly the first k of that order and list them by ascending index.
A chosen pre-activation that is not positive becomes an empty slot: value 0, gradient 0.
"""

from typing import Any, no_type_check

import torch
from torch import Tensor

from saesteer.kernels.derivatives import sparse_decode_op, sparse_row_grads_op
from saesteer.kernels.dispatch import TRITON_INSTALLED, accumulator_dtype, use_triton
from saesteer.kernels.native import even_bounds, parts_of, run_parts, scratch, use_native
from saesteer.kernels.near_products import near_operands, they_pay

CPU_CHUNK_BYTES = 20 * 2**20
"""Bytes of dense pre-activations in a chunk on a CPU: they stay in the last-level cache until they
are searched. All chunks use the same memory, so that pages are mapped only once."""

CPU_CHUNK_ROWS = 256
"""Chunks of fewer rows than this slow the product down. They have fewer only where more would
exceed `MOST_CPU_CHUNK_BYTES`."""

MOST_CPU_CHUNK_BYTES = 64 * 2**20
"""Most bytes of dense pre-activations in a chunk on a CPU, at any d_sae."""

CUDA_CHUNK_BYTES = 256 * 2**20
"""Bytes of dense pre-activations in a chunk on a GPU, most of which small products leave idle."""

GROUP = 16
"""Columns per group of the PyTorch selection: of 8 to 64 the fastest for d_sae 4608 to 16384."""

MAX_CANDIDATES = 8192
"""Most keys one Triton program searches: 32 per thread, before registers spill. Wider selections
(k in the hundreds at d_sae in the hundred thousands) use PyTorch."""


def topk_encode_reference(
    x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The op's definition in dense, differentiable PyTorch, for tests and benchmarks."""
    pre_acts = x @ W_enc_rows.t() + b_enc
    pre_acts = pre_acts.masked_fill(pre_acts.isnan(), 0)
    ranked = torch.sort(pre_acts, dim=1, descending=True, stable=True).indices
    indices = ranked[:, :k].sort(1).values
    return pre_acts.gather(1, indices).relu(), indices


def chunk_rows(batch: int, d_sae: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows per chunk: as few chunks as fit, of nearly equal size."""
    row_bytes = d_sae * dtype.itemsize
    if device.type == "cpu":
        fast = min(CPU_CHUNK_ROWS, MOST_CPU_CHUNK_BYTES // row_bytes)
        most = max(1, fast, CPU_CHUNK_BYTES // row_bytes)
    else:
        most = max(1, CUDA_CHUNK_BYTES // row_bytes)
    n_chunks = -(-batch // most)
    return -(-batch // n_chunks)


def products(x: Tensor, W_enc_rows: Tensor) -> Tensor:
    """``x @ W_enc_rows.T`` in the accumulator dtype.

    bfloat16 and float16 are multiplied as they are where the result can be float32 (CUDA alone can
    do that): ranking results in bfloat16 would tie many latents at the threshold.
    """
    if x.is_cuda and x.dtype == W_enc_rows.dtype and x.element_size() == 2:
        return torch.mm(x, W_enc_rows.t(), out_dtype=torch.float32)
    dtype = accumulator_dtype(x, W_enc_rows)
    return torch.mm(x.to(dtype), W_enc_rows.to(dtype).t())


def _largest(pre_acts: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest values of each row, in descending order, and one choice of their columns.

    Looks only into the n groups of columns with the largest maxima. Those hold n largest values: a
    value outside them is at most its own group's maximum, so each of the n chosen groups has a
    maximum that is at least as large. NaN counts as larger than anything, here as in torch.topk.
    """
    rows, d_sae = pre_acts.shape
    n_groups = d_sae // GROUP
    if 4 * n > n_groups:  # with so few groups, searching them first does not pay
        return torch.topk(pre_acts, n, dim=1)
    # Group g holds columns g, g + n_groups, g + 2 * n_groups, ...: the maxima are then elementwise.
    grouped = pre_acts[:, : n_groups * GROUP].unflatten(1, (GROUP, n_groups))
    groups = grouped.amax(1).topk(n, dim=1, sorted=False).indices
    candidates = grouped.gather(2, groups[:, None, :].expand(-1, GROUP, -1)).flatten(1)
    leftover = pre_acts[:, n_groups * GROUP :]
    values, places = torch.cat([candidates, leftover], 1).topk(n, dim=1)
    columns = groups.gather(1, places % n) + places.div(n, rounding_mode="floor") * n_groups
    columns = torch.where(places < n * GROUP, columns, places + (n_groups - n) * GROUP)
    return values, columns


def select_topk_torch(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """PyTorch twin of the selection: relu of the chosen values [rows, k] and indices [rows, k]."""
    rows, d_sae = pre_acts.shape
    if k == d_sae:
        indices = torch.arange(d_sae, device=pre_acts.device).repeat(rows, 1)
        values = pre_acts
    else:
        # One value more than asked for: if it equals the k-th, topk chose arbitrarily among equals.
        values, indices = _largest(pre_acts, k + 1)
        unsettled = (values[:, k - 1] == values[:, k]) | values[:, 0].isnan()
        indices = indices[:, :k].sort(1).values
        if unsettled.any():
            where = unsettled.nonzero()[:, 0]
            indices[where] = _first_of_equals(pre_acts[where], k)
        values = pre_acts.gather(1, indices)
    # clamp(min=0) would keep NaN.
    return torch.where(values > 0, values, 0), indices


def _first_of_equals(pre_acts: Tensor, k: int) -> Tensor:
    """Indices of the k largest, the lowest indices first among equals, NaN as 0."""
    pre_acts = pre_acts.masked_fill(pre_acts.isnan(), 0)
    kth = torch.topk(pre_acts, k, dim=1).values[:, k - 1 :]
    above, equal = pre_acts > kth, pre_acts == kth
    room = k - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1) <= room))
    return chosen.nonzero()[:, 1].view(-1, k)


def topk_encode_torch(
    x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """PyTorch twin."""
    batch, d_sae = x.shape[0], W_enc_rows.shape[0]
    dtype = accumulator_dtype(x, W_enc_rows)
    acts = x.new_empty((batch, k), dtype=dtype)
    indices = x.new_empty((batch, k), dtype=torch.int64)
    if batch == 0:
        return acts, indices
    W_enc, b_enc = W_enc_rows.to(dtype).t(), b_enc.to(dtype)
    rows = chunk_rows(batch, d_sae, dtype, x.device)
    buffer = x.new_empty((rows, d_sae), dtype=dtype)
    for first in range(0, batch, rows):
        part = slice(first, min(first + rows, batch))
        pre_acts = buffer[: part.stop - first]
        torch.addmm(b_enc, x[part].to(dtype), W_enc, out=pre_acts)
        acts[part], indices[part] = select_topk_torch(pre_acts, k)
    return acts, indices


def topk_encode_native(
    x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Compiled CPU loops, for float32."""
    batch, d_sae = x.shape[0], W_enc_rows.shape[0]
    acts = x.new_empty((batch, k))
    indices = x.new_empty((batch, k), dtype=torch.int64)
    x, W_enc_rows, b_enc = x.contiguous(), W_enc_rows.contiguous(), b_enc.contiguous()
    if they_pay(x, d_sae, k):
        undecided = _encode_certain(x, W_enc_rows, b_enc, k, acts, indices)
        if len(undecided):
            acts[undecided], indices[undecided] = _encode_rows(x[undecided], W_enc_rows, b_enc, k)
        return acts, indices
    return _encode_rows(x, W_enc_rows, b_enc, k)


def _encode_rows(x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """float32 product of a chunk of rows at a time, and compiled selection."""
    from saesteer.kernels.topk_encode_cpu import SPAN, select_rows

    batch, d_sae = x.shape[0], W_enc_rows.shape[0]
    acts = x.new_empty((batch, k))
    indices = x.new_empty((batch, k), dtype=torch.int64)
    if batch == 0:
        return acts, indices
    span = max(1, min(SPAN, d_sae // (4 * k)))
    rows = chunk_rows(batch, d_sae, torch.float32, x.device)
    buffer = scratch((rows, d_sae), torch.float32)
    for first in range(0, batch, rows):
        part = slice(first, min(first + rows, batch))
        pre_acts = buffer[: part.stop - first]
        torch.mm(x[part], W_enc_rows.t(), out=pre_acts)
        run_parts(
            select_rows,
            even_bounds(len(pre_acts), parts_of(len(pre_acts), 8)),
            pre_acts.numpy(),
            b_enc.numpy(),
            k,
            span,
            acts[part].numpy(),
            indices[part].numpy(),
        )
    return acts, indices


def _encode_certain(
    x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int, acts: Tensor, indices: Tensor
) -> Tensor:
    """Fill ``acts`` and ``indices``: bfloat16 products rule latents out, float32 ranks the rest.

    Returns the indices of the rows for which this was not possible; they are left unfilled.
    """
    from saesteer.kernels.topk_encode_cpu import SPAN, select_certain_rows

    batch, d_sae = x.shape[0], W_enc_rows.shape[0]
    near = near_operands(x, W_enc_rows)
    span = max(1, min(SPAN, d_sae // (4 * k)))
    undecided = torch.zeros(batch, dtype=torch.bool)
    rows = chunk_rows(batch, d_sae, torch.bfloat16, x.device)
    buffer = scratch((rows, d_sae), torch.bfloat16)
    for first in range(0, batch, rows):
        part = slice(first, min(first + rows, batch))
        product = buffer[: part.stop - first]
        torch.mm(near.x[part], near.W.t(), out=product)
        run_parts(
            select_certain_rows,
            even_bounds(len(product), parts_of(len(product), 8)),
            product.view(torch.uint16).numpy(),
            x[part].numpy(),
            near.x_sizes[part],
            W_enc_rows.numpy(),
            near.error_scales,
            b_enc.numpy(),
            k,
            span,
            8 * k,
            acts[part].numpy(),
            indices[part].numpy(),
            undecided[part].numpy(),
        )
    return undecided.nonzero()[:, 0]


if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit
    @no_type_check
    def _ranked(values, KEY: tl.constexpr, MAX: tl.constexpr):
        """Values with NaN and -0.0 as 0, and integer keys in the same order."""
        values = tl.where((values == values) & (values != 0), values, 0.0)
        bits = values.to(KEY, bitcast=True)
        # The bits of a float order like a sign and magnitude: turn the magnitude of negatives.
        return values, tl.where(bits < 0, bits ^ MAX, bits)

    @triton.jit
    @no_type_check
    def _first_k(keys, k, KEY: tl.constexpr, MAX: tl.constexpr, BITS: tl.constexpr):
        """Whether each key is among the first k (larger first, then earlier), and its place there.

        Finds the k-th largest key bit by bit: the largest threshold that k keys reach.
        """
        lowest = tl.full([], -MAX - 1, KEY)
        one = tl.full([], 1, KEY)
        kth = tl.where(tl.sum((keys >= 0).to(tl.int32), axis=0) >= k, lowest * 0, lowest)
        for step in range(BITS - 1):
            higher = kth + (one << (BITS - 2 - step))
            kth = tl.where(tl.sum((keys >= higher).to(tl.int32), axis=0) >= k, higher, kth)
        above = keys > kth
        equal = (keys == kth).to(tl.int32)
        room = k - tl.sum(above.to(tl.int32), axis=0)
        chosen = above | ((equal != 0) & (tl.cumsum(equal, axis=0) <= room))
        return chosen, tl.cumsum(chosen.to(tl.int32), axis=0) - 1

    @triton.jit
    @no_type_check
    def group_max_kernel(
        pre_acts,
        b_enc,
        group_keys,
        d_sae,
        n_groups,
        stride_pre_acts,
        GROUP: tl.constexpr,
        BLOCK_G: tl.constexpr,
        KEY: tl.constexpr,
        MAX: tl.constexpr,
    ):
        """Largest key of each group of GROUP neighbouring columns."""
        row = tl.program_id(0).to(tl.int64)
        group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
        col = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        ok = col < d_sae
        values = tl.load(pre_acts + row * stride_pre_acts + col, mask=ok, other=0.0)
        values += tl.load(b_enc + col, mask=ok, other=0.0)
        _, keys = _ranked(values, KEY, MAX)
        keys = tl.where(ok, keys, -MAX - 1)
        tl.store(group_keys + row * n_groups + group, tl.max(keys, axis=1), mask=group < n_groups)

    @triton.jit
    @no_type_check
    def select_groups_kernel(
        group_keys,
        group_ids,
        n_groups,
        n_chosen,
        BLOCK: tl.constexpr,
        KEY: tl.constexpr,
        MAX: tl.constexpr,
        BITS: tl.constexpr,
    ):
        """The first n_chosen groups of one row, in ascending order."""
        row = tl.program_id(0).to(tl.int64)
        group = tl.arange(0, BLOCK)
        keys = tl.load(group_keys + row * n_groups + group, mask=group < n_groups, other=-MAX - 1)
        chosen, place = _first_k(keys, n_chosen, KEY, MAX, BITS)
        tl.store(group_ids + row * n_chosen + place, group, mask=chosen)

    @triton.jit
    @no_type_check
    def select_latents_kernel(
        pre_acts,
        b_enc,
        group_ids,
        acts,
        indices,
        d_sae,
        n_chosen,
        k,
        stride_pre_acts,
        GROUP: tl.constexpr,
        BLOCK_G: tl.constexpr,
        KEY: tl.constexpr,
        MAX: tl.constexpr,
        BITS: tl.constexpr,
    ):
        """The first k columns among the chosen groups of one row."""
        row = tl.program_id(0).to(tl.int64)
        nth = tl.arange(0, BLOCK_G)
        group = tl.load(group_ids + row * n_chosen + nth, mask=nth < n_chosen, other=0)
        col = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        ok = (col < d_sae) & (nth < n_chosen)[:, None]
        values = tl.load(pre_acts + row * stride_pre_acts + col, mask=ok, other=0.0)
        values += tl.load(b_enc + col, mask=ok, other=0.0)
        values, keys = _ranked(values, KEY, MAX)
        keys = tl.where(ok, keys, -MAX - 1)
        chosen, place = _first_k(tl.reshape(keys, [BLOCK_G * GROUP]), k, KEY, MAX, BITS)
        values = tl.reshape(tl.where(values > 0, values, 0.0), [BLOCK_G * GROUP])
        tl.store(acts + row * k + place, values, mask=chosen)
        col = tl.reshape(col, [BLOCK_G * GROUP])
        tl.store(indices + row * k + place, col.to(tl.int64), mask=chosen)

    def _group_size(d_sae: int, k: int) -> tuple[int, int]:
        """Columns per group, and the number of keys the wider of the two searches looks at."""

        def keys(group: int) -> tuple[int, int]:
            n_groups = triton.cdiv(d_sae, group)
            groups = triton.next_power_of_2(n_groups)
            latents = triton.next_power_of_2(min(k, n_groups)) * group
            return groups + latents, max(groups, latents)

        group = min((8, 16, 32, 64, 128), key=keys)
        return group, keys(group)[1]


def select_topk_triton(
    pre_acts: Tensor, b_enc: Tensor, k: int, acts: Tensor, indices: Tensor
) -> None:
    """Triton selection from ``pre_acts`` + ``b_enc``: fills ``acts`` and ``indices`` [rows, k].

    A top-k entry lies in one of the k groups with the best entries: else each of those k groups
    holds an entry ranked before it.
    """
    rows, d_sae = pre_acts.shape
    group, widest = _group_size(d_sae, k)
    n_groups = triton.cdiv(d_sae, group)
    n_chosen = min(k, n_groups)
    double = pre_acts.dtype == torch.float64
    bits = 64 if double else 32
    keys = {"KEY": tl.int64 if double else tl.int32, "MAX": 2 ** (bits - 1) - 1}
    warps = max(4, widest // 1024)
    group_keys = pre_acts.new_empty((rows, n_groups), dtype=torch.int64 if double else torch.int32)
    group_ids = pre_acts.new_empty((rows, n_chosen), dtype=torch.int32)
    block_g = min(triton.next_power_of_2(n_groups), 4096 // group)
    group_max_kernel[(rows, triton.cdiv(n_groups, block_g))](
        pre_acts,
        b_enc,
        group_keys,
        d_sae,
        n_groups,
        pre_acts.stride(0),
        GROUP=group,
        BLOCK_G=block_g,
        **keys,
    )
    select_groups_kernel[(rows,)](
        group_keys,
        group_ids,
        n_groups,
        n_chosen,
        BLOCK=triton.next_power_of_2(n_groups),
        BITS=bits,
        num_warps=warps,
        **keys,
    )
    select_latents_kernel[(rows,)](
        pre_acts,
        b_enc,
        group_ids,
        acts,
        indices,
        d_sae,
        n_chosen,
        k,
        pre_acts.stride(0),
        GROUP=group,
        BLOCK_G=triton.next_power_of_2(n_chosen),
        BITS=bits,
        num_warps=warps,
        **keys,
    )


def topk_encode_triton(
    x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Library product and Triton selection, for k that fits one program."""
    batch, d_sae = x.shape[0], W_enc_rows.shape[0]
    dtype = accumulator_dtype(x, W_enc_rows)
    acts = x.new_empty((batch, k), dtype=dtype)
    indices = x.new_empty((batch, k), dtype=torch.int64)
    if batch == 0:
        return acts, indices
    b_enc = b_enc.to(dtype).contiguous()
    rows = chunk_rows(batch, d_sae, dtype, x.device)
    for first in range(0, batch, rows):
        part = slice(first, min(first + rows, batch))
        pre_acts = products(x[part], W_enc_rows)
        select_topk_triton(pre_acts, b_enc, k, acts[part], indices[part])
    return acts, indices


@torch.library.custom_op("saesteer::topk_encode", mutates_args=())
def topk_encode_op(x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Latent activations [batch, k] in the accumulator dtype, and indices [batch, k] int64."""
    if use_triton(x) and _group_size(W_enc_rows.shape[0], k)[1] <= MAX_CANDIDATES:
        with torch.cuda.device_of(x):  # Triton launches on the current device
            return topk_encode_triton(x, W_enc_rows, b_enc, k)
    if use_native(x, W_enc_rows, b_enc):
        return topk_encode_native(x, W_enc_rows, b_enc, k)
    return topk_encode_torch(x, W_enc_rows, b_enc, k)


@topk_encode_op.register_fake
def _(x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int | torch.SymInt) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    acts = x.new_empty(shape, dtype=accumulator_dtype(x, W_enc_rows))
    return acts, x.new_empty(shape, dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, W_enc_rows, b_enc, _ = inputs
    acts, indices = output
    ctx.save_for_backward(x, W_enc_rows, acts, indices)
    ctx.bias_dtype = b_enc.dtype


def _backward(ctx: Any, grad_acts: Tensor, grad_indices: Any) -> tuple[Any, ...]:
    x, W_enc_rows, acts, indices = ctx.saved_tensors
    # An empty slot has no gradient, though its latent was chosen.
    grad_pre_acts = torch.where(acts > 0, grad_acts, 0)
    grad_x = grad_W_enc = grad_b_enc = None
    if ctx.needs_input_grad[0]:
        grad_x = sparse_decode_op(grad_pre_acts, indices, W_enc_rows, None).to(x.dtype)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_W_enc, grad_b_enc, _ = sparse_row_grads_op(
            grad_pre_acts, indices, x, W_enc_rows.shape[0], None, None
        )
        grad_W_enc = grad_W_enc.to(W_enc_rows.dtype)
        grad_b_enc = grad_b_enc.to(ctx.bias_dtype)
    return grad_x, grad_W_enc, grad_b_enc, None


topk_encode_op.register_autograd(_backward, setup_context=_setup_context)
