"""Crosscoders (Anthropic, October 2024): one set of latents for several places.

The activations of all places lie side by side, each in its own scale, so that none is louder than
the others; one SAE reads and writes all of them. The latents are chosen as in BatchTopK
(2504.02922), by h: decoder rows have length 1 over all places together, so h^2 is what a latent
takes from the squared error, whether it lies in one place or is shared. Their parts start alike in
every place, without which differences between two models would come from the start.

By its width no hook takes a crosscoder for an SAE of one place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.places import Place
from saesteer.sae.training.architecture import ALL, Architecture, Arrangement, Parameters
from saesteer.sae.training.architectures.batchtopk import BatchTopK


@dataclass(frozen=True)
class Crosscoder(BatchTopK):
    """BatchTopK on several places side by side."""

    name: ClassVar[str] = "crosscoder"

    parts: tuple[int, ...] = ()
    """Width of each place."""

    @classmethod
    def arrangements(cls, reads: Sequence[Place], writes: Sequence[Place]) -> list[Arrangement]:
        if len(reads) < 2:
            raise UsageError(
                f"a crosscoder needs several places, got {len(reads)}: give several `layer`, or "
                "`activations` of two models"
            )
        return [(tuple(reads), tuple(reads))]

    def at_places(self, reads: Sequence[int], writes: Sequence[int]) -> Architecture:
        return replace(self, parts=tuple(reads))

    def initialise(
        self,
        d_in: int,
        d_out: int,
        d_sae: int,
        seed: int,
        device: torch.device,
        own: slice = ALL,
    ) -> Parameters:
        """The parameters of `TopK`; where all places are as wide, one decoder for each of them."""
        made = super().initialise(d_in, d_out, d_sae, seed, device, own)
        parts = self.parts
        if len(set(parts)) == 1 and d_in == d_out == sum(parts):
            one = super().initialise(parts[0], parts[0], d_sae, seed, device, own)["W_dec"]
            rows = one.repeat(1, len(parts)) / len(parts) ** 0.5
            made |= {"W_dec": rows, "W_enc_rows": rows.clone()}
        return made

    @property
    def sae_lens_details(self) -> dict[str, Any]:
        return {**super().sae_lens_details, "parts": list(self.parts)}
