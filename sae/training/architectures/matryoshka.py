"""Matryoshka BatchTopK (Bussmann et al., arXiv 2503.17547): the first latents stand alone.

The latents are chosen once, as in BatchTopK. For prefixes m_1 < ... < m_G = F, x^_g is what the
chosen latents before m_g add up to with b_dec, and the loss is the mean over g of the losses of all
x^_g, each with weight 1 / G; no level of b_dec alone. AuxK reads the residual of the last.

A latent that first belongs to prefix g takes part in the levels from g on. With E_j = x^_j - y, its
gradients are those of a plain SAE whose error is the suffix sum G_g = sum over j >= g of E_j / G.
So the entries of an example are cut where a prefix ends, and each piece counts as an example of its
own, with G_g as its error: G rows of an example in place of one, and no product more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.kernels.ops import sort_indices
from saesteer.sae.config import TrainConfig
from saesteer.sae.training.architecture import (
    OF_PENALTIES,
    Architecture,
    DeadList,
    EntrySum,
    Parameters,
    Pass,
    refuse_others,
)
from saesteer.sae.training.architectures.batchtopk import BatchTopK, least_activation
from saesteer.sae.training.architectures.topk import squared_deviation
from saesteer.sae.training.auxiliary_loss import with_auxiliary_loss
from saesteer.sae.training.mesh.across import ALONE, Across
from saesteer.sae.training.mesh.decoding import decode_levels
from saesteer.sae.training.pairs import cut_at

_SHARES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)
"""Where prefixes end by default: SAEBench's groups of 1/32, 1/16, 1/8, 1/4 and the rest."""


def prefix_ends(prefixes: tuple[int, ...], d_sae: int) -> tuple[int, ...]:
    """Where each prefix ends, the last at d_sae; by default at shares of it."""
    return prefixes or tuple(sorted({max(1, round(share * d_sae)) for share in _SHARES}))


def check_prefixes(prefixes: tuple[int, ...], d_sae: int) -> None:
    """Raise UsageError for prefixes that do not end at d_sae."""
    if prefix_ends(prefixes, d_sae)[-1] != d_sae:
        raise UsageError(
            f"`prefixes` must end at `d_sae` ({d_sae}), got {','.join(map(str, prefixes))}"
        )


@dataclass(frozen=True)
class Matryoshka(BatchTopK):
    """BatchTopK with nested prefixes of latents, each of which reconstructs by itself."""

    name: ClassVar[str] = "matryoshka"
    sae_lens_name: ClassVar[str] = "matryoshka_batchtopk"

    prefixes: tuple[int, ...] = ()
    """Numbers of latents; empty means the default shares of d_sae."""

    @classmethod
    def from_config(cls, config: TrainConfig) -> Sequence[Architecture]:
        refuse_others(config, *OF_PENALTIES)
        return [cls(k, config.auxk, config.prefixes) for k in config.resolved_k]

    @property
    def settings(self) -> dict[str, Any]:
        return {"k": self.k, "prefixes": list(self.prefixes)}

    @property
    def label(self) -> str:
        """Of one run all have the same prefixes, or the same shares."""
        return f"k-{self.k}"

    @property
    def sae_lens_details(self) -> dict[str, Any]:
        return {"k": self.k, "matryoshka_widths": list(self.prefixes)}

    def at_width(self, d_sae: int) -> Architecture:
        return replace(self, prefixes=self.ends(d_sae))

    def ends(self, d_sae: int) -> tuple[int, ...]:
        """Where each prefix ends; the last at d_sae."""
        return prefix_ends(self.prefixes, d_sae)

    def check(self, d_sae: int) -> None:
        super().check(d_sae)
        check_prefixes(self.prefixes, d_sae)

    @torch.no_grad()
    def loss(
        self,
        parameters: Parameters,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"],
        dead: DeadList | None,
        across: Across = ALONE,
    ) -> Pass:
        """L = mean over g of mean |y - x^_g|^2 / O + auxk * AuxK(y - x^_G)."""
        W_dec, b_dec = parameters["W_dec"], parameters["b_dec"]
        ends = across.own_ends(self.ends(len(W_dec) * across.latent_parts), len(W_dec))
        levels = len(ends)
        acts, indices, row_starts = self.entries(parameters, x, across)
        assert row_starts is not None, "entries of a batch are ragged"
        pieces = cut_at(indices, row_starts, ends)
        squared, last, errors, act_grads = decode_levels(
            acts, indices, W_dec, b_dec, target, pieces, levels, across
        )
        squares = squared.sum(dim=0)
        size = target.numel() * across.row_parts
        loss = squares.mean() / size
        loss, compact = with_auxiliary_loss(loss, parameters, x, last, dead, self.auxk, across)
        factor = 2 / max(1, size * levels)
        return Pass(
            loss=loss,
            squared_error=squares[-1],
            squared_deviation=squared_deviation(target, across),
            examples=len(x),
            latent_acts=acts,
            latent_indices=indices,
            order=sort_indices(indices, len(W_dec), pieces),
            decoder=EntrySum(acts, errors.flatten(0, 1)),
            encoder=EntrySum(torch.where(acts != 0, act_grads, 0), x),
            factor=factor,
            row_starts=pieces,
            dense={"b_dec": errors[:, 0].sum(dim=0) * factor},
            compact=compact,
            measured={"least": least_activation(acts, across)},
        )
