"""The TopK sparse autoencoder (Gao et al., arXiv 2406.04093)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.kernels.ops import encode_topk, sort_indices
from saesteer.sae.config import TrainConfig
from saesteer.sae.training.architecture import (
    ALL,
    OF_PENALTIES,
    Architecture,
    DeadList,
    EntrySum,
    Parameters,
    Pass,
    refuse_others,
)
from saesteer.sae.training.auxiliary_loss import with_auxiliary_loss
from saesteer.sae.training.mesh.across import ALONE, Across
from saesteer.sae.training.mesh.choice import of_examples
from saesteer.sae.training.mesh.decoding import decode


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
        self,
        d_in: int,
        d_out: int,
        d_sae: int,
        seed: int,
        device: torch.device,
        own: slice = ALL,
    ) -> Parameters:
        """Random unit decoder rows, the encoder tied to them, zero biases (appendix A.1).

        The data's mean is subtracted before the encoder, so 0 corresponds to a b_dec at the mean.
        Where input and target differ in width the encoder cannot be tied and is drawn as well.
        """
        rng = torch.Generator().manual_seed(seed)
        decoder = _unit_rows(d_sae, d_out, rng, own)
        encoder = decoder.clone() if d_in == d_out else _unit_rows(d_sae, d_in, rng, own)
        return {
            "W_enc_rows": encoder.to(device),
            "W_dec": decoder.to(device),
            "b_enc": torch.zeros(len(decoder), device=device),
            "b_dec": torch.zeros(d_out, device=device),
        }

    @torch.no_grad()
    def loss(
        self,
        parameters: Parameters,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"],
        dead: DeadList | None,
        across: Across = ALONE,
    ) -> Pass:
        """L = mean |y - x^|^2 / O + auxk * AuxK(e), where e = y - x^ is held constant."""
        acts, indices, row_starts = self.entries(parameters, x, across)
        squared, error, act_grads = decode(
            acts, indices, parameters["W_dec"], parameters["b_dec"], target, row_starts, across
        )
        squared_error = squared.sum()
        size = target.numel() * across.row_parts
        loss = squared_error / size
        loss, compact = with_auxiliary_loss(loss, parameters, x, error, dead, self.auxk, across)
        factor = 2 / max(1, size)
        return Pass(
            loss=loss,
            squared_error=squared_error,
            squared_deviation=squared_deviation(target, across),
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
        self,
        parameters: Parameters,
        x: Float[Tensor, "batch d_in"],
        across: Across = ALONE,
        examples: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Activations, latents, and where they are ragged the row starts; see `Pass`.

        `examples`: how many all processes have, where not all have as many as this one.
        """
        if across.latent_parts == 1:
            return *self.encode(parameters, x), None
        return of_examples(*self.encode(parameters, x), self.k, across)

    def encode(
        self, parameters: Parameters, x: Float[Tensor, "batch d_in"]
    ) -> tuple[Float[Tensor, "batch k"], Tensor]:
        """Activations and latents of the k slots of each example; empty slots hold 0."""
        W, b = parameters["W_enc_rows"], parameters["b_enc"]
        return encode_topk(x, W, b, min(self.k, len(b)))

    def spec(self) -> dict[str, Any]:
        return {"architecture": self.name, "k": self.k}


# Rows that are drawn at once where only some are kept. A multiple of 16: torch draws normal numbers
# in groups of 16, so that pieces hold what one draw of all would.
_DRAWN_ROWS = 4096


def _unit_rows(
    rows: int, width: int, rng: torch.Generator, own: slice = ALL
) -> Float[Tensor, "own_rows width"]:
    """Random directions of length 1; only some of the rows, drawn as if all were."""
    if own == ALL:
        drawn = torch.randn(rows, width, generator=rng)
        return drawn.div_(drawn.norm(dim=1, keepdim=True))
    first, last, _ = own.indices(rows)
    kept, at = torch.empty(last - first, width), 0
    while at < rows:
        # No piece of less than 16 rows is left over: a last group overlaps the one before it.
        end = rows if rows - at < 2 * _DRAWN_ROWS else at + _DRAWN_ROWS
        piece = torch.randn(end - at, width, generator=rng)
        here = slice(max(first, at), min(last, end))
        if here.start < here.stop:
            kept[here.start - first : here.stop - first] = piece[here.start - at : here.stop - at]
        at = end
    return kept.div_(kept.norm(dim=1, keepdim=True))


def squared_deviation(y: Float[Tensor, "batch d_out"], across: Across = ALONE) -> Float[Tensor, ""]:
    """sum |y - mean(y)|^2 over the rows of all processes, as sum |y|^2 - |sum y|^2 / B: y~ is
    centred, so little cancels."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    squares: Tensor = torch.linalg.vector_norm(y, dtype=dtype).square()
    total, count = y.sum(dim=0, dtype=dtype), max(1, len(y))
    if across.row_parts > 1:
        sums = across.rows(torch.cat([squares[None], total]))
        squares, total, count = sums[0], sums[1:], count * across.row_parts
    return squares - total.square().sum() / count
