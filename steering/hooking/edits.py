"""The edits a plan can make to a residual vector, all as a difference that is added.

For the chosen latents, with present value a_j and new value a'_j, the residual moves by
sum_j (a'_j - a_j) d_j: what the SAE does not reconstruct stays as it was, exactly. A weight in
[0, 1] makes that share of the move. The latents of an SAE that normalises tokens are in units of
the token's own scale (its standard deviation, or ||h|| / sqrt(D)), which multiplies the move.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.sae_file import SAE
from saesteer.checkpoints.sparse_autoencoder import token_scale
from saesteer.steering.hooking.latent_values import (
    LatentReader,
    edit_reader,
    matching_sae,
    needs_sae,
    on_device,
)
from saesteer.steering.plans.methods import ADDING_METHODS
from saesteer.steering.plans.plan import Plan


class Edit(ABC):
    """What is added to each residual vector, in float32."""

    @abstractmethod
    def delta(
        self,
        h: Float[Tensor, "batch seq d_model"],
        mask: Bool[Tensor, "batch seq"] | None = None,
        weight: Float[Tensor, "batch seq"] | float | None = None,
        plan_of_row: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "#batch #seq d_model"]:
        """What to add to `h` (float32); right where `mask` is True, anything elsewhere.

        Args:
            mask: None is everywhere.
            weight: the share of the edit at each token; None makes all of it.
            plan_of_row: which of the edit's plans each row follows, where it holds several.
        """


def make_edit(plans: Sequence[Plan], sae: SAE | None = None, force: bool = False) -> Edit:
    """The edit of one plan, or of several that add by the same method and unit.

    `sae` serves methods that read latents; where one is needed and none is given, it is loaded from
    where the plan says. Raises UserError when it cannot be had, UsageError when the directions
    leave nothing to add.
    """
    first = plans[0]
    if first.method in ADDING_METHODS:
        if sae is not None:
            for plan in plans:
                matching_sae(plan, sae, force)
        return AddEdit(plans)
    (plan,) = plans
    if sae is not None or (plan.reads_latents and needs_sae(plan)):
        sae = matching_sae(plan, sae, force)
    if plan.method == "project":
        return ProjectEdit(plan)
    return LatentEdit(plan, edit_reader(plan, sae), sae)


class AddEdit(Edit):
    """h + v, with v = sum_j alpha_j d_j added up beforehand; one v for each plan."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._relative = plans[0].unit == "rel"
        self._keep_norm = plans[0].method == "add-keep-norm"
        # A share of ||h|| is the same share in any unit.
        self._normalization = "none" if self._relative else plans[0].sae.normalize_activations
        self._vectors = torch.stack([_sum(plan) for plan in plans])

    def delta(
        self,
        h: Float[Tensor, "batch seq d_model"],
        mask: Bool[Tensor, "batch seq"] | None = None,
        weight: Float[Tensor, "batch seq"] | float | None = None,
        plan_of_row: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "#batch #seq d_model"]:
        self._vectors = on_device({"vectors": self._vectors}, h.device)["vectors"]
        if len(self._vectors) == 1 or plan_of_row is None:
            moved = self._vectors[:1, None]
        else:
            # Rows without a plan are never in the mask; any vector will do there.
            moved = self._vectors[plan_of_row.clamp(min=0)][:, None]
        moved = _share(moved, weight)
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


class ProjectEdit(Edit):
    """h without its part in the span of the directions."""

    def __init__(self, plan: Plan) -> None:
        self._basis = _basis(plan.directions.float())

    def delta(
        self,
        h: Float[Tensor, "batch seq d_model"],
        mask: Bool[Tensor, "batch seq"] | None = None,
        weight: Float[Tensor, "batch seq"] | float | None = None,
        plan_of_row: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "#batch #seq d_model"]:
        basis = self._basis = on_device({"basis": self._basis}, h.device)["basis"]
        moved = torch.neg((h @ basis.T) @ basis)
        return _share(moved, weight)


class LatentEdit(Edit):
    """h + sum_j (a'_j - a_j) d_j, with a_j read from h."""

    def __init__(self, plan: Plan, reader: LatentReader, sae: SAE | None) -> None:
        self._method, self._reader = plan.method, reader
        self._normalization = plan.sae.normalize_activations
        directions = plan.directions.float()
        if sae is not None and sae.spec.rescale_acts_by_decoder_norm:
            # Such latents are given in units of their decoder row.
            directions = directions / directions.norm(dim=1, keepdim=True).clamp(min=1e-8)
        self._tensors = {"doses": torch.tensor(plan.doses()), "directions": directions}

    def delta(
        self,
        h: Float[Tensor, "batch seq d_model"],
        mask: Bool[Tensor, "batch seq"] | None = None,
        weight: Float[Tensor, "batch seq"] | float | None = None,
        plan_of_row: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "#batch #seq d_model"]:
        t = self._tensors = on_device(self._tensors, h.device)
        rows = h.flatten(0, 1) if mask is None else h[mask]
        now = self._reader.read(rows)
        moved = (new_values(self._method, now, t["doses"]) - now) @ t["directions"]
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


def new_values(
    method: str, now: Float[Tensor, "tokens n"], dose: Float[Tensor, " n"]
) -> Float[Tensor, "tokens n"]:
    """a' of each latent under a method that reads a."""
    match method:
        case "set":
            return dose.expand_as(now)
        case "min":
            return torch.maximum(now, dose)
        case "max":
            return torch.minimum(now, dose)
        case "scale":
            return now * dose
    return torch.zeros_like(now)


def _share(moved: Tensor, weight: Tensor | float | None) -> Tensor:
    """The part of a move that is made; a tensor weighs each vector."""
    if weight is None:
        return moved
    return moved * (weight[..., None] if isinstance(weight, Tensor) else weight)


def _sum(plan: Plan) -> Float[Tensor, " d_model"]:
    """sum_j alpha_j d_j; with unit `rel`, of length |scale|, to be multiplied by ||h||."""
    vector = torch.tensor(plan.doses(), dtype=torch.float64) @ plan.directions.double()
    length = float(vector.norm())
    if length == 0:
        raise UsageError(
            "the directions of the plan's latents cancel out, so nothing would be added: choose "
            "other `latents`"
        )
    if plan.unit == "rel":
        vector = vector * (plan.scale / length)
    return vector.float()


def _basis(directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "rank d_model"]:
    """Orthonormal rows that span the directions; directions that repeat others add none."""
    _, sizes, rows = torch.linalg.svd(directions.double(), full_matrices=False)
    # Directions are float32: what is smaller than their rounding is no direction of its own.
    kept: Tensor = rows[sizes > 1e-6 * sizes.max()]
    if sizes.max() == 0:
        raise UsageError("the plan's directions are all 0: choose other `latents`")
    return kept.float()
