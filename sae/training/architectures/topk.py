"""The TopK sparse autoencoder (Gao et al., arXiv 2406.04093)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.kernels.ops import decode_mse, encode_topk, sort_indices
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
from saesteer.sae.training.auxiliary_loss import with_auxiliary_loss


@dataclass(frozen=True)
class TopK(Architecture):
    """Each example keeps its k largest positive pre-activations."""

    name: ClassVar[str] = "topk"

    k: int
    """Latents kept per token."""
    auxk: float = 0.0
    """Weight of the auxiliary loss of dead latents; 0 switches it off."""

    @classmethod
    def from_config(cls, config: TrainConfig) -> Sequence[Architecture]:
        refuse_others(config, *OF_PENALTIES, "prefixes")
        return [cls(k, config.auxk) for k in config.resolved_k]

    @property
    def settings(self) -> dict[str, Any]:
        return {"k": self.k}

    @property
    def uses_dead(self) -> bool:
        return self.auxk > 0

    def check(self, d_sae: int) -> None:
        if d_sae < self.k:
            raise UsageError(f"`d_sae` must be at least `k` ({self.k}), got {d_sae}")

    def initialise(
        self, d_in: int, d_out: int, d_sae: int, seed: int, device: torch.device
    ) -> Parameters:
        """Random unit decoder rows, the encoder tied to them, zero biases (appendix A.1).

        The data's mean is subtracted before the encoder, so 0 corresponds to a b_dec at the mean.
        Where input and target differ in width the encoder cannot be tied and is drawn as well.
        """
        rng = torch.Generator().manual_seed(seed)
        decoder = _unit_rows(d_sae, d_out, rng)
        encoder = decoder.clone() if d_in == d_out else _unit_rows(d_sae, d_in, rng)
        return {
            "W_enc_rows": encoder.to(device),
            "W_dec": decoder.to(device),
            "b_enc": torch.zeros(d_sae, device=device),
            "b_dec": torch.zeros(d_out, device=device),
        }

    @torch.no_grad()
    def loss(
        self,
        parameters: Parameters,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"],
        dead: DeadList | None,
    ) -> Pass:
        """L = mean |y - x^|^2 / O + auxk * AuxK(e), where e = y - x^ is held constant."""
        acts, indices, row_starts = self.entries(parameters, x)
        squared, error, act_grads = decode_mse(
            acts, indices, parameters["W_dec"], parameters["b_dec"], target, row_starts
        )
        squared_error = squared.sum()
        loss = squared_error / target.numel()
        loss, compact = with_auxiliary_loss(loss, parameters, x, error, dead, self.auxk)
        factor = 2 / max(1, target.numel())
        return Pass(
            loss=loss,
            squared_error=squared_error,
            squared_deviation=squared_deviation(target),
            examples=len(x),
            latent_acts=acts,
            latent_indices=indices,
            order=sort_indices(indices, len(parameters["W_dec"]), row_starts),
            decoder=EntrySum(acts, error),
            # The activation of an empty slot does not depend on anything.
            encoder=EntrySum(torch.where(acts != 0, act_grads, 0), x),
            factor=factor,
            row_starts=row_starts,
            dense={"b_dec": error.sum(dim=0) * factor},
            compact=compact,
        )

    def entries(
        self, parameters: Parameters, x: Float[Tensor, "batch d_in"]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Activations, latents, and where they are ragged the row starts; see `Pass`."""
        return *self.encode(parameters, x), None

    def encode(
        self, parameters: Parameters, x: Float[Tensor, "batch d_in"]
    ) -> tuple[Float[Tensor, "batch k"], Tensor]:
        """Activations and latents of the k slots of each example; empty slots hold 0."""
        return encode_topk(x, parameters["W_enc_rows"], parameters["b_enc"], self.k)

    def spec(self) -> dict[str, Any]:
        return {"architecture": self.name, "k": self.k}


def _unit_rows(rows: int, width: int, rng: torch.Generator) -> Float[Tensor, "rows width"]:
    """Random directions of length 1."""
    drawn = torch.randn(rows, width, generator=rng)
    return drawn.div_(drawn.norm(dim=1, keepdim=True))


def squared_deviation(y: Float[Tensor, "batch d_out"]) -> Float[Tensor, ""]:
    """sum |y - mean(y)|^2, as sum |y|^2 - |sum y|^2 / B: y~ is centred, so little cancels."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    squares: Tensor = torch.linalg.vector_norm(y, dtype=dtype).square()
    return squares - y.sum(dim=0, dtype=dtype).square().sum() / max(1, len(y))
