"""Architectures whose number of active latents a penalty holds at a target, L0*.

Nobody chooses a coefficient: it starts somewhere and is controlled. With m = log(L0 / L0*), L0 the
mean over the batch, and I the sum over past steps of `rate` m,

- a penalty that grows with L0 (of steps, of their tanh, of L1 norms) has the coefficient
  lambda = start exp(I + GAIN m): at once by the proportional part, exactly in the long run;
- a penalty (L0 / aim - 1)^2 pulls back by itself, and stops short of its aim by what one more
  latent is worth: the aim is L0* exp(-I).

m is bounded, so that a dense start does not build up a force that kills what it should thin out;
and lambda stays where it matters, between a price at which all latents together cost several times
what there is to reconstruct and a negligible one. Without these bounds Adam remembers the force for
a thousand steps. The coefficient rises from 0 over the first steps; meanwhile I may fall and not
rise. It is not frozen at the end: as the learning rate falls, so does what the controller can
change.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.config import TrainConfig
from saesteer.sae.training.architecture import (
    ALL,
    Architecture,
    Parameters,
    Pass,
    refuse_others,
)
from saesteer.sae.training.architectures.topk import TopK
from saesteer.sae.training.mesh.across import ALONE, Across

GAIN = 1.5
"""How strongly the coefficient answers to the L0 of the batch itself."""
_LOWEST, _HIGHEST = -3.0, 1.0
"""Bounds of m: a factor of 20 too few, of 2.7 too many."""
_MOST_RATE, _RUN_RATE = 0.05, 25.0
"""I moves by at most the first a step, and by at most the second in a run, for m = 1."""
_FARTHEST = 7.0
"""I stays within this of 0 for quadratic penalties."""
_RANGE = 2000.0
"""The highest price is so many times the lowest."""


@dataclass(frozen=True)
class L0Target(Architecture):
    """What kinds with a target for L0 share. Subclasses say `loss`, `spec`, `start`, `highest`."""

    own_config: ClassVar[tuple[str, ...]] = ()
    """Settings of `TrainConfig` besides `l0` that the subclass takes."""
    l0: float
    """Active latents per token aimed at."""
    auxk: float = 0.0
    """Weight of the auxiliary loss of dead latents; 0 switches it off."""
    coefficient: float | None = None
    """Where the coefficient of the penalty starts; None for the usual place."""
    rising_steps: int = 0
    """Steps over which it rises from 0."""
    rate: float = _MOST_RATE
    """Of the controller's integral."""

    @classmethod
    def from_config(cls, config: TrainConfig) -> Sequence[Architecture]:
        others = {"k", "prefixes", "jumprelu"} - set(cls.own_config)
        refuse_others(config, *sorted(others))
        if config.cuda_graph:
            raise UsageError(
                f"`cuda_graph` cannot record a step of `arch` {cls.name}, whose entries the host "
                "has to count: leave it out"
            )
        rising = config.sparsity_warmup_steps
        shared: dict[str, Any] = {
            "auxk": config.auxk,
            "coefficient": config.coefficient,
            "rising_steps": config.steps // 20 if rising is None else rising,
            "rate": min(_MOST_RATE, _RUN_RATE / max(1, config.steps)),
        }
        return [cls(l0, **shared, **cls.own_settings(config)) for l0 in config.resolved_l0]

    @classmethod
    def own_settings(cls, config: TrainConfig) -> dict[str, Any]:
        """Values of the subclass's own fields."""
        return {}

    @property
    def settings(self) -> dict[str, Any]:
        return {"l0_target": self.l0}

    @property
    def label(self) -> str:
        return f"l0-{self.l0:g}"

    @property
    def uses_dead(self) -> bool:
        return self.auxk > 0

    @property
    @abstractmethod
    def start(self) -> float:
        """Where the coefficient starts."""

    @property
    @abstractmethod
    def highest(self) -> float | None:
        """The highest price that makes sense; None for a quadratic penalty."""

    def check(self, d_sae: int) -> None:
        if self.l0 >= d_sae:
            raise UsageError(f"`l0` must be below `d_sae` ({d_sae}), got {self.l0:g}")

    def height(self, d_sae: int) -> float:
        """Above it lie L0* of `d_sae` normally distributed numbers: the pre-activations of unit
        rows are about as spread in the units of x~."""
        return NormalDist().inv_cdf(1 - self.l0 / d_sae)

    def initialise(
        self,
        d_in: int,
        d_out: int,
        d_sae: int,
        seed: int,
        device: torch.device,
        own: slice = ALL,
    ) -> Parameters:
        """The parameters of `TopK`."""
        return TopK(1).initialise(d_in, d_out, d_sae, seed, device, own)

    # --- the controller ---

    def buffers(self, d_sae: int, device: torch.device) -> dict[str, Tensor]:
        """I, and the number of steps so far."""
        return {
            name: torch.zeros((), dtype=torch.float64, device=device)
            for name in ("l0_integral", "l0_steps")
        }

    def miss(self, l0: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """m, within its bounds."""
        return (l0.double() / self.l0).clamp_min(1e-9).log().clamp(_LOWEST, _HIGHEST)

    def risen(self, state: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """The share of the coefficient that counts in this step: 1 after `rising_steps`."""
        return ((state["l0_steps"] + 1) / max(1, self.rising_steps)).clamp(max=1)

    def price(self, state: Mapping[str, Tensor], l0: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """lambda, for penalties that grow with L0; `l0` of the batch."""
        assert self.highest is not None, "quadratic penalties have an aim"
        grown = self.start * (state["l0_integral"] + GAIN * self.miss(l0)).exp()
        return self.risen(state) * grown.clamp(max=self.highest)

    def aim(self, state: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """The L0 to which a quadratic penalty pulls."""
        return self.l0 * (-state["l0_integral"]).exp()

    @torch.no_grad()
    def update_buffers(
        self, buffers: Mapping[str, Tensor], passes: Sequence[Pass], across: Across = ALONE
    ) -> None:
        rows = sum(done.examples for done in passes)
        parts = [done.measured["l0"].double() * (done.examples / rows) for done in passes]
        miss = self.miss(torch.stack(parts).sum())
        miss = torch.where(self.risen(buffers) < 1, miss.clamp(max=0), miss)
        integral = buffers["l0_integral"]
        lowest, highest = -_FARTHEST, _FARTHEST
        if self.highest is not None:
            highest = math.log(self.highest / self.start)
            lowest = highest - math.log(_RANGE)
        integral.add_(self.rate * miss).clamp_(lowest, highest)
        buffers["l0_steps"].add_(1)

    def metadata(self) -> dict[str, Any]:
        """What the SAE's file says of its training."""
        return {"training_architecture": self.name, "l0_target": self.l0}
