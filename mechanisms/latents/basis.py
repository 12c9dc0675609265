"""A residual site as a sum of latents, a constant and an error: h = sum_j a_j d_j + b_dec + error.

The error is what the SAE leaves of h. It is a node like a latent, so that nothing is lost: all
latents and the error, put in together, are the whole site.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE
from saesteer.mechanisms.config import RESIDUAL_SITES
from saesteer.mechanisms.patching.sites import Node
from saesteer.sae.model.hooks import sae_hook_point
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.model.sae_places import is_plain
from saesteer.steering.ranking.output_scores import unit_steps


class Parts(NamedTuple):
    """States in parts; latents and error add up to the state less `b_dec`."""

    acts: Float[Tensor, "rows d_sae"]
    error: Float[Tensor, "rows d_model"]


@dataclass(frozen=True, eq=False)
class LatentBasis:
    """An SAE at one site of a model."""

    sae: SAE
    node: Node
    steps: Float[Tensor, "d_sae d_model"]
    """What a unit of each latent adds to the state: d_j."""

    def split(self, h: Float[Tensor, "rows d_model"]) -> Parts:
        """States as activations and error, in the dtype of the SAE."""
        acts = self.sae.encode(h)
        return Parts(acts, h.to(acts.dtype) - self.sae.decode(acts, h))

    def join(self, acts: Float[Tensor, "rows n"], ids: Sequence[int]) -> Tensor:
        """Sum of latents `ids` with these activations, `[rows, d_model]`."""
        return acts @ self.steps[list(ids)]


def latent_basis(
    lm: LanguageModel,
    sae: SAE,
    *,
    layer: int | None = None,
    site: str | None = None,
    force: bool = False,
) -> LatentBasis:
    """The SAE in the model's dtype, at the place it names or that `layer` and `site` say.

    Raises what `sae_hook_point` raises, and UsageError for an SAE whose latents have no fixed
    direction in one residual site: transcoders and crosscoders, SAEs of single heads' outputs, and
    SAEs that scale every token.
    """
    name = sae.source or "(in memory)"
    if not is_plain(sae):
        raise UsageError(
            f"`sae` {name} reads and writes different places, so its latents and its error do not "
            "add up to one site: give an SAE of one site"
        )
    if sae.spec.scales_tokens or sae.spec.centers_input:
        raise UsageError(
            f"`sae` {name} scales or centres every token by itself "
            f"({sae.spec.normalize_activations}), so a latent adds another vector at each: give an "
            "SAE without that"
        )
    point = sae_hook_point(sae, lm, layer=layer, site=site, force=force)
    if point.site not in RESIDUAL_SITES:
        raise UsageError(
            f"`sae` {name} reads {point.site}: latents are patched at "
            f"{', '.join(RESIDUAL_SITES)} alone"
        )
    own = sae.to(lm.device, lm.dtype)
    return LatentBasis(own, Node(point.site, point.layer), unit_steps(own))


def fraction_unexplained(
    basis: LatentBasis, h: Float[Tensor, "rows d_model"], parts: Parts
) -> float:
    """FVU of the SAE on these states: squared error over squared distance from their mean.

    Raises UserError for a single state, or equal ones, which have no variance.
    """
    total = float((h - h.mean(dim=0)).double().square().sum())
    if not total > 0:
        raise UserError("states without variance have no FVU: give more pairs")
    return float(parts.error.double().square().sum()) / total


def sums_up(basis: LatentBasis, h: Tensor, parts: Parts) -> Tensor:
    """What latents, constant and error come to, `[rows, d_model]`: h, but for rounding."""
    every = range(basis.sae.spec.d_sae)
    return torch.as_tensor(basis.join(parts.acts, every) + basis.sae.b_dec + parts.error)
