"""Transcoders (Dunefsky et al., arXiv 2406.11944): what one place holds, from what another holds.

y^ = f W_dec + b_dec reads layer and site, and reconstructs `to_layer` and `to_site`. The latents
are chosen as in BatchTopK, and in the file by its threshold. A skip transcoder (Paulo et al., arXiv
2501.18823) adds x W_skip^T, which takes what is linear: it starts at 0.

Input and target have scales of their own. The latents are in units of what is written: a latent is
the length that it adds along its decoder row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.places import Place
from saesteer.sae.training.architecture import ALL, Arrangement, DeadList, Parameters, Pass
from saesteer.sae.training.architectures.batchtopk import BatchTopK
from saesteer.sae.training.architectures.topk import squared_deviation
from saesteer.sae.training.mesh.across import ALONE, Across

_ORDER = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""Sites of a block in the order in which a pass comes by."""


@dataclass(frozen=True)
class Transcoder(BatchTopK):
    """BatchTopK from one place to another."""

    name: ClassVar[str] = "transcoder"
    transcodes: ClassVar[bool] = True

    @classmethod
    def arrangements(cls, reads: Sequence[Place], writes: Sequence[Place]) -> list[Arrangement]:
        for read, write in zip(reads, writes, strict=True):
            check_order(read, write)
        return [((read,), (write,)) for read, write in zip(reads, writes, strict=True)]


@dataclass(frozen=True)
class SkipTranscoder(Transcoder):
    """A transcoder with a linear path beside the latents."""

    name: ClassVar[str] = "skip-transcoder"
    of_no_latent: ClassVar[frozenset[str]] = frozenset({"b_dec", "W_skip"})
    canonical_names: ClassVar[Mapping[str, str]] = {
        **BatchTopK.canonical_names,
        "W_skip": "W_skip",
    }

    def shapes(self, d_in: int, d_out: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(d_in, d_out, d_sae), "W_skip": (d_out, d_in)}

    def initialise(
        self,
        d_in: int,
        d_out: int,
        d_sae: int,
        seed: int,
        device: torch.device,
        own: slice = ALL,
    ) -> Parameters:
        made = super().initialise(d_in, d_out, d_sae, seed, device, own)
        return {**made, "W_skip": torch.zeros(d_out, d_in, device=device)}

    @torch.no_grad()
    def loss(
        self,
        parameters: Parameters,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"],
        dead: DeadList | None,
        across: Across = ALONE,
    ) -> Pass:
        """The loss of `BatchTopK` on what the linear path leaves."""
        W_skip = parameters["W_skip"]
        left = target - (x.to(W_skip.dtype) @ W_skip.t()).to(target.dtype)
        done = super().loss(parameters, x, left, dead, across)
        done.squared_deviation = squared_deviation(target, across)
        error = done.decoder.rows
        done.dense["W_skip"] = (error.t() @ x.to(error.dtype)) * done.factor
        return done


def check_order(read: Place, write: Place) -> None:
    """Raise UsageError where a pass has come by `write` before `read`, or they are one place."""
    (layer, site), (to_layer, to_site) = read, write
    if to_layer < layer:
        raise UsageError(
            f"`to_layer` must not come before `layer` ({layer}), got {to_layer}: what a model "
            "writes there does not depend on what is read"
        )
    if to_layer > layer:
        return
    if site == to_site:
        raise UsageError(
            f"`to_layer` and `to_site` name what is read itself (layer {layer} {site}): give "
            "another place, or an `arch` that reconstructs what it reads"
        )
    if site in _ORDER and to_site in _ORDER and _ORDER.index(to_site) < _ORDER.index(site):
        raise UsageError(
            f"`to_site` must not come before `site` ({site}) in the same block, got {to_site}: "
            f"their order is {', '.join(_ORDER)}"
        )


def written_places(
    reads: Sequence[Place], to_layer: int | None, to_site: str | None
) -> list[tuple[int, str]]:
    """Layer and site that each of some transcoders writes, not yet looked up in a model."""
    return [(layer if to_layer is None else to_layer, to_site or site) for layer, site in reads]
