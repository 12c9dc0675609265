"""What of a batch's pre-activations lies above a floor, chunk by chunk on the CPU, in float32.

The product of a chunk is in float32, or of rounded operands (`saesteer.kernels.near_products`) that
rule out most pre-activations: what may be above the floor is then multiplied in float32. Either way
the same is found, up to the rounding of float32 sums.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saesteer.kernels import topk_encode
from saesteer.kernels.native import even_bounds, parts_of, run_parts, scratch
from saesteer.kernels.near_products import NearOperands, near_operands, they_pay

MOST_POSSIBLE = 1 / 16
"""Share of a chunk's pre-activations that rounded products may leave over; with more, the float32
product of the whole chunk is faster."""


@dataclass(frozen=True)
class Chunk:
    """Some rows of a batch, and their product with the encoder in float32 or bfloat16."""

    rows: slice
    x: Tensor
    W_enc_rows: Tensor
    bias: Tensor
    product: Tensor
    near: NearOperands | None
    """Of the whole batch; None where the product is in float32."""

    def sample(self, n_rows: int) -> Tensor:
        """Pre-activations of about so many rows, spread over the chunk; perhaps rounded."""
        return self.product[:: -(-len(self.product) // n_rows)] + self.bias

    def above(self, floor: Any) -> tuple[Any, Any, Any]:
        """Pre-activations above ``floor`` (float32), their places in the batch, row starts."""
        from saesteer.kernels import above_floor_cpu as loops

        n_rows, d_sae = self.product.shape
        bounds = even_bounds(n_rows, parts_of(n_rows, 8))
        starts = np.zeros(n_rows + 1, np.int64)
        product, bias = self.product, self.bias.numpy()
        if self.near is not None:
            bits, sizes = product.view(torch.uint16).numpy(), self.near.x_sizes[self.rows]
            scales = self.near.error_scales
            run_parts(loops.count_possible, bounds, bits, sizes, scales, bias, floor, starts[1:])
            if starts.sum() <= MOST_POSSIBLE * n_rows * d_sae:
                np.cumsum(starts, out=starts)
                values, places = np.empty(starts[-1], np.float32), np.empty(starts[-1], np.int64)
                run_parts(
                    loops.take_possible, bounds, bits, self.x[self.rows].numpy(), sizes,
                    self.W_enc_rows.numpy(), scales, bias, floor, starts, self.rows.start,
                    values, places,
                )  # fmt: skip
                kept = values > floor
                starts = np.concatenate([[0], kept.cumsum()])[starts]
                return values[kept], places[kept], starts
            starts[:] = 0
            product = torch.mm(self.x[self.rows], self.W_enc_rows.t())
        run_parts(loops.count_above, bounds, product.numpy(), bias, floor, starts[1:])
        np.cumsum(starts, out=starts)
        values, places = np.empty(starts[-1], np.float32), np.empty(starts[-1], np.int64)
        run_parts(
            loops.take_above, bounds, product.numpy(), bias, floor, starts, self.rows.start,
            values, places,
        )  # fmt: skip
        return values, places, starts


def chunks(x: Tensor, W_enc_rows: Tensor, bias: Tensor, wanted: int) -> Iterator[Chunk]:
    """The chunks of a batch of which about ``wanted`` latents an example will be asked for.

    Operands are contiguous float32. A chunk is good until the next is made: they share memory.
    """
    batch, d_sae = len(x), len(W_enc_rows)
    near = near_operands(x, W_enc_rows) if they_pay(x, d_sae, wanted) else None
    dtype = torch.float32 if near is None else torch.bfloat16
    size = topk_encode.chunk_rows(max(1, batch), d_sae, dtype, x.device)
    buffer = scratch((size, d_sae), dtype)
    for first in range(0, batch, size):
        rows = slice(first, min(first + size, batch))
        product = buffer[: rows.stop - first]
        a, b = (x, W_enc_rows) if near is None else (near.x, near.W)
        torch.mm(a[rows], b.t(), out=product)
        yield Chunk(rows, x, W_enc_rows, bias, product, near)
