"""TopK selection as compiled CPU loops, and a faster product that stays exact.

`saesteer.kernels.near_products` has the products that bound others. Let L be the k-th largest lower
bound of a row. A latent whose upper bound is below L has k latents above it, so the top k are among
the others: a few more than k, and only those are multiplied in float32. Rows where that leaves too
many latents (ties, zero rows) or where something is not finite are handed back and done in float32
throughout.
"""

from typing import no_type_check

import numpy as np

from saesteer.kernels.native import loop

SPAN = 16
"""Most columns in a group of the search."""

# Half the distance of two neighbouring bfloat16 numbers over their size, with a small margin.
_STORE = np.float32(0.00205)
_ROUND = np.float32(2.0**-22)
_TINY = np.float32(1e-30)
_EXPONENT = np.int32(0x7F800000)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_LEAST = np.int32(-(2**31))


@loop()
@no_type_check
def _threshold(keys, count, k):
    """A key that the k largest of the first ``count`` reach, and no others but equals of the k-th.

    Found bit by bit; the search ends as soon as exactly k reach it. The least int32 if count < k.
    """
    if k > count:
        return _LEAST
    reached = 0
    for i in range(count):
        reached += keys[i] >= 0
    kth = np.int32(0) if reached >= k else _LEAST
    for step in range(31):
        higher = np.int32(kth + np.int32(1 << (30 - step)))
        reached = 0
        for i in range(count):
            reached += keys[i] >= higher
        if reached >= k:
            kth = higher
            if reached == k:
                break
    return kth


@loop()
@no_type_check
def _key(value):
    """An int32 that orders like the float; NaN as 0, and both zeros alike."""
    value = value if value == value else np.float32(0)
    bits = np.float32(value + np.float32(0)).view(np.int32)
    return np.int32(bits ^ ((bits >> np.int32(31)) & _MAGNITUDE))


@loop()
@no_type_check
def _value(key):
    """The float of a `_key`."""
    return np.int32(key ^ ((key >> np.int32(31)) & _MAGNITUDE)).view(np.float32)


@loop()
@no_type_check
def _keep_first(keys, columns, count, k, acts, indices):
    """Store the k largest candidates, the first of equal ones; they are sorted by column."""
    kth = _threshold(keys, count, k)
    room = k
    for i in range(count):
        room -= keys[i] > kth
    place = 0
    for i in range(count):
        take = keys[i] > kth
        if not take and keys[i] == kth and room > 0:
            take = True
            room -= 1
        if take:
            value = _value(keys[i])
            acts[place] = value if value > 0 else np.float32(0)
            indices[place] = columns[i]
            place += 1


@loop()
@no_type_check
def _span_best(line, bias, best):
    for g in range(line.shape[0]):
        best[g] = max(best[g], _key(line[g] + bias[g]))


@loop(cache=True)
@no_type_check
def select_rows(pre_acts, bias, k, span, acts, indices, first, last):
    """relu of the k largest of ``pre_acts[r] + bias``, for rows first..last-1.

    Group g holds the columns g, g + groups, g + 2 groups, ...; only the groups whose maximum
    reaches the k-th largest maximum can hold one of the k.
    """
    width = pre_acts.shape[1]
    groups = (width + span - 1) // span
    best = np.empty(groups, np.int32)
    chosen = np.empty(groups, np.int64)
    keys = np.empty(width, np.int32)
    columns = np.empty(width, np.int64)
    for row in range(first, last):
        line = pre_acts[row]
        best[:] = _LEAST
        for start in range(0, width, groups):
            stop = min(start + groups, width)
            # Slices, so that the compiler sees neighbouring elements and no index that could wrap.
            _span_best(line[start:stop], bias[start:stop], best)
        floor = _threshold(best, groups, k)
        n_chosen = 0
        for g in range(groups):
            if best[g] >= floor:
                chosen[n_chosen] = g
                n_chosen += 1
        count = 0
        for start in range(0, width, groups):
            for c in range(n_chosen):
                column = start + chosen[c]
                if column < width:
                    key = _key(line[column] + bias[column])
                    if key >= floor:
                        keys[count] = key
                        columns[count] = column
                        count += 1
        _keep_first(keys, columns, count, k, acts[row], indices[row])


@loop(cache=True)
@no_type_check
def keep_largest_rows(pre_acts, k, first, last):
    """Zero all but the k largest positive entries of each row; of equals the lower columns stay."""
    width = pre_acts.shape[1]
    keys = np.empty(width, np.int32)
    for row in range(first, last):
        line = pre_acts[row]
        positive = 0
        for i in range(width):
            keys[i] = _key(line[i])
            positive += keys[i] > 0
        kth = np.int32(0)
        if positive > k:
            kth = _threshold(keys, width, k)
        room = k
        for i in range(width):
            room -= keys[i] > kth
        for i in range(width):
            take = keys[i] > kth
            if not take and kth > 0 and keys[i] == kth and room > 0:
                take = True
                room -= 1
            if not take:
                line[i] = np.float32(0)


@loop(reorder=True, cache=True)
@no_type_check
def round_rows(rows, rounded, norms, errors, first, last):
    """bfloat16 bits of each row, the length of the rounded row, and that of the rounding error."""
    width = rows.shape[1]
    for row in range(first, last):
        square = np.float32(0)
        error_square = np.float32(0)
        for i in range(width):
            value = rows[row, i]
            bits = np.float32(value).view(np.uint32)
            # Round to nearest, ties to even; a carry into the exponent is what rounding up means.
            bits = (
                bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            ) >> np.uint32(16)
            near = np.uint32(bits << np.uint32(16)).view(np.float32)
            rounded[row, i] = np.uint16(bits)
            square += near * near
            difference = value - near
            error_square += difference * difference
        norms[row] = np.sqrt(square)
        errors[row] = np.sqrt(error_square)


@loop(reorder=True)
@no_type_check
def _dot(a, b):
    total = np.float32(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@loop(reorder=True)
@no_type_check
def _span_bounds(line, bias, error_scales, x_size, lower, upper):
    not_finite = np.int32(0)
    for g in range(line.shape[0]):
        p = np.uint32(np.uint32(line[g]) << np.uint32(16)).view(np.float32)
        value = p + bias[g]
        slack = x_size * error_scales[g] + _STORE * abs(p) + _ROUND * abs(value) + _TINY
        high = np.float32(value + slack)
        low = np.float32(value - slack)
        not_finite |= np.int32((high.view(np.int32) & _EXPONENT) == _EXPONENT)
        lower[g] = low if low > lower[g] else lower[g]
        upper[g] = high if high > upper[g] else upper[g]
    return not_finite


@loop()
@no_type_check
def _bounds(line, bias, error_scales, x_size, groups, lower, upper):
    """Per group the largest lower and upper bound; True if a pre-activation is not finite."""
    width = line.shape[0]
    not_finite = np.int32(0)
    lower[:] = np.float32(-np.inf)
    upper[:] = np.float32(-np.inf)
    for start in range(0, width, groups):
        stop = min(start + groups, width)
        not_finite |= _span_bounds(
            line[start:stop], bias[start:stop], error_scales[start:stop], x_size, lower, upper
        )
    return not_finite != 0


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
def select_certain_rows(
    product,
    x,
    x_sizes,
    W_enc_rows,
    error_scales,
    bias,
    k,
    span,
    most,
    acts,
    indices,
    undecided,
    first,
    last,
):
    """As `select_rows`, from bfloat16 products (as uint16 bits) and the float32 operands.

    ``x_sizes[r] * error_scales[f]`` bounds the error of a product before it was stored. Rows with
    more than ``most`` candidates, or with values that are not finite, are only marked in
    ``undecided``.
    """
    width = W_enc_rows.shape[0]
    groups = (width + span - 1) // span
    lower = np.empty(groups, np.float32)
    upper = np.empty(groups, np.float32)
    best = np.empty(groups, np.int32)
    chosen = np.empty(groups, np.int64)
    keys = np.empty(most + 3, np.int32)
    columns = np.empty(most + 3, np.int64)
    for row in range(first, last):
        line = product[row]
        x_size = x_sizes[row]
        if _bounds(line, bias, error_scales, x_size, groups, lower, upper):
            undecided[row] = True
            continue
        for g in range(groups):
            best[g] = _key(lower[g])
        kth = _threshold(best, groups, k)
        floor = np.float32(-np.inf) if kth == _LEAST else _value(kth)
        n_chosen = 0
        for g in range(groups):
            if upper[g] >= floor:
                chosen[n_chosen] = g
                n_chosen += 1
        count = 0
        for start in range(0, width, groups):
            for c in range(n_chosen):
                f = start + chosen[c]
                if f < width and count <= most:
                    p = np.uint32(np.uint32(line[f]) << np.uint32(16)).view(np.float32)
                    value = p + bias[f]
                    slack = x_size * error_scales[f] + _STORE * abs(p) + _ROUND * abs(value) + _TINY
                    # A little more than in `_bounds`, whose sums may be rounded differently.
                    if value + slack * np.float32(1.001) >= floor:
                        if count < most:
                            columns[count] = f
                        count += 1
        if count > most:
            undecided[row] = True
            continue
        columns[count : count + 3] = 0
        line = x[row]
        for i in range(0, count, 4):
            a, b, c, d = columns[i], columns[i + 1], columns[i + 2], columns[i + 3]
            s, t, u, v = _four_dots(
                line, W_enc_rows[a], W_enc_rows[b], W_enc_rows[c], W_enc_rows[d]
            )
            keys[i] = _key(s + bias[a])
            keys[i + 1] = _key(t + bias[b])
            keys[i + 2] = _key(u + bias[c])
            keys[i + 3] = _key(v + bias[d])
        _keep_first(keys, columns, count, k, acts[row], indices[row])
