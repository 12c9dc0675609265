"""The units that training works in, and the way back to raw activations.

Training sees x~ = a (x - mu), with mu the mean activation of a hook point and
a = sqrt(D) / mean ||x - mu||, both measured once at the start: centred data keeps latents alive,
and unit scale lets one learning rate serve every layer of every model. An SAE that reads or writes
several places has one such scale for each, so that no place dominates the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.places import Place


@dataclass(frozen=True)
class InputScale:
    """mu `[d_model]` and a of one hook point, in float64: x~ = a (x - mu)."""

    mean: Float[Tensor, " d_model"]
    factor: float

    @staticmethod
    def of(rows: Float[Tensor, "rows d_model"]) -> "InputScale":
        """The scale of a sample of raw activations."""
        wide = rows.double()
        mean = wide.mean(dim=0)
        length = (wide - mean).norm(dim=-1).mean().clamp_min(1e-12)
        return InputScale(mean, float(rows.shape[1] ** 0.5 / length))

    def to(self, device: torch.device) -> "InputScale":
        """The same scale with its mean on a device."""
        return InputScale(self.mean.to(device), self.factor)

    def apply(self, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_model"]:
        """x~ in float32."""
        return torch.sub(x.float(), self.mean.to(x.device, torch.float32)).mul_(self.factor)


@dataclass(frozen=True)
class PlacedRows:
    """A batch of activations of several hook points side by side."""

    values: Float[Tensor, "batch width"]
    columns: Mapping[Place, slice]
    """Which columns of `values` belong to a place."""

    def at(self, place: Place) -> Float[Tensor, "batch d_model"]:
        """The rows of one place; a view."""
        return self.values[:, self.columns[place]]

    @staticmethod
    def columns_of(places: Sequence[Place], d_model: int) -> dict[Place, slice]:
        """The columns of places that lie side by side in this order."""
        return {place: slice(at * d_model, (at + 1) * d_model) for at, place in enumerate(places)}
