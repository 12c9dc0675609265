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

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.places import Place

_ROWS_AT_ONCE = 2048
# Rows between these lengths have squares and sums of squares in float32.
_SHORTEST, _LONGEST = 1e-12, 1e15
# Less than this much of their length is rounding, not variation.
_LEAST_VARIATION = 1e-6
_MANY = 0.1


def check_sample(
    rows: Float[Tensor, "rows d_model"], place: Place, sinks: int, drawn: int
) -> list[str]:
    """What to warn of before training on such rows; `sinks` of `drawn + sinks` were left out.

    Raises UserError where nothing sensible can be learnt: rows that do not vary, or whose lengths
    float32 cannot square.
    """
    where = f"layer {place[0]} {place[1]}"
    norms = torch.cat([piece.double().norm(dim=-1) for piece in rows.split(_ROWS_AT_ONCE)])
    zeros = int((norms == 0).sum())
    if zeros == len(norms):
        raise UserError(f"the activations of {where} are all zero: harvest again, or another layer")
    typical = float(norms[norms > 0].median())
    if not _SHORTEST <= typical <= _LONGEST:
        raise UserError(
            f"the activations of {where} have a typical length of {typical:.1g}, with which "
            f"float32 cannot compute ({_SHORTEST:g} to {_LONGEST:g} can be trained on): scale them "
            "before they are stored"
        )
    variation = 1 / InputScale.of(rows).factor * rows.shape[1] ** 0.5
    if variation < _LEAST_VARIATION * typical:
        raise UserError(
            f"the activations of {where} do not vary (by {variation:.1g}, of a length of "
            f"{typical:.1g}): there is nothing to learn; look at the text and the site"
        )
    found = []
    if zeros > _MANY * len(norms):
        found.append(
            f"{100 * zeros / len(norms):.0f} % of the activations of {where} are zeros: they are "
            "trained on like the others, and make FVU and L0 smaller than those of text"
        )
    if sinks > _MANY * (sinks + drawn):
        found.append(
            f"{100 * sinks / (sinks + drawn):.0f} % of the rows were left out as attention sinks: "
            "are there two kinds of text? `max_norm_ratio` sets the limit"
        )
    return found


@dataclass(frozen=True)
class InputScale:
    """mu `[d_model]` and a of one hook point, in float64: x~ = a (x - mu)."""

    mean: Float[Tensor, " d_model"]
    factor: float

    @staticmethod
    def of(rows: Float[Tensor, "rows d_model"]) -> "InputScale":
        """Measure a sample of activations, some rows at a time: float64 copies are large."""
        pieces = rows.split(_ROWS_AT_ONCE)
        mean = sum(piece.double().sum(dim=0) for piece in pieces) / len(rows)
        lengths = sum(float((piece.double() - mean).norm(dim=-1).sum()) for piece in pieces)
        length = max(lengths / len(rows), 1e-12)
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

    def part(self, number: int, parts: int) -> "PlacedRows":
        """One of several parts of the rows, as equal as can be."""
        if parts == 1:
            return self
        return PlacedRows(self.values.tensor_split(parts)[number], self.columns)

    def at(self, place: Place) -> Float[Tensor, "batch d_model"]:
        """The rows of one place; a view."""
        return self.values[:, self.columns[place]]

    @staticmethod
    def columns_of(places: Sequence[Place], width: int | Mapping[Place, int]) -> dict[Place, slice]:
        """The columns of places that lie side by side in this order; `width` is that of all of
        them, or of each."""
        columns, at = {}, 0
        for place in places:
            end = at + (width if isinstance(width, int) else width[place])
            columns[place] = slice(at, end)
            at = end
        return columns
