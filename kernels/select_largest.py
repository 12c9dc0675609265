"""Where the largest of a long list of keys are, exactly, with nothing that the host has to read.

Keys are integers that order like the values they stand for; only positive ones compete. Of equal
keys the earlier come first. The search is two steps that take turns, from the highest digit of a
key to its lowest: `count_digits` counts how many of the keys that are still undecided have each
value of the digit, and `narrow` picks the digit of the key sought from those counts alone. So where
several devices hold parts of the list, their counts added up are all that they have to exchange.

Counts are integers, in whose sums the order does not matter: the result is the same at every call.
"""

from typing import no_type_check

import torch
from torch import Tensor

from saesteer.kernels.dispatch import TRITON_INSTALLED

DIGIT_BITS = 8
"""Bits of a key that one pass decides: 256 counters fit into the registers of a few warps."""

BLOCK = 2048
"""Keys that one program looks at."""

if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit
    @no_type_check
    def count_digits_kernel(
        keys,
        sought,
        digit_counts,
        n_keys,
        SHIFT: tl.constexpr,
        WIDTH: tl.constexpr,
        BLOCK: tl.constexpr,
        KEY: tl.constexpr,
    ):
        """Count the digits of BLOCK keys that agree with the key sought in all higher digits."""
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        key = tl.load(keys + at, mask=at < n_keys, other=0)
        found = tl.load(sought).to(KEY)
        undecided = key > 0
        if SHIFT + WIDTH < KEY.primitive_bitwidth - 1:
            higher: tl.constexpr = SHIFT + WIDTH
            undecided = undecided & ((key >> higher) == (found >> higher))
        digit = ((key >> SHIFT) & ((1 << WIDTH) - 1)).to(tl.int32)
        counts = tl.histogram(digit, 1 << WIDTH, mask=undecided)
        bins = tl.arange(0, 1 << WIDTH)
        tl.atomic_add(digit_counts + bins, counts, mask=counts > 0)

    @triton.jit
    @no_type_check
    def narrow_kernel(digit_counts, sought, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
        """The digit of the count-th largest key, and how many are wanted of those that have it."""
        bins = tl.arange(0, 1 << WIDTH)
        counts = tl.load(digit_counts + bins).to(tl.int64)
        reach = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
        wanted = tl.load(sought + 1)
        # Digit 0 also where fewer keys than wanted are positive: the key sought is then 0.
        digit = tl.max(tl.where(reach >= wanted, bins, 0), axis=0)
        above = tl.sum(tl.where(bins > digit, counts, 0), axis=0)
        tl.store(sought, tl.load(sought) + (digit.to(tl.int64) << SHIFT))
        tl.store(sought + 1, wanted - above)

    @triton.jit
    @no_type_check
    def _sorted_out(keys, sought, n_keys, BLOCK: tl.constexpr, KEY: tl.constexpr):
        """Where a program's keys are, which are above the key sought, and which are equal to it."""
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        key = tl.load(keys + at, mask=at < n_keys, other=0)
        found = tl.load(sought).to(KEY)
        return at, (key > found).to(tl.int32), ((key == found) & (key > 0)).to(tl.int32)

    @triton.jit
    @no_type_check
    def count_kept_kernel(
        keys, sought, block_counts, n_keys, n_blocks, BLOCK: tl.constexpr, KEY: tl.constexpr
    ):
        """How many keys of a block are above the key sought, and how many equal to it."""
        _, above, equal = _sorted_out(keys, sought, n_keys, BLOCK, KEY)
        at = block_counts + tl.program_id(0)
        tl.store(at, tl.sum(above, axis=0).to(tl.int64))
        tl.store(at + n_blocks, tl.sum(equal, axis=0).to(tl.int64))

    @triton.jit
    @no_type_check
    def list_kept_kernel(
        keys, sought, block_ends, places, n_keys, n_blocks, BLOCK: tl.constexpr, KEY: tl.constexpr
    ):
        """Write the places of the keys above, and of the first equal ones, in their order."""
        at, above, equal = _sorted_out(keys, sought, n_keys, BLOCK, KEY)
        wanted = tl.load(sought + 1)
        ends = block_ends + tl.program_id(0)
        above_before = tl.load(ends) - tl.sum(above, axis=0)
        equal_before = tl.load(ends + n_blocks) - tl.sum(equal, axis=0)
        nth = equal_before + tl.cumsum(equal, axis=0)
        kept = ((above != 0) | ((equal != 0) & (nth <= wanted))).to(tl.int32)
        start = above_before + tl.minimum(equal_before, wanted)
        tl.store(places + start + tl.cumsum(kept, axis=0) - 1, at, mask=kept != 0)


def count_digits(keys: Tensor, sought: Tensor, shift: int, width: int) -> Tensor:
    """Counts [2**width] int32 of a digit among the keys that ``sought`` has not decided yet."""
    counts = torch.zeros(1 << width, dtype=torch.int32, device=keys.device)
    kind = tl.int64 if keys.dtype == torch.int64 else tl.int32
    grid = (triton.cdiv(keys.numel(), BLOCK),)
    count_digits_kernel[grid](
        keys, sought, counts, keys.numel(), SHIFT=shift, WIDTH=width, BLOCK=BLOCK, KEY=kind
    )
    return counts


def narrow(counts: Tensor, sought: Tensor, shift: int, width: int) -> None:
    """Decide a digit of ``sought`` from the counts of all keys, wherever they are."""
    narrow_kernel[(1,)](counts, sought, SHIFT=shift, WIDTH=width)


def start_search(count: int, device: torch.device) -> Tensor:
    """What the search knows [2] int64: the key so far, and how many with its digits are wanted."""
    sought = torch.zeros(2, dtype=torch.int64, device=device)
    sought[1].fill_(count)
    return sought


def kth_largest(keys: Tensor, count: int) -> Tensor:
    """The count-th largest positive key, or 0, and how many keys equal to it are among those."""
    sought = start_search(count, keys.device)
    top = 8 * keys.element_size() - 1  # no sign
    while top > 0:
        width = min(DIGIT_BITS, top)
        top -= width
        narrow(count_digits(keys, sought, top, width), sought, top, width)
    return sought


def places_of_largest(keys: Tensor, count: int) -> Tensor:
    """Ascending places [count] int64 of the ``count`` largest positive ``keys`` [n] int32 or int64.

    -1 at the end where fewer are positive.
    """
    places = torch.full((count,), -1, dtype=torch.int64, device=keys.device)
    if not count or not keys.numel():
        return places
    sought = kth_largest(keys, count)
    n_blocks = triton.cdiv(keys.numel(), BLOCK)
    counts = torch.empty((2, n_blocks), dtype=torch.int64, device=keys.device)
    how = {"BLOCK": BLOCK, "KEY": tl.int64 if keys.dtype == torch.int64 else tl.int32}
    count_kept_kernel[(n_blocks,)](keys, sought, counts, keys.numel(), n_blocks, **how)
    ends = counts.cumsum(1)
    list_kept_kernel[(n_blocks,)](keys, sought, ends, places, keys.numel(), n_blocks, **how)
    return places
