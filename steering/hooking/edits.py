"""The edits a plan can make to a residual vector, all as a difference that is added.

For the chosen latents, with present value a_j and new value a'_j, the residual moves by
sum_j (a'_j - a_j) d_j: what the SAE does not reconstruct is left exactly as it was. A weight in
[0, 1] scales the move. The latents of an SAE that normalises tokens are in units of
the token's own scale (its standard deviation, or ||h|| / sqrt(D)), which multiplies the move.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.sae_file import SAE
from saesteer.checkpoints.sparse_autoencoder import token_scale
from saesteer.steering.hooking.latent_values import (
    LatentReader,
    SAEs,
    edit_reader,
    given_sae,
    matching_sae,
    needs_sae,
    on_device,
)
from saesteer.steering.hooking.tracking.passes import PassTokens
from saesteer.steering.plans.part import PlanPart


@dataclass(frozen=True, eq=False)
class EditPositions:
    """Which tokens of a pass are edited, and what an edit may depend on besides the residual.

    `tokens` and `prompt_lengths` give the position of each token relative to the end of its prompt.
    """

    mask: Bool[Tensor, "batch seq"] | None = None
    """True where to edit; None is everywhere."""
    weight: Float[Tensor, "batch seq"] | float | None = None
    """The share of the edit that is made at each token; None is all of it."""
    part_of_row: Int[Tensor, " batch"] | None = None
    """Which of the edit's parts each row follows, where it holds several."""
    tokens: PassTokens | None = None
    prompt_lengths: Int[Tensor, " batch"] | None = None
    """P of each row."""
    stops: Int[Tensor, " batch"] | None = None
    """The position in each row after the last one that the scope covers."""
    plain: Float[Tensor, "batch seq d_model"] | None = None
    """What the residual would be without any edit, for edits that ask for it."""


class Edit(ABC):
    """What is added to each residual vector, in float32."""

    @abstractmethod
    def delta(
        self, h: Float[Tensor, "batch seq d_model"], where: EditPositions
    ) -> Float[Tensor, "#batch #seq d_model"]:
        """What to add to `h` (float32); only the values at the edited positions are used."""


def make_edit(parts: Sequence[PlanPart], saes: SAEs = None, force: bool = False) -> Edit:
    """The edit of one part, or of several that add by the same method and unit.

    Methods that read latents use one of `saes`; where an SAE is needed and not given, it is loaded
    from the source that the part names. Raises UserError when that fails, UsageError when the
    directions cancel out.
    """
    first = parts[0]
    if first.does.sums:
        for part in parts:
            given = given_sae(part, saes)
            if given is not None:
                matching_sae(part, given, force)
        return SetToEdit(parts) if first.does.from_plain else AddEdit(parts)
    (part,) = parts
    sae = given_sae(part, saes)
    if sae is not None or (part.does.reads_latents and needs_sae(part)):
        sae = matching_sae(part, sae, force)
    if part.does.new_value is None:
        return ProjectEdit(part)
    return LatentEdit(part, part.does.new_value, edit_reader(part, sae), sae)


class AddEdit(Edit):
    """h + v, with v = sum_j alpha_j d_j added up beforehand; one v for each part, or for each of
    the last places of its scope."""

    def __init__(self, parts: Sequence[PlanPart]) -> None:
        self._relative = parts[0].unit == "rel"
        self._keep_norm = parts[0].does.keeps_norm
        # A share of ||h|| is the same share in any unit.
        self._normalization = "none" if self._relative else parts[0].sae.normalize_activations
        # [parts, places, d_model]
        self._vectors = torch.stack([part.added_vectors().float() for part in parts])

    def delta(
        self, h: Float[Tensor, "batch seq d_model"], where: EditPositions
    ) -> Float[Tensor, "#batch #seq d_model"]:
        moved = _share(self._vectors_at(h, where), where.weight)
        if self._normalization != "none":
            moved = moved * token_scale(h, self._normalization)
        if not (self._relative or self._keep_norm):
            return moved
        norms: Tensor = h.norm(dim=-1, keepdim=True)
        if self._relative:
            moved = moved * norms
        if self._keep_norm:
            added = h + moved
            # A vector that cancels h leaves no direction to rescale: it stays at 0.
            moved = added * (norms / added.norm(dim=-1, keepdim=True).clamp(min=1e-30)) - h
        return moved

    def _vectors_at(
        self, h: Float[Tensor, "batch seq d_model"], where: EditPositions
    ) -> Float[Tensor, "#batch #seq d_model"]:
        """v at each token, in the units of the part."""
        vectors = self._vectors = on_device({"vectors": self._vectors}, h.device)["vectors"]
        # Rows without a part, and tokens without a place, are never in the mask: any vector may
        # stand there.
        rows = torch.zeros(1, dtype=torch.int64, device=h.device)
        if len(vectors) > 1 and where.part_of_row is not None:
            rows = where.part_of_row.clamp(min=0)
        places = vectors.shape[1]
        if places == 1:
            return vectors[rows]
        assert where.tokens is not None and where.stops is not None
        place = where.tokens.p - where.stops[:, None] + places
        return vectors[rows[:, None], place.clamp(0, places - 1).to(h.device)]


class SetToEdit(AddEdit):
    """plain + v, whatever edits before this one have made of h."""

    def delta(
        self, h: Float[Tensor, "batch seq d_model"], where: EditPositions
    ) -> Float[Tensor, "batch seq d_model"]:
        plain = where.plain
        assert plain is not None
        moved = self._vectors_at(h, where)
        if self._normalization != "none":
            moved = moved * token_scale(plain, self._normalization)
        if self._relative:
            moved = moved * plain.norm(dim=-1, keepdim=True)
        return _share(plain + moved - h, where.weight)


class ProjectEdit(Edit):
    """h without its part in the span of the directions."""

    def __init__(self, part: PlanPart) -> None:
        self._basis = _basis(part.directions.float())

    def delta(
        self, h: Float[Tensor, "batch seq d_model"], where: EditPositions
    ) -> Float[Tensor, "#batch #seq d_model"]:
        basis = self._basis = on_device({"basis": self._basis}, h.device)["basis"]
        moved = torch.neg((h @ basis.T) @ basis)
        return _share(moved, where.weight)


class LatentEdit(Edit):
    """h + sum_j (a'_j - a_j) d_j, with a_j read from h."""

    def __init__(
        self,
        part: PlanPart,
        new_value: Callable[[Tensor, Tensor], Tensor],
        reader: LatentReader,
        sae: SAE | None,
    ) -> None:
        self._new_value, self._reader = new_value, reader
        self._normalization = part.sae.normalize_activations
        directions = part.directions.float()
        if sae is not None and sae.spec.rescale_acts_by_decoder_norm:
            # Such latents are given in units of their decoder row.
            directions = directions / directions.norm(dim=1, keepdim=True).clamp(min=1e-8)
        self._tensors = {"doses": torch.tensor(part.doses()), "directions": directions}

    def delta(
        self, h: Float[Tensor, "batch seq d_model"], where: EditPositions
    ) -> Float[Tensor, "#batch #seq d_model"]:
        t = self._tensors = on_device(self._tensors, h.device)
        mask, weight = where.mask, where.weight
        rows = h.flatten(0, 1) if mask is None else h[mask]
        now = self._reader.read(rows)
        moved = (self._new_value(now, t["doses"]) - now) @ t["directions"]
        if self._normalization != "none":
            moved = moved * token_scale(rows, self._normalization)
        if mask is None:
            return _share(moved.view_as(h), weight)
        if isinstance(weight, Tensor):
            weight = weight[mask]
        moved = _share(moved, weight)
        delta = torch.zeros_like(h)
        delta[mask] = moved
        return delta


def _share(moved: Tensor, weight: Tensor | float | None) -> Tensor:
    """A move scaled by its weight: one number, or one per vector."""
    if weight is None:
        return moved
    return moved * (weight[..., None] if isinstance(weight, Tensor) else weight)


def _basis(directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "rank d_model"]:
    """Orthonormal rows that span the directions; directions that repeat others add none."""
    _, sizes, rows = torch.linalg.svd(directions.double(), full_matrices=False)
    # Directions are float32: singular values below their rounding error do not count.
    kept: Tensor = rows[sizes > 1e-6 * sizes.max()]
    if sizes.max() == 0:
        raise UsageError("the plan's directions are all 0: choose other `latents`")
    return kept.float()
