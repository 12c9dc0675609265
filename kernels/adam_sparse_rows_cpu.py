"""The optimiser step of a weight matrix as a compiled CPU loop that never stores the gradient.

A row's gradient is the sum of a few rows of the batch. It is computed and used while it is in the
cache: the matrix-sized gradient is neither written nor read.
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
def _along(grad, row):
    """The dot products of ``row`` with itself and with ``grad``."""
    square = np.float32(0)
    along = np.float32(0)
    for i in range(row.shape[0]):
        square += row[i] * row[i]
        along += grad[i] * row[i]
    return square, along


@loop(reorder=True)
@no_type_check
def _adam(row, grad, along, exp_avg, exp_avg_sq, rate, decay1, beta2, decay2, root, eps):
    """One step on one row; returns its squared length after it."""
    square = np.float32(0)
    for i in range(row.shape[0]):
        g = grad[i] - along * row[i]
        mean = exp_avg[i] + (g - exp_avg[i]) * decay1
        second = exp_avg_sq[i] * beta2 + g * g * decay2
        exp_avg[i] = mean
        exp_avg_sq[i] = second
        value = row[i] - rate * mean / (np.sqrt(second) / root + eps)
        row[i] = value
        square += value * value
    return square


@loop(reorder=True)
@no_type_check
def _scale(row, factor):
    for i in range(row.shape[0]):
        row[i] *= factor


@loop(cache=True)
@no_type_check
def adam_sparse_rows(
    param,
    exp_avg,
    exp_avg_sq,
    weights,
    rows,
    order,
    starts,
    ragged,
    examples,
    k,
    pieces,
    factor,
    rate,
    decay1,
    beta2,
    decay2,
    root,
    eps,
    unit_rows,
    extra,
    extra_at,
    sums,
    counts,
    first,
    last,
):
    """Latents first..last-1: sum their entries in order, take the step, store sums and counts.

    An entry's example is ``entry // k``, or where entries are ragged ``examples[entry]``; of its
    row there is one for ``pieces`` examples.
    ``extra_at[f]`` is the row of ``extra`` to add to latent f's gradient, or -1.
    """
    grad = np.empty(param.shape[1], np.float32)
    for f in range(first, last):
        grad[:] = np.float32(0)
        total = np.float32(0)
        hits = 0
        for at in range(starts[f], starts[f + 1]):
            entry = order[at]
            weight = weights[entry]
            if weight != 0:
                hits += 1
                total += weight
                example = examples[entry] if ragged else entry // k
                _add_scaled(grad, rows[example // pieces], factor * weight)
        if extra_at[f] >= 0:
            _add_scaled(grad, extra[extra_at[f]], np.float32(1))
        sums[f] = factor * total
        counts[f] = hits
        along = np.float32(0)
        was_nonzero = True
        if unit_rows:
            square, along = _along(grad, param[f])
            was_nonzero = square > 0
        square = _adam(
            param[f],
            grad,
            along,
            exp_avg[f],
            exp_avg_sq[f],
            rate,
            decay1,
            beta2,
            decay2,
            root,
            eps,
        )
        if unit_rows:
            if was_nonzero and square > 0:
                _scale(param[f], np.float32(1) / np.sqrt(square))
            else:
                param[f, :] = np.float32(0)
