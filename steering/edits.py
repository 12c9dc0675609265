"""The edits a plan can make to a residual vector, all as a difference that is added.

For the chosen latents, with present value a_j and new value a'_j, the residual moves by
sum_j (a'_j - a_j) d_j: what the SAE does not reconstruct stays as it was, exactly.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, load_sae
from saesteer.steering.plan import Plan, encoder_columns

# Dense latents of so many numbers at most exist at a time (64 MiB in float32).
_ENCODE_NUMBERS = 2**24


class Edit:
    """What a plan adds to each residual vector, in float32.

    Raises UserError when the method needs an SAE that cannot be had, UsageError when the
    directions leave nothing to add.
    """

    def __init__(self, plan: Plan, sae: SAE | None = None, force: bool = False) -> None:
        self.plan = plan
        self._sae: SAE | None = None
        directions = plan.directions.float()
        doses = torch.tensor(plan.doses(), dtype=torch.float64)
        tensors: dict[str, Tensor] = {"doses": doses.float(), "directions": directions}
        if sae is not None or (plan.reads_latents and plan.sae.architecture == "topk"):
            sae = _matching_sae(plan, sae, force)
        if plan.method == "add":
            tensors = {"vector": _sum(plan, doses)}
        elif plan.method == "project":
            tensors = {"basis": _basis(directions)}
        else:
            if plan.sae.architecture == "topk":
                assert sae is not None
                self._sae = sae
                if sae.spec.rescale_acts_by_decoder_norm:
                    # Such latents are given in units of their decoder row.
                    norms = directions.norm(dim=1, keepdim=True).clamp(min=1e-8)
                    tensors["directions"] = directions / norms
            else:
                tensors.update(_encoder(plan, sae))
        self._tensors = tensors

    def delta(
        self, h: Float[Tensor, "batch seq d_model"], mask: Bool[Tensor, "batch seq"]
    ) -> Float[Tensor, "#batch #seq d_model"]:
        """What to add to `h` (float32); right where `mask` is True, anything elsewhere."""
        plan = self.plan
        t = self._on(h.device)
        if plan.method == "add":
            if plan.unit == "rel":
                norms: Tensor = h.norm(dim=-1, keepdim=True)
                return t["vector"] * norms
            return t["vector"].expand(1, 1, -1)
        if plan.method == "project":
            return torch.neg((h @ t["basis"].T) @ t["basis"])
        chosen = h[mask]
        now = self._latents(chosen)
        moved = (self._new_value(now, t["doses"]) - now) @ t["directions"]
        delta = torch.zeros_like(h)
        delta[mask] = moved
        return delta

    def _new_value(
        self, now: Float[Tensor, "tokens n"], dose: Float[Tensor, " n"]
    ) -> Float[Tensor, "tokens n"]:
        match self.plan.method:
            case "set":
                return dose.expand_as(now)
            case "min":
                return torch.maximum(now, dose)
            case "max":
                return torch.minimum(now, dose)
            case "scale":
                return now * dose
        return torch.zeros_like(now)

    def _latents(self, h: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens n"]:
        """The chosen latents' present values."""
        ids = list(self.plan.ids)
        if self._sae is None:
            t = self._on(h.device)
            q = h @ t["W_enc"] + t["b_enc"]
            return torch.relu(q) * (q > t["threshold"]) if "threshold" in t else torch.relu(q)
        sae = self._sae = self._sae.to(h.device, torch.float32)
        step = max(1, _ENCODE_NUMBERS // sae.spec.d_sae)
        parts = [sae.encode(piece)[:, ids] for piece in torch.split(h, step)]
        return torch.cat(parts) if parts else h.new_zeros((0, len(ids)))

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        """The edit's tensors on a device, moved at the first use there."""
        if any(tensor.device != device for tensor in self._tensors.values()):
            # Not as inference tensors: the same plan may be used later where gradients are taken.
            with torch.inference_mode(False):
                self._tensors = {name: t.to(device) for name, t in self._tensors.items()}
        return self._tensors


def _sum(plan: Plan, doses: Float[Tensor, " n"]) -> Float[Tensor, " d_model"]:
    """sum_j alpha_j d_j; with unit `rel`, of length |scale|, to be multiplied by ||h||."""
    vector = doses @ plan.directions.double()
    length = float(vector.norm())
    if length == 0:
        raise UsageError(
            "the directions of the plan's latents cancel out, so nothing would be added: choose "
            "other --latents"
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
        raise UsageError("the plan's directions are all 0: choose other --latents")
    return kept.float()


def _encoder(plan: Plan, sae: SAE | None) -> dict[str, Tensor]:
    if sae is not None:
        return encoder_columns(sae, plan.ids)
    if plan.W_enc is None or plan.b_enc is None:
        raise UserError(
            f"--method {plan.method} reads the latents and the plan holds no encoder: give --sae"
        )
    if plan.sae.architecture == "jumprelu" and plan.threshold is None:
        raise UserError("the plan of a jumprelu SAE holds no threshold: give --sae")
    return {name: tensor.float() for name, tensor in plan.tensors().items() if name != "directions"}


def _matching_sae(plan: Plan, sae: SAE | None, force: bool) -> SAE:
    """The SAE that the plan was made from: the one given, or the one at the plan's source."""
    if sae is None:
        try:
            sae = load_sae(plan.sae.source)
        except UserError as error:
            raise UserError(
                f"--method {plan.method} with a TopK SAE needs the SAE itself, and the plan's "
                f"could not be opened ({error}): give --sae"
            ) from error
    if sae.sha256 != plan.sae.sha256 and not force:
        raise UserError(
            f"--sae {sae.source} is not the one the plan was made from ({plan.sae.source}): its "
            "weights differ; give that SAE, or --force"
        )
    if sae.spec.d_model != plan.model.d_model or sae.spec.d_sae <= max(plan.ids):
        raise UserError(
            f"--sae {sae.source} has d_model {sae.spec.d_model} and {sae.spec.d_sae} latents, "
            f"which does not fit the plan: give {plan.sae.source}"
        )
    return sae
