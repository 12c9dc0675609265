"""What of a chunk of pre-activations lies above a floor, as compiled CPU loops."""

from typing import no_type_check

import numpy as np

from saesteer.kernels.native import loop

_BLOCK = 64
"""Columns that are counted together; where none is above the floor they are not looked at again."""


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
