"""One part of a plan: latents or directions at one place of the model, and how they act there."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_spec import TOKEN_NORMALIZATIONS
from saesteer.steering.hooking.gates import Gate, parse_gate
from saesteer.steering.hooking.scope import IN_PROMPT, parse_scope
from saesteer.steering.plans.latents import PlannedLatent, check_doses, check_latents, doses
from saesteer.steering.plans.methods import METHODS, Method
from saesteer.steering.plans.schedules import parse_schedule


@dataclass(frozen=True)
class SAEIdentity:
    """The SAE that a part's latents come from."""

    source: str
    sha256: str
    architecture: str = "topk"
    k: int | None = None
    normalize_activations: str = "none"
    """How the SAE scales each token before encoding it; added directions are scaled back."""

    def __post_init__(self) -> None:
        if self.normalize_activations not in ("none", *TOKEN_NORMALIZATIONS):
            raise UserError(
                f"sae.normalize_activations is {self.normalize_activations!r}; known are none, "
                f"{', '.join(TOKEN_NORMALIZATIONS)}: make the plan again"
            )

    @property
    def scales_tokens(self) -> bool:
        """Whether the unit of a latent differs from token to token."""
        return self.normalize_activations != "none"


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanPart:
    """Latents with their directions and doses, and where in the model and the text they act."""

    sae: SAEIdentity
    site: str
    layer: int
    latents: tuple[PlannedLatent, ...]
    directions: Float[Tensor, "n d_model"]
    """Rows of W_dec, exactly as stored in the SAE's file, in the order of `latents`."""
    method: str = "add"
    """A name in `methods.METHODS`."""
    unit: str = "raw"
    scale: float = 1.0
    """Multiplies every dose; 0 switches the part off. With unit `rel`, the relative dose."""
    beta: float = 0.0
    scope: str = "generation"
    schedule: str = "constant"
    """How the strength changes while text is generated; see `schedules`."""
    gate: str = ""
    """A condition on latents under which the scope's positions are edited; see `gates`."""
    W_enc: Float[Tensor, "d_model n"] | None = None
    """Encoder columns with the input's centering folded in; None where they are not enough."""
    b_enc: Float[Tensor, " n"] | None = None
    threshold: Float[Tensor, " n"] | None = None
    """Thresholds of a JumpReLU SAE."""
    by_place: Float[Tensor, "places n"] | None = None
    """For scopes inside the prompt: the share of each latent's dose at each of the scope's last
    tokens, the last row at its last token; tokens before these are left alone. None: every token
    gets the whole dose."""
    gate_ids: tuple[int, ...] = ()
    """The latents of the `gate_` tensors: those that the gate reads, or none."""
    gate_W_enc: Float[Tensor, "d_model gated"] | None = None
    """Encoder columns of the gate's latents, as `W_enc`; None where the gate needs the SAE."""
    gate_b_enc: Float[Tensor, " gated"] | None = None
    gate_threshold: Float[Tensor, " gated"] | None = None

    def __post_init__(self) -> None:
        check_latents(self.latents)
        parse_scope(self.scope)
        parse_schedule(self.schedule)
        if self.gate_ids and self.gate_ids != (self.parsed_gate.ids if self.gate else ()):
            raise UserError(
                f"the plan holds encoder columns of the latents {list(self.gate_ids)} and its gate "
                f"is {self.gate!r}: change a gate with steering.with_gate, or `gate`"
            )
        self._check_tensors()
        self._check_in_prompt()
        check_doses(
            self.latents, method=self.method, unit=self.unit, scale=self.scale, beta=self.beta
        )

    def _check_in_prompt(self) -> None:
        """Raise UsageError where something needs a scope inside the prompt and has another."""
        does = METHODS.get(self.method)
        by_place = self.by_place is not None
        if does is None or not (does.from_plain or by_place):
            return
        what = "doses by place in the prompt" if by_place else f"`method` {self.method}"
        kinds = tuple(kind for kind in IN_PROMPT if not (by_place and kind == "prompt"))
        if parse_scope(self.scope).kind not in kinds:
            raise UsageError(
                f"{what} are for positions of the prompt, and `scope` is {self.scope}: use one of "
                f"{', '.join(kinds)}"
            )
        if by_place and (not does.sums or self.unit == "rel"):
            raise UsageError(
                f"{what} weigh a vector that is added, and this part has `method` {self.method}, "
                f"`unit` {self.unit}: use add, add-keep-norm or set-to, with another unit than rel"
            )

    def _check_tensors(self) -> None:
        n, width, gated = len(self.latents), self.directions.shape[-1], len(self.gate_ids)
        places = 0 if self.by_place is None else len(self.by_place)
        shapes = {
            "directions": (n, width),
            "W_enc": (width, n),
            "b_enc": (n,),
            "threshold": (n,),
            "by_place": (max(places, 1), n),
            "gate_W_enc": (width, gated),
            "gate_b_enc": (gated,),
            "gate_threshold": (gated,),
        }
        for name, tensor in self.tensors().items():
            if tuple(tensor.shape) != shapes[name]:
                raise UserError(
                    f"{name} has shape {list(tensor.shape)}, but {n} latents with directions of "
                    f"width {width} need {list(shapes[name])}: make the plan again"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(f"{name} holds NaN or infinity: make the plan again")

    @property
    def where(self) -> str:
        """Layer and scope, for messages."""
        return f"layer {self.layer}, {self.scope}"

    @property
    def does(self) -> Method:
        """The properties of the part's method."""
        return METHODS[self.method]

    @property
    def ids(self) -> tuple[int, ...]:
        """The numbers of the latents, in their order."""
        return tuple(latent.id for latent in self.latents)

    @property
    def parsed_gate(self) -> Gate:
        """The gate, parsed. Only for parts with a gate."""
        return parse_gate(self.gate)

    def doses(self) -> list[float]:
        """One number per latent, in the order of `latents`; see `latents.doses`."""
        return doses(
            self.latents, method=self.method, unit=self.unit, scale=self.scale, beta=self.beta
        )

    def added_vector(self) -> Float[Tensor, " d_model"]:
        """The vector that an adding method adds to each residual, in float64: sum_j alpha_j d_j.

        With unit `rel` it has length |scale| and is multiplied by ||h|| when added; with an SAE
        that normalises tokens it is multiplied by the token's scale. Raises UsageError when the
        directions cancel out.
        """
        vector = weighted_sum(self.doses(), self.directions)
        if self.scale == 0:
            return torch.zeros_like(vector)
        length = float(vector.norm())
        if length == 0:
            raise UsageError(
                "the directions of the plan's latents cancel out, so nothing would be added: "
                "choose other `latents`"
            )
        return vector * (self.scale / length) if self.unit == "rel" else vector

    def added_vectors(self) -> Float[Tensor, "places d_model"]:
        """`added_vector` at each place, in float64; one row where all places are alike."""
        if self.by_place is None:
            return self.added_vector()[None]
        shares = self.by_place.double() * torch.tensor(self.doses(), dtype=torch.float64)
        return shares @ self.directions.double()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the part holds, by name."""
        everything = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in everything.items() if tensor is not None}

    def select(self, indices: Sequence[int]) -> "PlanPart":
        """The part with only the latents at these indices of `latents`, in this order."""
        picked = list(indices)
        return replace(
            self,
            latents=tuple(self.latents[i] for i in picked),
            directions=self.directions[picked],
            W_enc=None if self.W_enc is None else self.W_enc[:, picked],
            b_enc=None if self.b_enc is None else self.b_enc[picked],
            threshold=None if self.threshold is None else self.threshold[picked],
            by_place=None if self.by_place is None else self.by_place[:, picked],
        )


TENSORS = (
    "directions",
    "W_enc",
    "b_enc",
    "threshold",
    "by_place",
    "gate_W_enc",
    "gate_b_enc",
    "gate_threshold",
)
"""The fields of a part that are tensors."""


def weighted_sum(
    weights: Sequence[float], directions: Float[Tensor, "n d_model"]
) -> Float[Tensor, " d_model"]:
    """sum_j weight_j d_j, in float64."""
    return torch.tensor(list(weights), dtype=torch.float64) @ directions.double()
