"""Pre-activations above a floor of their latent's own, as ragged entries.

``pre_acts = x @ W_enc_rows.T + b_enc``, and of them those with ``pre_acts[b, f] > floors[f]``, by
example and latent. NaN is above nothing. The dense pre-activations exist for a chunk of rows at a
time.

How many there are only the device knows, and the host has to wait for it, unless it says itself how
many entries there shall be. Then what lacks are fillers: pairs that are not above, of value -inf,
spread over the examples. Where more are above, those stay that are furthest above their floors (the
batch-wide selection of `batchtopk_encode`), so memory and work are bounded and nobody waits.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from saesteer.kernels import topk_encode
from saesteer.kernels.above_floor import chunks
from saesteer.kernels.batchtopk_encode import largest_of_batch_triton
from saesteer.kernels.dispatch import accumulator_dtype, use_triton
from saesteer.kernels.entries import examples_of, filled_entries
from saesteer.kernels.native import use_native

Encoded = tuple[Tensor, Tensor, Tensor]


def threshold_encode_reference(
    x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, floors: Tensor
) -> Encoded:
    """What the op means, in dense PyTorch. For tests and benchmarks."""
    pre_acts = x @ W_enc_rows.t() + b_enc
    above = pre_acts > floors
    places = above.flatten().nonzero()[:, 0]
    bounds = torch.arange(len(x) + 1, device=x.device) * len(W_enc_rows)
    return pre_acts[above], places % len(W_enc_rows), torch.searchsorted(places, bounds)


def at_capacity(entries: Encoded, floors: Tensor, capacity: int) -> Encoded:
    """The ``capacity`` entries furthest above their floors, or all and fillers up to so many."""
    values, indices, row_starts = entries
    batch, d_sae = len(row_starts) - 1, len(floors)
    places = examples_of(len(indices), row_starts) * d_sae + indices
    if len(values) > capacity:
        margins = values - floors[indices]
        furthest = margins.sort(descending=True, stable=True).indices[:capacity].sort().values
        values, places = values[furthest], places[furthest]
    lacking = capacity - len(values)
    return filled_entries(
        torch.cat([values, values.new_zeros(lacking)]),
        torch.cat([places, places.new_full((lacking,), -1)]),
        batch, d_sae, filler=-torch.inf, even=True,
    )  # fmt: skip


def threshold_encode_torch(x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, floors: Tensor) -> Encoded:
    """PyTorch twin, and what runs on a GPU where the number of entries is not given."""
    dtype = accumulator_dtype(x, W_enc_rows)
    b_enc = b_enc.to(dtype)
    rows = topk_encode.chunk_rows(max(1, len(x)), len(W_enc_rows), dtype, x.device)
    values = [x.new_empty((0,), dtype=dtype)]
    indices = [torch.empty(0, dtype=torch.int64, device=x.device)]
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device)]
    for part in x.split(rows):
        pre_acts = topk_encode.products(part, W_enc_rows).add_(b_enc)
        above = pre_acts > floors
        values.append(pre_acts[above])
        indices.append(above.nonzero()[:, 1])
        counts.append(above.sum(1))
    return torch.cat(values), torch.cat(indices), torch.cat(counts).cumsum(0)


def threshold_encode_native(
    x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, floors: Tensor
) -> Encoded:
    """Compiled CPU loops, for float32."""
    d_sae, zero = len(W_enc_rows), np.float32(0)
    x, W_enc_rows, lowered = x.contiguous(), W_enc_rows.contiguous(), (b_enc - floors).contiguous()
    values, places = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
    counts = [np.zeros(1, np.int64)]
    for chunk in chunks(x, W_enc_rows, lowered, 0):
        above, where, starts = chunk.above(zero)
        values.append(above)
        places.append(where % d_sae)
        counts.append(np.diff(starts))
    indices = torch.from_numpy(np.concatenate(places))
    row_starts = torch.from_numpy(np.concatenate(counts).cumsum())
    return torch.from_numpy(np.concatenate(values)) + floors[indices], indices, row_starts


def threshold_encode_triton(
    x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, floors: Tensor, capacity: int
) -> Encoded:
    """Library product and Triton selection of so many entries, for which no host waits."""
    dtype = accumulator_dtype(x, W_enc_rows)
    floors = floors.to(dtype)
    margins, places = largest_of_batch_triton(x, W_enc_rows, b_enc.to(dtype) - floors, capacity)
    d_sae = len(floors)
    values = margins + floors[places.clamp(min=0) % d_sae]
    return filled_entries(values, places, len(x), d_sae, filler=-torch.inf, even=True)


@torch.library.custom_op("saesteer::threshold_encode", mutates_args=())
def threshold_encode_op(
    x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, floors: Tensor, capacity: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-activations and latents [entries], and row starts [batch + 1]. Not differentiable."""
    if capacity is not None and use_triton(x):
        with torch.cuda.device_of(x):  # Triton launches on the current device
            return threshold_encode_triton(x, W_enc_rows, b_enc, floors, capacity)
    native = use_native(x, W_enc_rows, b_enc, floors)
    run: Any = threshold_encode_native if native else threshold_encode_torch
    found: Encoded = run(x, W_enc_rows, b_enc, floors)
    return found if capacity is None else at_capacity(found, floors, capacity)


@threshold_encode_op.register_fake
def _(
    x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, floors: Tensor, capacity: int | None = None
) -> Encoded:
    count = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    values = x.new_empty((count,), dtype=accumulator_dtype(x, W_enc_rows))
    starts = x.new_empty((x.shape[0] + 1,), dtype=torch.int64)
    return values, x.new_empty((count,), dtype=torch.int64), starts
