"""The standard sparse autoencoder: ReLU and an L1 penalty, with a target for L0.

f = relu(h), and the loss adds lambda sum f n / sqrt(D), n the length of the latent's decoder row:
rows have length 1, so n is 1 and nothing is gained by long rows (Anthropic's form of April 2024
lets rows grow and multiplies by n, which has the same minima). lambda follows the target.

L1 also shrinks what is active. It is here to compare with.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.sae.training.architecture import ALL, DeadList, Parameters, Pass
from saesteer.sae.training.architectures.topk import squared_deviation
from saesteer.sae.training.auxiliary_loss import with_auxiliary_loss
from saesteer.sae.training.l0_target import L0Target
from saesteer.sae.training.mesh.across import ALONE, Across
from saesteer.sae.training.pairs import find_pairs


@dataclass(frozen=True)
class Standard(L0Target):
    """Every positive pre-activation is active, and costs its size."""

    name: ClassVar[str] = "standard"

    dense_from: float | None = None
    """See `find_pairs`."""

    @property
    def start(self) -> float:
        # Where it ended for real and made-up activations, within a factor of three.
        return 0.6 / self.l0**0.5 if self.coefficient is None else self.coefficient

    @property
    def highest(self) -> float | None:
        return float(6 / self.l0**0.5)

    def initialise(
        self,
        d_in: int,
        d_out: int,
        d_sae: int,
        seed: int,
        device: torch.device,
        own: slice = ALL,
    ) -> Parameters:
        """The parameters of `TopK`, with a bias below which about as many lie as wanted."""
        made = super().initialise(d_in, d_out, d_sae, seed, device, own)
        made["b_enc"] -= max(0.0, self.height(d_sae))
        return made

    @torch.no_grad()
    def loss(
        self,
        parameters: Parameters,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"],
        dead: DeadList | None,
        across: Across = ALONE,
    ) -> Pass:
        """L = mean |y - x^|^2 / O + lambda mean_b sum f / sqrt(I) + auxk * AuxK(e)."""
        W_dec, b_enc = parameters["W_dec"], parameters["b_enc"]
        pairs = find_pairs(x, parameters, torch.zeros_like(b_enc), self.dense_from, across)
        active = pairs.pre_acts > 0
        acts = torch.where(active, pairs.pre_acts, 0)
        decoded = pairs.decode(acts, W_dec, parameters["b_dec"], target)
        size, rows = (max(1, n * across.row_parts) for n in (target.numel(), len(x)))
        loss = decoded.squares.mean() / size
        loss, compact = with_auxiliary_loss(
            loss, parameters, x, decoded.last, dead, self.auxk, across
        )
        l0 = across.all(active.sum(dtype=acts.dtype)) / rows
        price = self.price(parameters, l0).to(acts.dtype) / (x.shape[1] ** 0.5 * rows)
        derivatives = decoded.act_grads * (2 / size) + price
        return pairs.as_pass(
            acts,
            decoded,
            torch.where(active, derivatives, 0),
            loss=loss + price * acts.sum(),
            squared_error=decoded.squares[-1],
            squared_deviation=squared_deviation(target, across),
            examples=len(x),
            dense={},
            compact=compact,
            measured={"l0": l0},
        )

    def spec(self) -> dict[str, Any]:
        return {"architecture": "standard", "metadata": self.metadata()}
