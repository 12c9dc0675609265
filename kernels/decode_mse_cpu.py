"""Decode, error and slot gradients of one example at a time, as a compiled CPU loop.

The small helpers are repeated in every file of loops on purpose: numba compiles its cached code
again when that file changes, but not when a file that it imports does.
"""

from typing import no_type_check

import numpy as np

from saesteer.kernels.native import loop


@loop(reorder=True)
@no_type_check
def _add_scaled(out, row, factor):
    for i in range(out.shape[0]):
        out[i] += factor * row[i]


@loop(reorder=True)
@no_type_check
def _dot(a, b):
    total = np.float32(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@loop(reorder=True)
@no_type_check
def _subtract(out, target):
    """out -= target; returns the squared length of the difference."""
    square = np.float32(0)
    for i in range(out.shape[0]):
        out[i] -= target[i]
        square += out[i] * out[i]
    return square


@loop(reorder=True, cache=True)
@no_type_check
def decode_mse_rows(
    acts, indices, row_starts, W_dec, b_dec, target, squared_error, error, act_grads, first, last
):
    """Examples first..last-1. The gathered rows are still in the cache at their second use."""
    for row in range(first, last):
        line = error[row]
        line[:] = b_dec
        for at in range(row_starts[row], row_starts[row + 1]):
            if acts[at] != 0:
                _add_scaled(line, W_dec[indices[at]], acts[at])
        squared_error[row] = _subtract(line, target[row])
        for at in range(row_starts[row], row_starts[row + 1]):
            act_grads[at] = _dot(line, W_dec[indices[at]])
