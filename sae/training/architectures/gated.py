"""The Gated sparse autoencoder (Rajamanoharan et al., arXiv 2404.16014), with a target for L0.

One product u = x W_enc serves two paths: the gate g = u + b_gate says whether a latent is active,
and the magnitude m = u exp(r_mag) + b_mag how much: f = 1[g > 0] relu(m). The loss adds

    lambda sum relu(g) / sqrt(D)    and    |y - relu(g) sg(W_dec) - sg(b_dec)|^2

where sg lets no gradient through: they alone move the gate. Only pairs with g > 0 take part.
`b_enc` is the gate's bias, as in an SAE's file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.sae.training.architecture import ALL, Architecture, DeadList, Parameters, Pass
from saesteer.sae.training.architectures.standard import Standard
from saesteer.sae.training.architectures.topk import squared_deviation
from saesteer.sae.training.auxiliary_loss import with_auxiliary_loss
from saesteer.sae.training.mesh.across import ALONE, Across
from saesteer.sae.training.pairs import find_pairs


@dataclass(frozen=True)
class Gated(Standard):
    """A gate and a magnitude of the same direction."""

    name: ClassVar[str] = "gated"
    canonical_names: ClassVar[Mapping[str, str]] = {
        **Architecture.canonical_names,
        "b_mag": "b_mag",
        "r_mag": "r_mag",
    }

    def shapes(self, d_in: int, d_out: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(d_in, d_out, d_sae), "b_mag": (d_sae,), "r_mag": (d_sae,)}

    def initialise(
        self,
        d_in: int,
        d_out: int,
        d_sae: int,
        seed: int,
        device: torch.device,
        own: slice = ALL,
    ) -> Parameters:
        """The parameters of `Standard`; the magnitude is that of the whole product."""
        made = super().initialise(d_in, d_out, d_sae, seed, device, own)
        zeros = torch.zeros_like(made["b_enc"])
        return {**made, "b_mag": zeros, "r_mag": zeros.clone()}

    @torch.no_grad()
    def loss(
        self,
        parameters: Parameters,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"],
        dead: DeadList | None,
        across: Across = ALONE,
    ) -> Pass:
        """The reconstruction, the two terms of the gate, and auxk * AuxK(e)."""
        W_dec, b_dec, b_gate = (parameters[name] for name in ("W_dec", "b_dec", "b_enc"))
        pairs = find_pairs(x, parameters, torch.zeros_like(b_gate), self.dense_from, across)
        opened = pairs.pre_acts > 0
        gate = torch.where(opened, pairs.pre_acts, 0)
        u = pairs.pre_acts - pairs.of_latents(b_gate)
        scale = pairs.of_latents(parameters["r_mag"].exp())
        magnitude = u * scale + pairs.of_latents(parameters["b_mag"])
        active = opened & (magnitude > 0)
        acts = torch.where(active, magnitude, 0)
        decoded = pairs.decode(acts, W_dec, b_dec, target)
        by_gate = pairs.decode(gate, W_dec, b_dec, target)
        size, rows = (max(1, n * across.row_parts) for n in (target.numel(), len(x)))
        loss = (decoded.squares.mean() + by_gate.squares.mean()) / size
        loss, compact = with_auxiliary_loss(
            loss, parameters, x, decoded.last, dead, self.auxk, across
        )
        l0 = across.all(active.sum(dtype=acts.dtype)) / rows
        price = self.price(parameters, l0).to(acts.dtype) / (x.shape[1] ** 0.5 * rows)
        of_magnitude = torch.where(active, decoded.act_grads * (2 / size), 0)
        of_product = of_magnitude * scale
        of_gate = torch.where(opened, by_gate.act_grads * (2 / size) + price, 0)
        return pairs.as_pass(
            acts,
            decoded,
            of_product + of_gate,
            loss=loss + price * gate.sum(),
            squared_error=decoded.squares[-1],
            squared_deviation=squared_deviation(target, across),
            examples=len(x),
            dense={
                # u does not depend on the gate's bias.
                "b_enc": -pairs.by_latent(of_product),
                "b_mag": pairs.by_latent(of_magnitude),
                "r_mag": pairs.by_latent(of_product * u),
            },
            compact=compact,
            measured={"l0": l0},
        )

    def spec(self) -> dict[str, Any]:
        return {"architecture": "gated", "metadata": self.metadata()}
