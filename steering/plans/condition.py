"""When a plan acts at all: decided for each row on its prompt, before anything is edited."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saesteer.checkpoints.errors import UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class Condition:
    """A linear test of the unsteered model's residual h at a prompt's last token.

    The plan edits rows where h w + b > 0, and leaves the others exactly as they are. For a latent
    of a standard, JumpReLU or TopK encoder, w is its column and b its bias less a threshold: the
    latent's value before the activation function is above the threshold.
    """

    layer: int
    site: str = "resid_post"
    weight: Float[Tensor, " d_model"]
    bias: float
    source: str = "classifier"
    """What w is, such as `classifier` or `latent 412 of SAE`; for people."""

    def __post_init__(self) -> None:
        if self.weight.dim() != 1 or not bool(torch.isfinite(self.weight).all()):
            raise UserError(
                f"the weight of `when` has shape {list(self.weight.shape)} and must be one row of "
                "finite numbers: make the plan again"
            )

    def holds(self, h: Float[Tensor, "rows d_model"]) -> Bool[Tensor, " rows"]:
        """Whether it holds for residuals in float32."""
        return h @ self.weight.to(h.device, torch.float32) + self.bias > 0
