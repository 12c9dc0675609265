"""The JumpReLU sparse autoencoder (Rajamanoharan et al., arXiv 2407.14435), with a target for L0.

A latent keeps its pre-activation h where that is above its own threshold: f = h 1[h > threshold].
The loss adds (L0 / target - 1)^2, L0 the mean over the batch, which is the quadratic form of Gemma
Scope 2 on the batch mean; so nobody chooses a coefficient. A threshold learns through the pairs in
the window |h - threshold| < bandwidth / 2 alone, whose derivative by the threshold is taken to be
that of a step as wide as the window. Only pairs that are active or in the window take part.

How many those are only the device knows: this is the one architecture whose step waits for it.

All in the units of x~, where the pre-activations of a unit row are about as spread as a normal
distribution: the thresholds start where that would have the target above them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.kernels.ops import decode_mse, encode_above, sort_indices, sparse_row_grads
from saesteer.sae.config import TrainConfig
from saesteer.sae.training.architecture import (
    Architecture,
    DeadList,
    EntrySum,
    Parameters,
    Pass,
    refuse_others,
)
from saesteer.sae.training.architectures.batchtopk import mean_l0
from saesteer.sae.training.architectures.topk import TopK, squared_deviation
from saesteer.sae.training.auxiliary_loss import with_auxiliary_loss

BANDWIDTH = 0.2
"""Width of the window."""
WEIGHT = 4.0
"""Of the penalty, beside a reconstruction loss that starts near 1."""


@dataclass(frozen=True)
class JumpReLU(Architecture):
    """Latents above thresholds that are trained to keep L0 at its target."""

    name: ClassVar[str] = "jumprelu"
    canonical_names: ClassVar[Mapping[str, str]] = {
        **Architecture.canonical_names,
        "threshold": "threshold",
    }
    lr_factors: ClassVar[Mapping[str, float]] = {"threshold": 10.0}
    calibrates: ClassVar[bool] = True

    l0: float
    """Active latents per token aimed at."""
    auxk: float = 0.0
    """Weight of the auxiliary loss of dead latents; 0 switches it off."""

    @classmethod
    def from_config(cls, config: TrainConfig) -> Sequence[Architecture]:
        refuse_others(config, "k", "prefixes")
        if config.cuda_graph:
            raise UsageError(
                f"`cuda_graph` cannot record a step of `arch` {cls.name}, whose entries the host "
                "has to count: leave it out"
            )
        return [cls(l0, config.auxk) for l0 in config.l0]

    @property
    def settings(self) -> dict[str, Any]:
        return {"l0": self.l0}

    @property
    def label(self) -> str:
        return f"l0-{self.l0:g}"

    @property
    def uses_dead(self) -> bool:
        return self.auxk > 0

    def check(self, d_sae: int) -> None:
        if self.l0 >= d_sae:
            raise UsageError(f"`l0` must be below `d_sae` ({d_sae}), got {self.l0:g}")

    def shapes(self, d_in: int, d_out: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(d_in, d_out, d_sae), "threshold": (d_sae,)}

    def initialise(
        self, d_in: int, d_out: int, d_sae: int, seed: int, device: torch.device
    ) -> Parameters:
        """The matrices of `TopK`, and one threshold."""
        start = max(BANDWIDTH, NormalDist().inv_cdf(1 - self.l0 / d_sae))
        return {
            **TopK(1).initialise(d_in, d_out, d_sae, seed, device),
            "threshold": torch.full((d_sae,), start, device=device),
        }

    @torch.no_grad()
    def loss(
        self,
        parameters: Parameters,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"],
        dead: DeadList | None,
    ) -> Pass:
        """L = mean |y - x^|^2 / O + WEIGHT (L0 / l0 - 1)^2 + auxk * AuxK(e)."""
        W_dec, threshold = parameters["W_dec"], parameters["threshold"]
        pre_acts, indices, row_starts = encode_above(
            x, parameters["W_enc_rows"], parameters["b_enc"], threshold - BANDWIDTH / 2
        )
        own = threshold[indices]
        distance = pre_acts - own
        active = distance > 0
        acts = torch.where(active, pre_acts, 0)
        squared, error, act_grads = decode_mse(
            acts, indices, W_dec, parameters["b_dec"], target, row_starts
        )
        squared_error = squared.sum()
        excess = active.sum(dtype=pre_acts.dtype) / (len(x) * self.l0) - 1
        loss = squared_error / target.numel() + WEIGHT * excess.square()
        loss, compact = with_auxiliary_loss(loss, parameters, x, error, dead, self.auxk)
        factor = 2 / max(1, target.numel())
        # What one pair more would add to the penalty.
        price = 2 * WEIGHT * excess / (self.l0 * len(x))
        window = distance.abs() < BANDWIDTH / 2
        pull = torch.where(window, -(own * act_grads * factor + price) / BANDWIDTH, 0)
        order = sort_indices(indices, len(W_dec), row_starts)
        thresholds, _ = sparse_row_grads(
            pull, indices, pull.new_ones((len(x), 1)), len(W_dec), order, row_starts
        )
        return Pass(
            loss=loss,
            squared_error=squared_error,
            squared_deviation=squared_deviation(target),
            examples=len(x),
            latent_acts=acts,
            latent_indices=indices,
            order=order,
            decoder=EntrySum(acts, error),
            encoder=EntrySum(torch.where(active, act_grads, 0), x),
            factor=factor,
            row_starts=row_starts,
            dense={"b_dec": error.sum(dim=0) * factor, "threshold": thresholds[:, 0]},
            compact=compact,
        )

    def after_step(self, parameters: Parameters) -> None:
        """A threshold is never negative."""
        parameters["threshold"].clamp_(min=0)

    def calibrate(
        self,
        parameters: Parameters,
        buffers: Mapping[str, Tensor],
        x: Float[Tensor, "rows d_in"],
    ) -> dict[str, float]:
        """Nothing is set; L0 is measured."""
        (l0,) = mean_l0(parameters, x, parameters["threshold"])
        return {"held_out_l0": l0, "l0_missed_by": abs(l0 / self.l0 - 1)}

    def spec(self) -> dict[str, Any]:
        return {
            "architecture": "jumprelu",
            "metadata": {"training_architecture": self.name, "l0": self.l0},
        }
