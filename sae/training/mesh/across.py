"""What a pass over a batch asks of the processes that have the rest of it.

Processes stand in a rectangle. Those of one column have the same latents and share the rows of a
batch out; those of one row of it, a shard group, see the same rows and share the latents out. Sums
over rows go over a column, sums over latents over a shard group.

`ALONE` is a process that has all rows and all latents: its sums are what it was given, to the bit.
"""

from collections.abc import Sequence

from torch import Tensor


class Across:
    """The place of a process in the rectangle, and sums over the others."""

    row_parts: int = 1
    """How many processes share the rows of a batch out, equally."""
    row_part: int = 0
    """Which part this one has, counted from 0, in the order of the rows."""
    latent_parts: int = 1
    """How many share the latents out, equally."""
    latent_part: int = 0
    """Which part this one has, in the order of the latents."""

    def own_latents(self, d_sae: int) -> slice:
        """Which of all latents this process has."""
        size = d_sae // self.latent_parts
        return slice(self.latent_part * size, (self.latent_part + 1) * size)

    def own_ends(self, ends: Sequence[int], own: int) -> tuple[int, ...]:
        """Where prefixes of all latents end, counted within the `own` latents of this process."""
        first = self.latent_part * own
        return tuple(min(max(end - first, 0), own) for end in ends)

    def rows(self, values: Tensor) -> Tensor:
        """Sums over the processes that have the other rows."""
        return values

    def latents(self, values: Tensor) -> Tensor:
        """Sums over the processes that have the other latents."""
        return values

    def all(self, values: Tensor) -> Tensor:
        """Sums over all processes."""
        return values

    def least(self, values: Tensor) -> Tensor:
        """The smallest value of all processes."""
        return values

    def of_latent_parts(self, values: Tensor) -> list[Tensor]:
        """The values of the processes that have the other latents, in the order of the latents."""
        return [values]

    def of_all(self, values: Tensor) -> list[Tensor]:
        """The values of all processes, in the order of rows, then of latents."""
        return [values]


ALONE = Across()
