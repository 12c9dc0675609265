"""The choice of the largest pre-activations, where other processes have some of them.

Exact: the same entries as in one process. Of equal ones the first in the order of the processes'
parts, then of examples and latents.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.sae.training.mesh.across import Across

Entries = tuple[Float[Tensor, " entries"], Int[Tensor, " entries"], Int[Tensor, " starts"]]

_MARGIN = 1.25
"""How many times its share a process first offers: rows are mixed, so that shares are alike."""
_DIGIT = 11


def of_examples(
    acts: Float[Tensor, "batch slots"], indices: Int[Tensor, "batch slots"], k: int, across: Across
) -> Entries:
    """The k entries of each example that are largest in size, of those that all latent parts offer;
    this process's own, ragged.

    `acts` are those that each part would keep alone, latents ascending. An entry of 0 is none.
    """
    sizes = acts.abs()
    offered = torch.cat(across.of_latent_parts(sizes), dim=1)
    ranked = offered.sort(dim=1, descending=True, stable=True).indices[:, :k]
    chosen = torch.zeros_like(offered, dtype=torch.bool).scatter_(1, ranked, True)
    first = across.latent_part * acts.shape[1]
    kept = chosen[:, first : first + acts.shape[1]] & (acts != 0)
    return acts[kept], indices[kept], _starts(kept.sum(dim=1))


def of_batch(
    encode: Callable[[int], Entries], count: int, most: int, mean: float, across: Across
) -> Entries:
    """The `count` largest positive entries of all processes; this process's own, ragged.

    Args:
        encode: the entries of this process's rows and latents, so many an example on average, as
            `encode_batchtopk` gives them.
        most: latents of this process, and so the most that `encode` can be asked for.
        mean: entries an example that are wanted of each process if all have alike.
    """
    asked = min(most, max(1, round(_MARGIN * mean + 1)))
    while True:
        acts, indices, starts = encode(asked)
        positive = acts > 0
        lowest = nth_largest(acts[positive], count, across)
        # What was not offered is at most as large as the smallest offer.
        hidden = asked < most and bool(positive.all()) and bool((acts > lowest).all())
        if float(across.all(torch.tensor(float(hidden), device=acts.device))) == 0:
            break
        asked = min(most, 2 * asked)
    above, equal = acts > lowest, positive & (acts == lowest)
    numbers = torch.stack([above.sum(), equal.sum()])
    parts = torch.stack(across.of_all(numbers))
    before = parts[: across.row_part * across.latent_parts + across.latent_part, 1].sum()
    room = count - parts[:, 0].sum() - before
    kept = above | (equal & (equal.cumsum(0) <= room))
    per_example = torch.nn.functional.pad(kept.cumsum(0), (1, 0))[starts].diff()
    return acts[kept], indices[kept], _starts(per_example)


def nth_largest(values: Float[Tensor, " some"], count: int, across: Across) -> Float[Tensor, ""]:
    """The `count`-th largest of the positive values of all processes; 0 where there are fewer.

    A radix search: the bits of positive floats ascend with them, so that counts by digit, added up
    over the processes, find it digit by digit.
    """
    bits = 8 * values.element_size()
    keys = values.contiguous().view(torch.int64 if bits == 64 else torch.int32).long()
    total = across.all(torch.tensor(len(keys), device=values.device))
    if int(total) < count:
        return values.new_zeros(())
    alive = torch.ones_like(keys, dtype=torch.bool)
    found, left, shift = 0, count, bits
    while shift:
        width = min(_DIGIT, shift)
        shift -= width
        digits = (keys >> shift) & ((1 << width) - 1)
        counts = across.all(torch.bincount(digits[alive], minlength=1 << width))
        from_here = counts.flip(0).cumsum(0).flip(0)
        digit = int((from_here >= left).sum()) - 1
        left -= int(from_here[digit] - counts[digit])
        alive &= digits == digit
        found |= digit << shift
    kind = torch.int64 if bits == 64 else torch.int32
    return torch.tensor(found, dtype=kind, device=values.device).view(values.dtype)


def _starts(counts: Int[Tensor, " batch"]) -> Int[Tensor, " starts"]:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))
