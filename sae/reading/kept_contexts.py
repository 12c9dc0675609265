"""The contexts that are kept of each latent: bounded heaps, all latents updated at once."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

HELD_OUT = 4
"""Every context whose number divided by this leaves one less than it is held out: no description is
made from it, so that descriptions can be judged on it."""


class Window(NamedTuple):
    """Which part of a context is kept around a position."""

    before: int
    after: int

    def width(self, context: int) -> int:
        """Tokens that are kept of a context of so many."""
        return min(self.before + 1 + self.after, context)

    def start(self, position: Tensor, context: int) -> Tensor:
        """Where the windows begin: moved where they would leave the context."""
        return (position - self.before).clamp(0, context - self.width(context))

    def first(self, position: int, context: int) -> int:
        """`start` of a single position."""
        return min(max(position - self.before, 0), context - self.width(context))


class KeptContexts:
    """For each of n latents the k contexts of highest key, strongest first.

    Memory: `n * k * (20 + 4 * window)` bytes. Among equal keys the earlier context wins, so the
    result does not depend on how the text was cut into batches.
    """

    def __init__(self, n: int, k: int, window: Window, context: int, device: torch.device) -> None:
        self.window, self.context = window, context
        width = window.width(context)
        self.key = torch.full((n, k), -torch.inf, device=device)
        self.number = torch.full((n, k), -1, dtype=torch.int64, device=device)
        """Number of the context; -1 where there is none."""
        self.position = torch.zeros(n, k, dtype=torch.int64, device=device)
        """The token that the context is kept for."""
        self.acts = torch.zeros(n, k, width, device=device)
        """The latent's activations in the window."""

    def add(
        self,
        keys: Float[Tensor, "contexts n"],
        positions: Int[Tensor, "contexts n"],
        numbers: Int[Tensor, " contexts"],
        grid: Float[Tensor, "contexts seq n"],
    ) -> None:
        """Offer one position of each context and latent.

        Args:
            keys: what they compete by; -inf where there is no position to offer.
            grid: the latents' activations in these contexts.
        """
        k = self.key.shape[1]
        touched = (keys > self.key[:, -1]).any(dim=0).nonzero()[:, 0]
        if not k or not len(touched):
            return
        both = torch.cat([self.key[touched], keys[:, touched].T], dim=1)
        # Stable: what was there first stays first among equals.
        order = both.argsort(dim=1, descending=True, stable=True)[:, :k]
        fresh, old, new = order >= k, order.clamp(max=k - 1), (order - k).clamp(min=0)
        offered = positions[:, touched].T.gather(1, new)
        position = torch.where(fresh, offered, self.position[touched].gather(1, old))
        acts = self.acts[touched].gather(1, old[..., None].expand(-1, -1, self.acts.shape[2]))
        row, place = fresh.nonzero(as_tuple=True)
        context, at = new[row, place], position[row, place]
        columns = self.window.start(at, self.context)[:, None]
        columns = columns + torch.arange(self.acts.shape[2], device=columns.device)
        acts[row, place] = grid[context[:, None], columns, touched[row][:, None]]
        number = torch.where(fresh, numbers[new], self.number[touched].gather(1, old))
        self.key[touched] = both.gather(1, order)
        self.number[touched], self.position[touched], self.acts[touched] = number, position, acts

    def bytes(self) -> int:
        """Memory that is held."""
        held = (self.key, self.number, self.position, self.acts)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


def priorities(numbers: Int[Tensor, " contexts"], length: int, seed: int) -> Float[Tensor, "c s"]:
    """A pseudo-random number in [0, 1) for each position of some contexts.

    It depends on the seed, the number of the context and the position alone, so that the sample
    does not depend on batches (splitmix64, of which 24 bits are used: exact in float32).
    """
    places = torch.arange(length, device=numbers.device)
    x = numbers[:, None] * 1_000_003 + places + 0x9E3779B9 * (seed + 1)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ _shifted(x, shift)) * factor
    x = x ^ _shifted(x, 31)
    return (x & 0xFFFFFF).float() / 2**24


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def is_held_out(numbers: Int[Tensor, " contexts"]) -> Tensor:
    """Whether contexts are held out, by their numbers."""
    return numbers % HELD_OUT == HELD_OUT - 1
