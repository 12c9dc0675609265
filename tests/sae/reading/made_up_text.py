"""Contexts of made-up tokens with made-up activations, read by an SAE that passes them on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.config import TextConfig
from saesteer.sae.reading.collect import Collector
from saesteer.sae.reading.config import LatentsConfig
from saesteer.sae.text.contexts import ContextBatch

LATENTS, CONTEXTS, LENGTH, WORDS = 12, 24, 17, 30


@dataclass(frozen=True)
class MadeUpText:
    """Text whose activations are quarters, so that many are equal."""

    batch: ContextBatch
    acts: Float[Tensor, "contexts seq latents"]
    """0 at positions that are not kept."""

    @property
    def keep(self) -> Bool[Tensor, "contexts seq"]:
        return self.batch.keep


def made_up(seed: int = 0, *, signed: bool = False) -> MadeUpText:
    rng = torch.Generator().manual_seed(seed)
    rates = torch.linspace(0.1, 1.6, LATENTS)
    acts = ((torch.randn(CONTEXTS, LENGTH, LATENTS, generator=rng) - rates) * 8).ceil() / 4
    acts = torch.relu(acts)
    acts[..., 3] = 0  # never fires
    if signed:
        acts *= torch.randint(0, 2, acts.shape, generator=rng) * 2 - 1
    keep = torch.rand(CONTEXTS, LENGTH, generator=rng) < 0.9
    keep[5] = False
    tokens = torch.randint(0, WORDS, (CONTEXTS, LENGTH), generator=rng)
    # Latent 1 fires on one word, always.
    acts[..., 1] = (tokens == 7).float()
    acts *= keep[:, :, None]
    owners = torch.zeros_like(tokens)
    return MadeUpText(ContextBatch(tokens, keep, owners, torch.arange(CONTEXTS)), acts)


def passing_on(*, signed: bool = False) -> SAE:
    """Latent j is dimension j of the input."""
    eye, zero = torch.eye(LATENTS), torch.zeros(LATENTS)
    kind = {"architecture": "abstopk", "k": LATENTS} if signed else {"architecture": "standard"}
    return SAE(SAESpec(d_model=LATENTS, d_sae=LATENTS, **kind), eye, zero, eye, zero)  # type: ignore[arg-type]


CONFIG = LatentsConfig(
    contexts=4, samples=6, held_out=3, before=3, after=2, text=TextConfig(context=LENGTH, seed=5)
)


def collected(
    text: MadeUpText,
    cuts: Sequence[int] = (24,),
    *,
    ids: Sequence[int] | None = None,
    signed: bool = False,
    config: LatentsConfig = CONFIG,
) -> Collector:
    """The text read in batches of so many contexts."""
    collector = Collector(passing_on(signed=signed), config, torch.device("cpu"), ids)
    first = 0
    for size in cuts:
        part = slice(first, first + size)
        collector.add(text.batch[part], text.keep[part], text.acts[part][text.keep[part]])
        first += size
    assert first == CONTEXTS
    return collector
