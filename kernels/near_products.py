"""Products of rounded operands that bound the true ones, where a CPU multiplies bfloat16 fast.

With x = x^ + dx and w = w^ + dw (the hats are bfloat16), and p the product of the hats,

    |<x, w> - p| <= |dx| |w^| + |x| |dw| + rounding of the sums and of p        (Cauchy-Schwarz),

all of it known before any other product is taken. So p, which cannot rank pre-activations, can say
which of them are below something; the rest, few, are multiplied in float32. What comes out is what
float32 products alone would select.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saesteer.kernels.native import even_bounds, parts_of, run_parts

LEAST_ROWS = 128
"""Smallest batch for which it pays to round both operands."""

LEAST_WIDTH = 64
"""Smallest d_model for it."""


@cache
def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices many times as fast as float32 (AMX)."""
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return bool(has_tiles()) and torch.backends.mkldnn.is_available()


def they_pay(x: Tensor, d_sae: int, wanted: int) -> bool:
    """Whether rounded products are worth while where ``wanted`` latents an example are kept."""
    few = d_sae >= 16 * wanted
    return fast_bfloat16() and few and len(x) >= LEAST_ROWS and x.shape[1] >= LEAST_WIDTH


class NearOperands(NamedTuple):
    """Rounded operands. ``x_sizes[b] * error_scales[f]`` bounds the error of their product, before
    it is stored in bfloat16."""

    x: Tensor
    """`[batch, d_model]` bfloat16."""
    W: Tensor
    """`[d_sae, d_model]` bfloat16."""
    x_sizes: Any
    """`[batch]` numpy float32."""
    error_scales: Any
    """`[d_sae]` numpy float32."""


def near_operands(x: Tensor, W_enc_rows: Tensor) -> NearOperands:
    """Round both operands, contiguous float32, and bound what that changes."""
    import numpy as np

    from saesteer.kernels.topk_encode_cpu import round_rows

    def rounded(matrix: Tensor) -> tuple[Tensor, Any, Any]:
        near = matrix.new_empty(matrix.shape, dtype=torch.bfloat16)
        norms, errors = matrix.new_empty(len(matrix)).numpy(), matrix.new_empty(len(matrix)).numpy()
        bounds = even_bounds(len(matrix), parts_of(len(matrix), 64))
        bits = near.view(torch.uint16).numpy()
        run_parts(round_rows, bounds, matrix.numpy(), bits, norms, errors)
        return near, norms, errors

    W_near, W_norms, W_errors = rounded(W_enc_rows)
    x_near, x_norms, x_errors = rounded(x)
    # |<x, w> - <x^, w^>| <= |dx| |w^| + |x| |dw| <= |x| (worst |w^| + |dw|), plus the rounding of
    # two sums of d_model products in any order. The factors cover the rounding of these lines.
    x_sizes = (x_norms + x_errors) * 1.001
    with np.errstate(invalid="ignore"):  # rows that are not finite have sizes that are not
        relative = x_errors / np.maximum(x_sizes, 1e-30)
    worst = float(np.max(relative, initial=0.0, where=np.isfinite(relative)))
    summing = 2.2 * (x.shape[1] + 8) * 2.0**-24
    error_scales = ((worst + summing) * W_norms + (1 + summing) * W_errors) * 1.001
    return NearOperands(x_near, W_near, x_sizes, error_scales)
