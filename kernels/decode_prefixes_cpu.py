"""Nested decodes, errors and entry gradients of one example at a time, as a compiled CPU loop.

The small helpers stand again in every file of loops: stored code is made anew when its own file
changes, not when another one does.
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


@loop(reorder=True, cache=True)
@no_type_check
def decode_prefixes_rows(
    acts, indices, starts, W_dec, b_dec, target, squared, last_error, suffix, act_grads, first, last
):
    """Examples first..last-1. The gathered rows are still in the cache at their second use."""
    levels = suffix.shape[1]
    for row in range(first, last):
        for i in range(b_dec.shape[0]):
            suffix[row, 0, i] = b_dec[i] - target[row, i]
        for level in range(levels):
            line = suffix[row, level]
            if level > 0:
                line[:] = suffix[row, level - 1]
            piece = row * levels + level
            for at in range(starts[piece], starts[piece + 1]):
                if acts[at] != 0:
                    _add_scaled(line, W_dec[indices[at]], acts[at])
            squared[row, level] = _dot(line, line)
        last_error[row, :] = suffix[row, levels - 1]
        for level in range(levels - 1, -1, -1):
            line = suffix[row, level]
            if level < levels - 1:
                _add_scaled(line, suffix[row, level + 1], np.float32(1))
            piece = row * levels + level
            for at in range(starts[piece], starts[piece + 1]):
                act_grads[at] = _dot(line, W_dec[indices[at]])
