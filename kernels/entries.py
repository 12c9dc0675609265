"""The active latents of a batch, as a rectangle or as ragged rows stored end to end.

A rectangle is ``[batch, k]``, k latents for every example. Ragged entries are one list
``[entries]``, with ``row_starts`` ``[batch + 1]`` (int64): example b owns the entries
``row_starts[b]:row_starts[b + 1]``, and may own none. Flattened, a rectangle is the ragged list
whose rows are all of length k.
"""

import torch
from torch import Tensor


def check_entries(indices: Tensor, d_sae: int, row_starts: Tensor | None) -> None:
    """Check values on the CPU, where reading them takes microseconds.

    Values on other devices are not checked, because the host would have to wait for them.

    Raises:
        IndexError: an index is outside 0..d_sae-1.
        ValueError: row_starts do not cut the entries into rows.
    """
    check_row_starts(indices, row_starts)
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < 0 or high >= d_sae:
        raise IndexError(
            f"latent_indices must be in 0..{d_sae - 1} (d_sae), got {low if low < 0 else high}"
        )


def check_row_starts(indices: Tensor, row_starts: Tensor | None) -> None:
    """The part of `check_entries` that is about row_starts. Raises ValueError."""
    if row_starts is None or row_starts.device.type != "cpu":
        return
    first, last, n_entries = int(row_starts[0]), int(row_starts[-1]), indices.numel()
    if first != 0 or last != n_entries:
        raise ValueError(
            f"`row_starts` must begin with 0 and end with {n_entries} (the number of entries), "
            f"got {first} and {last}"
        )
    if bool((row_starts.diff() < 0).any()):
        place = int((row_starts.diff() < 0).nonzero()[0])
        raise ValueError(
            f"`row_starts` must not fall, got {int(row_starts[place])} before "
            f"{int(row_starts[place + 1])} at {place}"
        )


def batch_of(indices: Tensor, row_starts: Tensor | None) -> int | torch.SymInt:
    """Number of examples."""
    return indices.shape[0] if row_starts is None else row_starts.shape[0] - 1


def mean_length(indices: Tensor, row_starts: Tensor | None) -> float:
    """Entries per example: k, or the average."""
    if row_starts is None:
        return float(indices.shape[1])
    return len(indices) / max(1, len(row_starts) - 1)


def row_starts_of(indices: Tensor, row_starts: Tensor | None) -> Tensor:
    """Row starts of either form, [batch + 1] int64."""
    if row_starts is not None:
        return row_starts
    batch, k = indices.shape
    return torch.arange(batch + 1, device=indices.device) * k


def examples_of(n_entries: int, row_starts: Tensor) -> Tensor:
    """Example of each ragged entry, [entries] int64."""
    examples = torch.arange(len(row_starts) - 1, device=row_starts.device)
    # With a stated length the host does not have to wait for the device.
    return examples.repeat_interleave(row_starts.diff(), output_size=n_entries)


def per_entry(values: Tensor, indices: Tensor, row_starts: Tensor | None) -> Tensor:
    """``values`` [batch] in a shape that multiplies the entries: [batch, 1], or [entries]."""
    if row_starts is None:
        return values[:, None]
    return values[examples_of(len(indices), row_starts)]


def to_dense(values: Tensor, indices: Tensor, d_sae: int, row_starts: Tensor | None) -> Tensor:
    """Entries as a dense [batch, d_sae]; repeated latents are added. Differentiable in values."""
    dense = values.new_zeros((batch_of(indices, row_starts), d_sae))
    if row_starts is None:
        return dense.scatter_add(1, indices, values)
    flat = examples_of(len(indices), row_starts) * d_sae + indices
    return dense.view(-1).scatter_add(0, flat, values).view(dense.shape)


def from_dense(dense: Tensor, indices: Tensor, row_starts: Tensor | None) -> Tensor:
    """The values of the entries in a dense [batch, d_sae]. Differentiable."""
    if row_starts is None:
        return dense.gather(1, indices)
    return dense[examples_of(len(indices), row_starts), indices]


def filled_entries(
    values: Tensor, places: Tensor, batch: int, d_sae: int, *, filler: float, even: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Ragged entries out of places in the flattened [batch, d_sae], with fillers for what lacks.

    ``places`` ascend, and are -1 at the end for entries that were not found. Each of those becomes
    a pair of value ``filler``: with ``even`` as many for every example as far as it has room, else
    the first pairs of the batch that are not there. Among the latents of its example it is in
    order. Nothing here has a length that only the device knows.

    Returns:
        values and latents [entries], row starts [batch + 1].
    """
    count, device = len(places), places.device
    if batch == 0:
        return values, places, torch.zeros(1, dtype=torch.int64, device=device)
    slots, bounds = torch.arange(count, device=device), torch.arange(batch + 1, device=device)
    found = places >= 0
    examples = torch.where(found, places.div(d_sae, rounding_mode="floor"), batch)
    starts = torch.searchsorted(examples, bounds)
    lengths, missing = starts.diff(), count - starts[-1]
    room = d_sae - lengths
    share = torch.zeros_like(room)
    if even:
        share = torch.minimum((bounds * missing).div(batch, rounding_mode="floor").diff(), room)
    room = room - share
    left = missing - share.sum() - (room.cumsum(0) - room)
    share = share + torch.minimum(left.clamp(min=0), room)
    new_starts = torch.zeros_like(starts)
    torch.cumsum(lengths + share, 0, out=new_starts[1:])
    # An example's fillers are the first latents that are not there. So a latent moves up by as many
    # of them as are below it, and a filler is the latent that its own slot counts.
    example = examples.clamp(max=batch - 1)
    nth, latent = slots - starts[example], places - example * d_sae
    to = new_starts[example] + nth + torch.minimum(share[example], latent - nth)
    to = torch.where(found, to, count)
    indices = torch.cat([slots - new_starts[examples_of(count, new_starts)], slots[:1]])
    all_values = values.new_full((count + 1,), filler)
    indices.scatter_(0, to, latent)
    all_values.scatter_(0, to, values)
    return all_values[:count].clone(), indices[:count].clone(), new_starts
