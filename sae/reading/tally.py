"""What latents do over all rows: how often and how strongly each fires."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

BINS_PER_OCTAVE = 4
LOWEST_OCTAVE, OCTAVES = -12, 32
BINS = BINS_PER_OCTAVE * OCTAVES


def bin_edges() -> Float[Tensor, " edges"]:
    """The borders of the histogram's bins, of which each is 2^(1/4) times the one before."""
    return 2.0 ** (LOWEST_OCTAVE + torch.arange(BINS + 1, dtype=torch.float64) / BINS_PER_OCTAVE)


class ActivationTally:
    """Sums over the firings of each latent, and a histogram of their sizes.

    A latent fires where it is not 0. Memory: 544 bytes a latent. Sums are in float64.
    """

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.rows = 0
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.sum = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.size = torch.zeros(d_sae, dtype=torch.float64, device=device)
        """Sum of |activation|."""
        self.squares = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.strongest = torch.zeros(d_sae, device=device)
        """The activation of largest size, with its sign."""
        self.histogram = torch.zeros(d_sae, BINS, dtype=torch.int32, device=device)
        """Firings by |activation|, in the bins of `bin_edges`; what lies outside is in the first
        and the last."""

    def add(
        self,
        rows: int,
        latent: Int[Tensor, " entries"],
        values: Float[Tensor, " entries"],
    ) -> None:
        """Count the firings of some rows: which latent each is of, and its activation."""
        self.rows += rows
        exact, size = values.double(), values.abs()
        self.fired += latent.bincount(minlength=len(self.fired))
        self.sum.index_add_(0, latent, exact)
        self.size.index_add_(0, latent, exact.abs())
        self.squares.index_add_(0, latent, exact.square())
        high = torch.zeros_like(self.strongest).scatter_reduce_(0, latent, values, "amax")
        low = torch.zeros_like(self.strongest).scatter_reduce_(0, latent, values, "amin")
        best = torch.where(-low > high, low, high)
        self.strongest = torch.where(best.abs() > self.strongest.abs(), best, self.strongest)
        place = ((size.double().log2() - LOWEST_OCTAVE) * BINS_PER_OCTAVE).floor().long()
        place = latent * BINS + place.clamp(0, BINS - 1)
        one = torch.ones_like(place, dtype=torch.int32)
        self.histogram.view(-1).index_add_(0, place, one)

    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of the rows on which each latent fires."""
        return self.fired.double() / max(1, self.rows)

    def mean(self) -> Float[Tensor, " d_sae"]:
        """Mean activation where a latent fires; 0 for one that never does."""
        return self.sum / self.fired.clamp(min=1)

    def std(self) -> Float[Tensor, " d_sae"]:
        """Standard deviation where a latent fires."""
        variance = self.squares / self.fired.clamp(min=1) - self.mean().square()
        return variance.clamp(min=0).sqrt()
