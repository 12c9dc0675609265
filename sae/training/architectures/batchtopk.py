"""The BatchTopK sparse autoencoder (Bussmann et al., arXiv 2412.06410).

A batch of B examples keeps its B k largest pre-activations, many of one example and few of another.
Outside training there is no batch: a latent is then active above one threshold, so the SAE is
written as a JumpReLU. During training the threshold follows the smallest activation kept; at the
end it is set so that rows which were not trained on have k active latents on average.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.kernels.ops import encode_batchtopk
from saesteer.sae.training.architecture import DeadList, Parameters, Pass
from saesteer.sae.training.architectures.topk import TopK
from saesteer.sae.training.mesh.across import ALONE, Across
from saesteer.sae.training.mesh.choice import of_batch

# The average remembers about 1 / (1 - _KEPT) steps.
_KEPT = 0.95
# Pre-activations that exist at once while L0 is counted: 64 MiB in float32.
_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class BatchTopK(TopK):
    """The examples of a pass together keep their largest positive pre-activations, k on average."""

    name: ClassVar[str] = "batchtopk"
    canonical_buffers: ClassVar[Mapping[str, str]] = {"threshold": "threshold"}
    calibrates: ClassVar[bool] = True
    sae_lens_name: ClassVar[str] = "batchtopk"
    """What SAELens calls the architecture that was trained."""

    def buffers(self, d_sae: int, device: torch.device) -> dict[str, Tensor]:
        """The threshold, and the average that it is while training: its sum, and the weights'."""
        sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in _AVERAGE}
        return {"threshold": torch.zeros(d_sae, device=device), **sums}

    def entries(
        self,
        parameters: Parameters,
        x: Float[Tensor, "batch d_in"],
        across: Across = ALONE,
        examples: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        W, b = parameters["W_enc_rows"], parameters["b_enc"]
        if across is ALONE:
            return encode_batchtopk(x, W, b, self.k)
        return of_batch(
            lambda asked: encode_batchtopk(x, W, b, asked),
            self.k * (len(x) * across.row_parts if examples is None else examples),
            most=len(b),
            mean=self.k / across.latent_parts,
            across=across,
        )

    @torch.no_grad()
    def loss(
        self,
        parameters: Parameters,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"],
        dead: DeadList | None,
        across: Across = ALONE,
    ) -> Pass:
        """The loss of `TopK`, over all entries of the batch."""
        done = super().loss(parameters, x, target, dead, across)
        done.measured["least"] = least_activation(done.latent_acts, across)
        return done

    @torch.no_grad()
    def update_buffers(
        self, buffers: Mapping[str, Tensor], passes: Sequence[Pass], across: Across = ALONE
    ) -> None:
        """Average the smallest activation kept; divided by the weights so far, so from step 1."""
        least = torch.stack([done.measured["least"] for done in passes]).double().mean()
        known = least.isfinite()  # infinite where nothing was positive
        total, weight = (buffers[name] for name in _AVERAGE)
        total.copy_(torch.where(known, _KEPT * total + (1 - _KEPT) * least, total))
        weight.copy_(torch.where(known, _KEPT * weight + (1 - _KEPT), weight))
        buffers["threshold"].copy_(total / weight.clamp_min(1e-9))

    def calibrate(
        self,
        parameters: Parameters,
        buffers: Mapping[str, Tensor],
        x: Float[Tensor, "rows d_in"],
        across: Across = ALONE,
    ) -> dict[str, float]:
        """Set the threshold so that exactly k latents an example of `x` are above it."""
        average = buffers["threshold"].clone()
        rows = int(across.rows(torch.tensor(len(x), device=x.device)))
        least = least_activation(self.entries(parameters, x, across, rows)[0], across)
        if least.isfinite():
            # Just below: a latent is active above the threshold, not at it.
            buffers["threshold"].copy_(torch.nextafter(least, torch.zeros_like(least)))
        before, after = mean_l0(parameters, x, average, buffers["threshold"], across=across)
        return {
            "held_out_l0": after,
            "held_out_l0_of_average": before,
            "threshold": float(buffers["threshold"][0]),
            "threshold_average": float(average[0]),
        }

    @property
    def sae_lens_details(self) -> dict[str, Any]:
        """Its settings under SAELens' names."""
        return {"k": self.k}

    def spec(self) -> dict[str, Any]:
        return {
            "architecture": "jumprelu",
            "metadata": {
                "training_architecture": self.sae_lens_name,
                "training_architecture_details": self.sae_lens_details,
                "k": self.k,
            },
        }


_AVERAGE = ("threshold_sum", "threshold_weight")


def least_activation(acts: Tensor, across: Across = ALONE) -> Tensor:
    """The smallest activation of all processes that is not 0; infinite where there is none."""
    acts = torch.nn.functional.pad(acts, (0, 1)) if across is not ALONE else acts  # perhaps none
    return across.least(torch.where(acts > 0, acts, torch.inf).amin())


def mean_l0(
    parameters: Parameters,
    x: Float[Tensor, "rows d_in"],
    *thresholds: Float[Tensor, " d_sae"],
    across: Across = ALONE,
) -> list[float]:
    """How many latents of an example are above each of several thresholds, on average."""
    W, b = parameters["W_enc_rows"], parameters["b_enc"]
    counts = torch.zeros(len(thresholds), dtype=torch.int64, device=x.device)
    for rows in x.split(max(1, _CHUNK_ELEMENTS // len(W))):
        pre_acts = rows @ W.t() + b
        counts += torch.stack([(pre_acts > threshold).sum() for threshold in thresholds])
    examples = int(across.rows(torch.tensor(len(x), device=x.device)))
    return [count / max(1, examples) for count in across.all(counts).tolist()]
