"""BatchTopK encoder: the ``batch * k`` largest pre-activations of a whole batch, as ragged entries.

Order of entries: by pre-activation, larger first, then by example and latent, lower first. NaN and
what is not positive count as 0. Both implementations select exactly the first ``batch * k`` of that
order and list them by example and latent. There are always so many entries, so that nobody has to
ask a device for their number: where fewer are positive the rest hold 0, the gradient 0 as well.

The dense pre-activations exist for a chunk of rows at a time. What survives a chunk are its
candidates, a few more than are wanted in the end.
"""

import math
from typing import Any, no_type_check

import numpy as np
import torch
from torch import Tensor

from saesteer.kernels import topk_encode
from saesteer.kernels.above_floor import chunks
from saesteer.kernels.derivatives import sparse_decode_op, sparse_row_grads_op
from saesteer.kernels.dispatch import TRITON_INSTALLED, accumulator_dtype, use_triton
from saesteer.kernels.entries import filled_entries
from saesteer.kernels.native import use_native
from saesteer.kernels.select_largest import places_of_largest

Encoded = tuple[Tensor, Tensor, Tensor]

MARGINS = (1.2, 6.0, math.inf)
"""How many times the entries wanted a first guess of the threshold lets through; the next where
that was too few. With the last every positive pre-activation is a candidate."""

GUESS_ROWS = 256
"""Rows of the first chunk that the guess is made from."""

CUDA_CHUNK_SHARE = 4
"""The selection in PyTorch also counts every entry, in int32 and int64: chunks are smaller by it
than those of `topk_encode`."""


def batchtopk_encode_reference(x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int) -> Encoded:
    """What the op means, in dense, differentiable PyTorch. For tests and benchmarks."""
    pre_acts = x @ W_enc_rows.t() + b_enc
    flat = pre_acts.masked_fill(pre_acts.isnan(), 0).relu().flatten()
    ranked = torch.sort(flat, descending=True, stable=True).indices
    places = ranked[: len(x) * k].sort().values
    return flat[places], *_entries(places, len(x), len(W_enc_rows))


def _entries(places: Tensor, batch: int, d_sae: int) -> tuple[Tensor, Tensor]:
    """Latents and row starts of ascending places in the flattened pre-activations."""
    bounds = torch.arange(batch + 1, device=places.device) * d_sae
    return places % d_sae, torch.searchsorted(places, bounds)


def _first_largest(values: Tensor, count: int) -> Tensor:
    """Places, ascending, of the ``count`` largest of values >= 0; of equals the first.

    Nothing here has a length that only the device knows.
    """
    kth = values.topk(count, sorted=False).values.amin()
    above, equal = values > kth, values == kth
    room = count - above.sum()
    kept = above | (equal & (equal.cumsum(0, dtype=torch.int32) <= room))
    wanted = torch.arange(1, count + 1, device=values.device)
    return torch.searchsorted(kept.cumsum(0), wanted)


def batchtopk_encode_torch(x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int) -> Encoded:
    """PyTorch twin."""
    batch, d_sae = x.shape[0], W_enc_rows.shape[0]
    dtype, count = accumulator_dtype(x, W_enc_rows), batch * k
    b_enc = b_enc.to(dtype)
    values = x.new_empty((0,), dtype=dtype)
    places = torch.empty(0, dtype=torch.int64, device=x.device)
    rows = topk_encode.chunk_rows(max(1, batch), d_sae, dtype, x.device)
    rows = max(1, rows // CUDA_CHUNK_SHARE) if x.is_cuda else rows
    for first in range(0, batch, rows):
        pre_acts = topk_encode.products(x[first : first + rows], W_enc_rows).add_(b_enc)
        flat = torch.where(pre_acts > 0, pre_acts, 0).flatten()
        found = _first_largest(flat, min(count, len(flat)))
        values = torch.cat([values, flat[found]])
        places = torch.cat([places, found + first * d_sae])
        if len(values) > count:
            kept = _first_largest(values, count)
            values, places = values[kept], places[kept]
    return values, *_entries(places, batch, d_sae)


def batchtopk_encode_native(x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int) -> Encoded:
    """Compiled CPU loops, for float32."""
    batch, d_sae = x.shape[0], W_enc_rows.shape[0]
    count = batch * k
    x, W_enc_rows, b_enc = x.contiguous(), W_enc_rows.contiguous(), b_enc.contiguous()
    for margin in MARGINS:
        values, places, floor = _candidates(x, W_enc_rows, b_enc, k, margin)
        if floor == 0 or len(values) >= count:
            break
    values, places = _keep_first(values, places, count)
    if len(values) < count:
        # The first places whose pre-activation is not positive; they are among the first `count`.
        empty = np.setdiff1d(np.arange(count), places, assume_unique=True)[: count - len(values)]
        order = np.argsort(np.concatenate([places, empty]), kind="stable")
        values = np.concatenate([values, np.zeros(len(empty), np.float32)])[order]
        places = np.concatenate([places, empty])[order]
    return torch.from_numpy(values), *_entries(torch.from_numpy(places), batch, d_sae)


def _candidates(
    x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int, margin: float
) -> tuple[Any, Any, float]:
    """Pre-activations above a floor, their places, and the floor that was guessed.

    The first ``batch * k`` are among them if they are so many, or if the floor is 0. The guess
    decides how much is looked at twice, never what comes out.
    """
    count, guessed, floor = len(x) * k, 0.0, np.float32(0)
    kept: list[tuple[Any, Any]] = [(np.empty(0, np.float32), np.empty(0, np.int64))]
    for chunk in chunks(x, W_enc_rows, b_enc, k):
        if chunk.rows.start == 0:
            guessed = _guess(chunk.sample(GUESS_ROWS), k, margin)
            floor = np.float32(guessed)
        kept.append(chunk.above(floor)[:2])
        if sum(len(values) for values, _ in kept) > 2 * count:
            kept = [_keep_first(*_joined(kept), count)]
            # So many are as large already, and stand before whatever comes.
            floor = kept[0][0].min()
    return *_joined(kept), guessed


def _joined(parts: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _keep_first(values: Any, places: Any, count: int) -> tuple[Any, Any]:
    """The ``count`` largest, if there are more, in the order they stand in; of equals the first."""
    if len(values) <= count:
        return values, places
    kth = np.partition(values, len(values) - count)[len(values) - count]
    chosen = values > kth
    chosen[np.flatnonzero(values == kth)[: count - np.count_nonzero(chosen)]] = True
    return values[chosen], places[chosen]


def _guess(sample: Tensor, k: int, margin: float) -> float:
    """A value that about ``margin * k`` pre-activations of each of these rows are above; or 0."""
    wanted = len(sample) * k * margin
    groups = sample.shape[1] // topk_encode.GROUP
    if groups >= 4 * k * margin:  # most groups hold one of the best at most
        sample = sample[:, : groups * topk_encode.GROUP].unflatten(1, (topk_encode.GROUP, groups))
        sample = sample.amax(1)
    if wanted >= sample.numel():
        return 0.0
    values = sample.nan_to_num(0.0, posinf=math.inf).flatten().numpy()
    at = len(values) - math.ceil(wanted)
    return max(0.0, float(np.partition(values, at)[at]))


if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    from saesteer.kernels.topk_encode import _ranked, group_max_kernel

    @triton.jit
    @no_type_check
    def take_groups_kernel(
        chosen,
        keys,
        old_members,
        old_owners,
        pre_acts,
        bias,
        members,
        owners,
        best,
        n_kept,
        n_groups,
        d_sae,
        first_group,
        stride_pre_acts,
        GROUP: tl.constexpr,
        BLOCK: tl.constexpr,
        KEY: tl.constexpr,
        MAX: tl.constexpr,
    ):
        """Collect chosen groups: those kept before from their list, new ones from pre_acts.

        A group is given by its members' keys, its number in the batch, and its best key.
        """
        slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        ok = slot < n_kept
        at = tl.load(chosen + slot, mask=ok, other=-1)
        old = (at >= 0) & (at < n_kept)
        new = at >= n_kept
        group = at - n_kept
        row = group // n_groups
        nth = tl.arange(0, GROUP)[None, :]
        col = (group - row * n_groups)[:, None] * GROUP + nth
        fresh = new[:, None] & (col < d_sae)
        value = tl.load(pre_acts + row[:, None] * stride_pre_acts + col, mask=fresh, other=0.0)
        value += tl.load(bias + col, mask=fresh, other=0.0)
        _, key = _ranked(value, KEY, MAX)
        before = tl.load(old_members + at[:, None] * GROUP + nth, mask=old[:, None], other=0)
        key = tl.where(fresh, tl.maximum(key, 0), before)
        tl.store(members + slot[:, None] * GROUP + nth, key, mask=ok[:, None])
        owner = tl.load(old_owners + at, mask=old, other=-1)
        tl.store(owners + slot, tl.where(new, first_group + group, owner), mask=ok)
        tl.store(best + slot, tl.load(keys + at, mask=at >= 0, other=0), mask=ok)


GROUP = 32
"""Neighbouring latents of an example in a group of the search on a GPU: a cache line of them."""


def largest_of_batch_triton(
    x: Tensor, W_enc_rows: Tensor, bias: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The ``count`` largest positive pre-activations of a batch, in its order, and their places.

    Places are -1, and values 0, at the end where fewer are positive. They lie in the ``count``
    groups whose best members are the largest: else each of those groups has a member that is
    larger, or equal and earlier. The groups are searched chunk by chunk, their members at the end.
    """
    batch, d_sae = x.shape[0], W_enc_rows.shape[0]
    dtype = accumulator_dtype(x, W_enc_rows)
    bias = bias.to(dtype).contiguous()
    n_groups = triton.cdiv(d_sae, GROUP)
    n_kept = min(count, batch * n_groups)
    double = dtype == torch.float64
    key_type = torch.int64 if double else torch.int32
    how = {"KEY": tl.int64 if double else tl.int32, "MAX": 2 ** (63 if double else 31) - 1}
    block_g = min(triton.next_power_of_2(n_groups), 4096 // GROUP)
    best = torch.zeros(n_kept, dtype=key_type, device=x.device)
    members = torch.zeros((n_kept, GROUP), dtype=key_type, device=x.device)
    owners = torch.full((n_kept,), -1, dtype=torch.int64, device=x.device)
    rows = topk_encode.chunk_rows(max(1, batch), d_sae, dtype, x.device)
    for first in range(0, batch, rows):
        pre_acts = topk_encode.products(x[first : first + rows], W_enc_rows)
        keys = torch.empty(n_kept + len(pre_acts) * n_groups, dtype=key_type, device=x.device)
        keys[:n_kept] = best
        group_max_kernel[(len(pre_acts), triton.cdiv(n_groups, block_g))](
            pre_acts, bias, keys[n_kept:], d_sae, n_groups, pre_acts.stride(0),
            GROUP=GROUP, BLOCK_G=block_g, **how,
        )  # fmt: skip
        chosen = places_of_largest(keys, n_kept)
        old = members, owners
        members, owners, best = (torch.empty_like(t) for t in (members, owners, best))
        take_groups_kernel[(triton.cdiv(n_kept, 32),)](
            chosen, keys, *old, pre_acts, bias, members, owners, best,
            n_kept, n_groups, d_sae, first * n_groups, pre_acts.stride(0),
            GROUP=GROUP, BLOCK=32, **how,
        )  # fmt: skip
    at = places_of_largest(members.view(-1), count)
    some = at.clamp(min=0)
    values = members.view(-1)[some].view(dtype)  # a positive key has the bits of its value
    owner = owners[some // GROUP]
    row = owner.div(n_groups, rounding_mode="floor")
    places = row * d_sae + (owner - row * n_groups) * GROUP + some % GROUP
    return torch.where(at >= 0, values, 0), torch.where(at >= 0, places, -1)


def batchtopk_encode_triton(x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int) -> Encoded:
    """Library product and Triton selection."""
    batch, d_sae = x.shape[0], W_enc_rows.shape[0]
    values, places = largest_of_batch_triton(x, W_enc_rows, b_enc, batch * k)
    return filled_entries(values, places, batch, d_sae, filler=0.0, even=False)


@torch.library.custom_op("saesteer::batchtopk_encode", mutates_args=())
def batchtopk_encode_op(
    x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Latent activations and indices [batch * k], and row starts [batch + 1]."""
    if use_triton(x):
        with torch.cuda.device_of(x):  # Triton launches on the current device
            return batchtopk_encode_triton(x, W_enc_rows, b_enc, k)
    if use_native(x, W_enc_rows, b_enc):
        return batchtopk_encode_native(x, W_enc_rows, b_enc, k)
    return batchtopk_encode_torch(x, W_enc_rows, b_enc, k)


@batchtopk_encode_op.register_fake
def _(x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int | torch.SymInt) -> Encoded:
    count = x.shape[0] * k
    acts = x.new_empty((count,), dtype=accumulator_dtype(x, W_enc_rows))
    starts = x.new_empty((x.shape[0] + 1,), dtype=torch.int64)
    return acts, x.new_empty((count,), dtype=torch.int64), starts


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, W_enc_rows, b_enc, _ = inputs
    ctx.save_for_backward(x, W_enc_rows, *output)
    ctx.bias_dtype = b_enc.dtype


def _backward(ctx: Any, grad_acts: Tensor, *_: Any) -> tuple[Any, ...]:
    x, W_enc_rows, acts, indices, row_starts = ctx.saved_tensors
    grad_pre_acts = torch.where(acts > 0, grad_acts, 0)
    grad_x = grad_W_enc = grad_b_enc = None
    if ctx.needs_input_grad[0]:
        grad_x = sparse_decode_op(grad_pre_acts, indices, W_enc_rows, None, row_starts)
        grad_x = grad_x.to(x.dtype)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_W_enc, grad_b_enc, _ = sparse_row_grads_op(
            grad_pre_acts, indices, x, W_enc_rows.shape[0], row_starts
        )
        grad_W_enc = grad_W_enc.to(W_enc_rows.dtype)
        grad_b_enc = grad_b_enc.to(ctx.bias_dtype)
    return grad_x, grad_W_enc, grad_b_enc, None


batchtopk_encode_op.register_autograd(_backward, setup_context=_setup_context)
