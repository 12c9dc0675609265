"""What of a chunk of pre-activations lies above a floor, as compiled CPU loops."""

from typing import no_type_check

import numpy as np

from saesteer.kernels.native import loop

_BLOCK = 64
"""Columns that are counted together; where none is above the floor they are not looked at again."""

# As in `topk_encode_cpu`, which says why small things stand in every file of loops.
_STORE = np.float32(0.00205)
_ROUND = np.float32(2.0**-22)
_TINY = np.float32(1e-30)
_MORE = np.float32(1.001)


@loop()
@no_type_check
def _count(line, bias, floor):
    """NaN is above nothing."""
    count = np.int32(0)
    for i in range(line.shape[0]):
        count += np.int32(np.float32(line[i] + bias[i]) > floor)
    return count


@loop(cache=True)
@no_type_check
def count_above(pre_acts, bias, floor, counts, first, last):
    """How many of ``pre_acts[r] + bias`` are above ``floor``, for rows first..last-1."""
    for row in range(first, last):
        counts[row] = _count(pre_acts[row], bias, floor)


@loop(cache=True)
@no_type_check
def take_above(pre_acts, bias, floor, starts, offset, values, places, first, last):
    """Those values into ``values[starts[r]:starts[r + 1]]``, and their places.

    A place counts through all rows of the batch, of which row 0 here is row ``offset``.
    """
    width = pre_acts.shape[1]
    for row in range(first, last):
        line = pre_acts[row]
        at = starts[row]
        base = (row + offset) * width
        for start in range(0, width, _BLOCK):
            stop = min(start + _BLOCK, width)
            if _count(line[start:stop], bias[start:stop], floor):
                for i in range(start, stop):
                    value = np.float32(line[i] + bias[i])
                    if value > floor:
                        values[at] = value
                        places[at] = base + i
                        at += 1


@loop()
@no_type_check
def _ruled_out(bits, bias, scale, x_size, floor):
    """Whether a pre-activation is surely not above the floor; never where it is not finite."""
    p = np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)
    value = p + bias
    slack = x_size * scale + _STORE * abs(p) + _ROUND * abs(value) + _TINY
    return np.float32(value + slack * _MORE) < floor


@loop()
@no_type_check
def _count_possible(line, bias, error_scales, x_size, floor):
    count = np.int32(line.shape[0])
    for i in range(line.shape[0]):
        count -= np.int32(_ruled_out(line[i], bias[i], error_scales[i], x_size, floor))
    return count


@loop(cache=True)
@no_type_check
def count_possible(product, x_sizes, error_scales, bias, floor, counts, first, last):
    """How many pre-activations of rows first..last-1 may be above ``floor``.

    ``product`` holds bfloat16 products as uint16 bits; ``x_sizes[r] * error_scales[f]`` bounds the
    error of one before it was stored.
    """
    for row in range(first, last):
        counts[row] = _count_possible(product[row], bias, error_scales, x_sizes[row], floor)


@loop(reorder=True)
@no_type_check
def _four_dots(x, a, b, c, d):
    """Dot products with four rows at once: they are loaded from memory in parallel."""
    s, t, u, v = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for i in range(x.shape[0]):
        s += x[i] * a[i]
        t += x[i] * b[i]
        u += x[i] * c[i]
        v += x[i] * d[i]
    return s, t, u, v


@loop(cache=True)
@no_type_check
def take_possible(
    product, x, x_sizes, W_enc_rows, error_scales, bias, floor, starts, offset, values, places,
    first, last,
):  # fmt: skip
    """The float32 values and the places of what `count_possible` has counted, as `take_above`."""
    width = product.shape[1]
    columns = np.empty(width + 3, np.int64)
    for row in range(first, last):
        line = product[row]
        x_size = x_sizes[row]
        count = 0
        for start in range(0, width, _BLOCK):
            stop = min(start + _BLOCK, width)
            if _count_possible(
                line[start:stop], bias[start:stop], error_scales[start:stop], x_size, floor
            ):
                for i in range(start, stop):
                    if not _ruled_out(line[i], bias[i], error_scales[i], x_size, floor):
                        columns[count] = i
                        count += 1
        columns[count : count + 3] = 0
        at = starts[row]
        base = (row + offset) * width
        for i in range(0, count, 4):
            a, b, c, d = columns[i], columns[i + 1], columns[i + 2], columns[i + 3]
            dots = _four_dots(x[row], W_enc_rows[a], W_enc_rows[b], W_enc_rows[c], W_enc_rows[d])
            for j in range(min(4, count - i)):
                f = columns[i + j]
                values[at + i + j] = np.float32(dots[j] + bias[f])
                places[at + i + j] = base + f
