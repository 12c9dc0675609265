"""The JumpReLU sparse autoencoder (Rajamanoharan et al., arXiv 2407.14435), with a target for L0.

A latent keeps its pre-activation h where that is above its own threshold: f = h 1[h > threshold].
A threshold learns through the pairs in the window |h - threshold| < bandwidth / 2 alone, whose
derivative by the threshold is taken to be that of a step as wide as the window. Only pairs that are
active or in the window take part. Penalties (`penalty`), beside the reconstruction:

- `quadratic`: W (L0 / aim - 1)^2 of the batch's mean L0;
- `quadratic-per-token`: W mean_b (L0_b / aim - 1)^2, Gemma Scope 2's and SAELens's form;
- `step`: lambda L0, the paper's;
- `tanh`: lambda sum tanh(c f), Anthropic's of January 2025, whose gradient goes through f, and
  through the window to the pre-activations as well (`to_input`).

The pre-activation loss, weight * sum over all latents of relu(threshold - h), keeps silent latents
within reach. Over all pairs it is linear, so that it is threshold - mean(x) W_enc - b_enc of each
latent, plus what the active pairs have too little: a product of two vectors and a sum over entries.

All in the units of x~, where the pre-activations of a unit row are about as spread as a normal
distribution: the thresholds start where that would have the target above them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.sae.config import JumpReLUConfig, TrainConfig
from saesteer.sae.training.architecture import ALL, Architecture, DeadList, Parameters, Pass
from saesteer.sae.training.architectures.topk import squared_deviation
from saesteer.sae.training.auxiliary_loss import with_auxiliary_loss
from saesteer.sae.training.l0_target import L0Target
from saesteer.sae.training.mesh.across import ALONE, Across
from saesteer.sae.training.pairs import Pairs, find_pairs

WEIGHT = 4.0
"""W, beside a reconstruction loss that starts near 1."""
SHARPNESS = 4.0
"""c of the tanh, in the units of x~."""


@dataclass(frozen=True)
class JumpReLU(L0Target):
    """Latents above thresholds that are trained to keep L0 at its target."""

    name: ClassVar[str] = "jumprelu"
    own_config: ClassVar[tuple[str, ...]] = ("jumprelu",)
    canonical_names: ClassVar[Mapping[str, str]] = {
        **Architecture.canonical_names,
        "threshold": "threshold",
    }
    lr_factors: ClassVar[Mapping[str, float]] = {"threshold": 10.0}

    options: JumpReLUConfig = JumpReLUConfig()
    dense_from: float | None = None
    """See `find_pairs`."""

    @classmethod
    def from_config(cls, config: TrainConfig) -> Sequence[Architecture]:
        found = super().from_config(config)
        if not config.jumprelu.log_threshold:
            return found
        return [cls.with_log_thresholds(one) for one in found if isinstance(one, JumpReLU)]

    @classmethod
    def own_settings(cls, config: TrainConfig) -> dict[str, Any]:
        return {"options": config.jumprelu}

    @staticmethod
    def with_log_thresholds(one: "JumpReLU") -> "JumpReLU":
        """The same, with thresholds that are trained as their logarithms."""
        return LogJumpReLU(**{field.name: getattr(one, field.name) for field in fields(one)})

    @property
    def start(self) -> float:
        if self.coefficient is not None:
            return self.coefficient
        # A tenth of the reconstruction loss at the start, when L0 is at its target.
        return WEIGHT if self.options.penalty.startswith("quadratic") else 0.1 / self.l0

    @property
    def highest(self) -> float | None:
        # L0* latents would cost four times the loss of a reconstruction by the mean.
        return None if self.options.penalty.startswith("quadratic") else 4 / self.l0

    def in_training_units(self, value: float, d_in: int) -> float:
        """A threshold or a bandwidth of `options` in the units of x~."""
        return value * d_in**0.5 if self.options.units == "unit" else value

    def shapes(self, d_in: int, d_out: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(d_in, d_out, d_sae), "threshold": (d_sae,)}

    def initialise(
        self,
        d_in: int,
        d_out: int,
        d_sae: int,
        seed: int,
        device: torch.device,
        own: slice = ALL,
    ) -> Parameters:
        """The matrices of `TopK`, and one threshold."""
        given, bandwidth = self.options.threshold, self.options.bandwidth
        if given is None:
            start = max(self.in_training_units(bandwidth, d_in), self.height(d_sae))
        else:
            start = self.in_training_units(given, d_in)
        made = super().initialise(d_in, d_out, d_sae, seed, device, own)
        return {**made, "threshold": torch.full((len(made["W_dec"]),), start, device=device)}

    def thresholds(self, parameters: Parameters) -> Float[Tensor, " d_sae"]:
        """The thresholds of the latents."""
        return parameters["threshold"]

    def ends(self, d_sae: int) -> tuple[int, ...]:
        """Where prefixes of latents end that reconstruct by themselves; empty for none."""
        return ()

    @torch.no_grad()
    def loss(
        self,
        parameters: Parameters,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"],
        dead: DeadList | None,
        across: Across = ALONE,
    ) -> Pass:
        """L = mean over levels of mean |y - x^|^2 / O, the penalties, and auxk * AuxK(e)."""
        options, W_dec = self.options, parameters["W_dec"]
        thresholds = self.thresholds(parameters)
        bandwidth = self.in_training_units(options.bandwidth, x.shape[1])
        ends = across.own_ends(self.ends(len(W_dec) * across.latent_parts), len(W_dec))
        size, rows = (max(1, n * across.row_parts) for n in (target.numel(), len(x)))
        pairs = find_pairs(x, parameters, thresholds - bandwidth / 2, self.dense_from, across)
        own = pairs.of_latents(thresholds)
        distance = pairs.pre_acts - own
        active = distance > 0
        acts = torch.where(active, pairs.pre_acts, 0)
        decoded = pairs.decode(acts, W_dec, parameters["b_dec"], target, ends)
        loss = decoded.squares.mean() / size
        loss, compact = with_auxiliary_loss(
            loss, parameters, x, decoded.last, dead, self.auxk, across
        )
        act_grads = decoded.act_grads * (2 / (size * decoded.levels))
        counted = active.to(acts.dtype)
        l0 = across.all(counted.sum()) / rows
        extra, by_value, by_step = self._penalty(parameters, pairs, acts, counted, l0)
        by_value = act_grads + by_value
        window = distance.abs() < bandwidth / 2
        pull = torch.where(window, (own * by_value + by_step) / bandwidth, 0)
        derivatives = torch.where(active, by_value, 0)
        if options.to_input:
            derivatives = derivatives + pull
        dense = {}
        by_threshold = -pairs.by_latent(pull)
        if options.pre_act_loss:
            # Published beside a reconstruction loss that is a sum over d_model.
            width = x.shape[1] if options.units == "sqrt_d" else x.shape[1] ** 0.5
            weight = options.pre_act_loss / width * self.risen(parameters).to(acts.dtype)
            # What is of all pairs is of each process's share of the rows.
            mean, weight = x.to(acts.dtype).mean(dim=0), weight / across.row_parts
            short = thresholds - parameters["W_enc_rows"].to(acts.dtype) @ mean
            short = (short - parameters["b_enc"]).sum() + (distance * counted).sum() / len(x)
            extra = extra + weight * short
            derivatives = derivatives + counted * (weight / len(x))
            dense["W_enc_rows"] = (-weight * mean).expand(len(W_dec), -1)
            dense["b_enc"] = -weight.expand(len(W_dec))
            by_threshold += weight - pairs.by_latent(counted) * (weight / len(x))
        dense["threshold"] = by_threshold
        return pairs.as_pass(
            acts,
            decoded,
            derivatives,
            loss=loss + extra,
            squared_error=decoded.squares[-1],
            squared_deviation=squared_deviation(target, across),
            examples=len(x),
            dense=self.as_trained(dense, parameters),
            compact=compact,
            measured={"l0": l0},
        )

    def _penalty(
        self, state: Parameters, pairs: Pairs, acts: Tensor, counted: Tensor, l0: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The penalties' value, and by pair what it would grow by with the activation and with one
        pair more."""
        across = pairs.across
        batch, kind = len(pairs.x) * across.row_parts, acts.dtype
        nothing = acts.new_zeros(())
        by_value, by_step = nothing, nothing
        match self.options.penalty:
            case "quadratic":
                aim = self.aim(state).to(kind)
                weight = self.start * self.risen(state).to(kind)
                value = weight * (l0 / aim - 1).square()
                by_step = 2 * weight * (l0 / aim - 1) / (aim * batch)
            case "quadratic-per-token":
                aim = self.aim(state).to(kind)
                weight = self.start * self.risen(state).to(kind)
                excess = across.latents(pairs.by_example(counted)) / aim - 1
                value = weight * excess.square().mean() / across.row_parts
                by_step = pairs.of_examples(2 * weight * excess / (aim * batch))
            case "step":
                price = self.price(state, l0).to(kind)
                value, by_step = price * l0, price / batch
            case _:
                price = self.price(state, l0).to(kind)
                heights = (SHARPNESS * acts).tanh()
                value = price * heights.sum() / batch
                by_value = price * SHARPNESS * (1 - heights.square()) / batch
        if self.options.frequency:
            # It gives way where too few are active.
            given_way = self.risen(state) * state["l0_integral"].clamp(max=0).exp()
            weight = self.options.frequency * given_way.to(kind)
            knee = self.options.frequency_knee
            often = across.rows(pairs.by_latent(counted)) / batch
            value = value + weight * (often * (1 + often / knee)).sum()
            by_step = by_step + pairs.of_latents(weight * (1 + 2 * often / knee) / batch)
        return value, by_value, by_step

    def as_trained(self, dense: dict[str, Tensor], parameters: Parameters) -> dict[str, Tensor]:
        """Gradients by the thresholds as gradients by what is trained."""
        return dense

    def after_step(self, parameters: Parameters) -> None:
        """A threshold is never negative."""
        parameters["threshold"].clamp_(min=0)

    def spec(self) -> dict[str, Any]:
        return {"architecture": "jumprelu", "metadata": self.metadata()}


@dataclass(frozen=True)
class LogJumpReLU(JumpReLU):
    """JumpReLU whose parameter is the logarithm of the threshold, as Anthropic trains it."""

    canonical_names: ClassVar[Mapping[str, str]] = {
        **Architecture.canonical_names,
        "log_threshold": "log_threshold",
    }
    lr_factors: ClassVar[Mapping[str, float]] = {"log_threshold": 10.0}

    def shapes(self, d_in: int, d_out: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        return {**Architecture.shapes(self, d_in, d_out, d_sae), "log_threshold": (d_sae,)}

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
        return {**made, "log_threshold": made.pop("threshold").log()}

    def thresholds(self, parameters: Parameters) -> Float[Tensor, " d_sae"]:
        return parameters["log_threshold"].exp()

    def as_trained(self, dense: dict[str, Tensor], parameters: Parameters) -> dict[str, Tensor]:
        grad = dense.pop("threshold") * self.thresholds(parameters)
        return {**dense, "log_threshold": grad}

    def after_step(self, parameters: Parameters) -> None:
        """A logarithm has no bounds."""
