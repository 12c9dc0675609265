"""The settings of a reading of latents. Imports no torch."""

import math
from dataclasses import dataclass

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.config import TextConfig

NEUTRAL_PROMPT = "From my experience,"
"""A prompt that asks for nothing in particular (Arad et al., arXiv 2505.20063)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentsConfig:
    """Which latents are read, on how much text, and what is kept of each."""

    tokens: int = 100_000
    """Kept positions to read, in whole batches."""
    ids: tuple[int, ...] = ()
    """The latents that get a page; empty: those that `top` or `every` choose."""
    top: int = 200
    """The latents that write most get a page: by the sum of |activation| times the length of the
    decoder row."""
    every: bool = False
    """Whether all latents get a page."""
    text: TextConfig = TextConfig()
    """The text to read."""
    contexts: int = 12
    """Strongest contexts of each latent."""
    quantiles: int = 4
    """Parts of equal size into which the sampled firings are divided, from weak to strong."""
    per_quantile: int = 3
    """Sampled contexts shown of each part."""
    samples: int = 32
    """Firings of each latent that are drawn at random."""
    held_out: int = 10
    """Firings of each latent that are kept apart, from contexts that no description sees."""
    before: int = 20
    """Tokens shown before the one that a context is shown for."""
    after: int = 11
    """Tokens shown after it."""
    lens: int = 10
    """Tokens of the logit lens, up and down."""
    neighbours: int = 8
    """Nearest latents, by decoder and by co-firing."""
    telling: int = 8
    """Most telling tokens of each latent."""
    steer: int = 40
    """Latents that are steered with, the first ones; 0: none."""
    dose: float = 0.5
    """What steering adds, as a share of the length of the activation there."""
    neutral_prompt: str = NEUTRAL_PROMPT
    """What is continued while steering."""
    new_tokens: int = 24
    """Tokens of each continuation."""

    def __post_init__(self) -> None:
        for name, least in (
            ("tokens", 2),
            ("top", 1),
            ("contexts", 1),
            ("quantiles", 1),
            ("per_quantile", 0),
            ("samples", 1),
            ("held_out", 0),
            ("before", 0),
            ("after", 0),
            ("lens", 1),
            ("neighbours", 0),
            ("telling", 1),
            ("steer", 0),
            ("new_tokens", 1),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"`{name}` must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.dose < math.inf:
            raise UsageError(f"`dose` must be above 0, got {self.dose:g}")
        if not self.neutral_prompt.strip():
            raise UsageError("`neutral_prompt` is empty: give a text to continue")
        if len(set(self.ids)) != len(self.ids):
            raise UsageError(f"`ids` names a latent twice: {','.join(map(str, self.ids))}")

    @property
    def window(self) -> int:
        """Tokens of a context that are shown."""
        return self.before + 1 + self.after
