"""A steering plan: which latents, at what dose, where; and the directions to do it without the SAE.

Plans are made here, by `rank` or from latents by number, and kept on disk by `plan_file`.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE
from saesteer.checkpoints.sae_spec import TOKEN_NORMALIZATIONS
from saesteer.sae.model.hooks import sae_hook_point
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.hooking.gates import Gate, parse_gate
from saesteer.steering.hooking.scope import parse_scope
from saesteer.steering.plans.methods import METHODS as METHODS
from saesteer.steering.plans.methods import NO_DOSE, READING_METHODS, check_dose, doses
from saesteer.steering.plans.methods import UNITS as UNITS
from saesteer.steering.plans.schedules import parse_schedule

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class PlannedLatent:
    """One latent of a plan. `mu`, `sigma` and `max` are in the SAE file's units."""

    id: int
    """Row of W_dec."""
    score: float | None = None
    """What it was ranked by."""
    mu: float | None = None
    """Mean activation over the samples where it is active."""
    sigma: float | None = None
    """Standard deviation over the same samples."""
    lens: tuple[str, ...] = ()
    """Tokens that its direction raises most."""
    value: float | None = None
    """A value chosen by hand, which replaces mu + beta * sigma."""
    max: float | None = None
    """Largest activation seen, for `--unit max`."""


@dataclass(frozen=True)
class ModelIdentity:
    """The language model a plan belongs to."""

    name: str
    hash: str
    n_layers: int
    d_model: int


@dataclass(frozen=True)
class SAEIdentity:
    """The SAE a plan's latents come from."""

    source: str
    sha256: str
    architecture: str = "topk"
    k: int | None = None
    normalize_activations: str = "none"
    """How each token is scaled before the SAE reads it; what its latents add is scaled back."""

    def __post_init__(self) -> None:
        if self.normalize_activations not in ("none", *TOKEN_NORMALIZATIONS):
            raise UserError(
                f"sae.normalize_activations is {self.normalize_activations!r}; known are none, "
                f"{', '.join(TOKEN_NORMALIZATIONS)}: make the plan again"
            )

    @property
    def scales_tokens(self) -> bool:
        """Whether a latent's unit is a length of its own at each token."""
        return self.normalize_activations != "none"


@dataclass(frozen=True)
class TaskIdentity:
    """The instruction task a plan was ranked for."""

    name: str
    hash: str
    instructions: tuple[str, ...] = ()
    """Every wording, for the scope `after-instruction`; older plans hold none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Latents with their doses and directions, and where to apply them.

    Change a field with `dataclasses.replace(plan, scale=2.0)`: the result is checked again.
    """

    model: ModelIdentity
    sae: SAEIdentity
    site: str
    layer: int
    latents: tuple[PlannedLatent, ...]
    directions: Float[Tensor, "n d_model"]
    """Rows of W_dec, exactly as stored in the SAE's file, in the order of `latents`."""
    method: str = "add"
    unit: str = "raw"
    scale: float = 1.0
    """Multiplies every dose; 0 switches the plan off. With unit `rel`, the relative dose."""
    beta: float = 0.0
    scope: str = "generation"
    schedule: str = "constant"
    """How the strength changes while text is generated; see `schedules`."""
    gate: str = ""
    """A condition on latents under which the scope's positions are edited; see `gates`."""
    task: TaskIdentity | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    W_enc: Float[Tensor, "d_model n"] | None = None
    """Encoder columns with the input's centering folded in; None where a latent depends on all."""
    b_enc: Float[Tensor, " n"] | None = None
    threshold: Float[Tensor, " n"] | None = None
    """JumpReLU's own."""
    gate_ids: tuple[int, ...] = ()
    """The latents that the `gate_` tensors are of: those of the gate, or none."""
    gate_W_enc: Float[Tensor, "d_model gated"] | None = None
    """Encoder columns of the gate's latents, as `W_enc`; None where the SAE itself is read."""
    gate_b_enc: Float[Tensor, " gated"] | None = None
    gate_threshold: Float[Tensor, " gated"] | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise UserError(
                f"plan schema_version is {self.schema_version!r} and this saesteer reads "
                f"{SCHEMA_VERSION}: make the plan again"
            )
        if not self.latents:
            raise UsageError("a plan needs at least one latent: give `latents` ID:VALUE,...")
        ids = [latent.id for latent in self.latents]
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise UsageError(f"latent {twice[0]} is in the plan twice: name each latent once")
        if min(ids) < 0:
            raise UsageError(f"latent {min(ids)} is negative: latents are numbered from 0")
        if not 0 <= self.layer < self.model.n_layers:
            raise UsageError(
                f"layer must be in 0..{self.model.n_layers - 1} for {self.model.name}, "
                f"got {self.layer}"
            )
        parse_scope(self.scope)
        parse_schedule(self.schedule)
        self._check_gate()
        self._check_tensors()
        check_dose(self)

    def _check_tensors(self) -> None:
        n, width = len(self.latents), self.model.d_model
        gated = len(self.gate_ids)
        shapes = {
            "directions": (n, width), "W_enc": (width, n), "b_enc": (n,), "threshold": (n,),
            "gate_W_enc": (width, gated), "gate_b_enc": (gated,), "gate_threshold": (gated,),
        }  # fmt: skip
        for name, tensor in self.tensors().items():
            if tuple(tensor.shape) != shapes[name]:
                raise UserError(
                    f"{name} has shape {list(tensor.shape)}, but {n} latents of a model of width "
                    f"{width} ask for {list(shapes[name])}: make the plan again"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(f"{name} holds NaN or infinity: make the plan again")

    def _check_gate(self) -> None:
        if self.gate_ids and self.gate_ids != (self.parsed_gate.ids if self.gate else ()):
            raise UserError(
                f"the plan holds encoder columns of the latents {list(self.gate_ids)} and its gate "
                f"is {self.gate!r}: change a gate with steering.with_gate, or `gate`"
            )

    @property
    def parsed_gate(self) -> Gate:
        """The gate; only where there is one."""
        return parse_gate(self.gate)

    def doses(self) -> list[float]:
        """One number per latent, in the order of `latents`; see `methods.doses`."""
        return doses(self)

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(latent.id for latent in self.latents)

    @property
    def reads_latents(self) -> bool:
        """Whether the method needs the latents' present values."""
        return self.method in READING_METHODS

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        everything = {
            "directions": self.directions,
            "W_enc": self.W_enc,
            "b_enc": self.b_enc,
            "threshold": self.threshold,
            "gate_W_enc": self.gate_W_enc,
            "gate_b_enc": self.gate_b_enc,
            "gate_threshold": self.gate_threshold,
        }
        return {name: tensor for name, tensor in everything.items() if tensor is not None}

    def top(self, k: int) -> "Plan":
        """The plan with its first `k` latents. Raises UsageError when it has fewer."""
        if not 1 <= k <= len(self.latents):
            raise UsageError(f"`top` must be in 1..{len(self.latents)} for this plan, got {k}")
        return self.select(range(k))

    def select(self, indices: Sequence[int]) -> "Plan":
        """The plan with the latents at these places of `latents`, in this order."""
        picked = list(indices)
        return dataclasses.replace(
            self,
            latents=tuple(self.latents[i] for i in picked),
            directions=self.directions[picked],
            W_enc=None if self.W_enc is None else self.W_enc[:, picked],
            b_enc=None if self.b_enc is None else self.b_enc[picked],
            threshold=None if self.threshold is None else self.threshold[picked],
        )

    def check_model(self, lm: LanguageModel, force: bool = False) -> None:
        """Raise UserError when the plan was made for another model.

        `force` lets other weights and another depth pass; another width never fits.
        """
        ours, name = self.model, lm.name
        if ours.d_model != lm.d_model:
            raise UserError(
                f"`plan` was made for {ours.name}, whose d_model is {ours.d_model}; {name} has "
                f"{lm.d_model}: use `model` {ours.name} or another plan"
            )
        if self.layer >= lm.n_layers:
            raise UserError(
                f"`plan` steers layer {self.layer} of {ours.name} and {name} has layers "
                f"0..{lm.n_layers - 1}: use `model` {ours.name} or another plan"
            )
        differs = []
        if ours.n_layers != lm.n_layers:
            differs.append(f"{ours.n_layers} layers against {lm.n_layers}")
        if ours.hash != lm.fingerprint:
            differs.append(f"weights {ours.hash} against {lm.fingerprint}")
        if differs and not force:
            raise UserError(
                f"`plan` was made for {ours.name} and `model` {name} differs "
                f"({'; '.join(differs)}): use `model` {ours.name}, or `force` to steer it anyway"
            )


def make_plan(
    lm: LanguageModel,
    sae: SAE,
    latents: Sequence[PlannedLatent],
    *,
    layer: int | None = None,
    site: str | None = None,
    method: str = "add",
    unit: str = "raw",
    scale: float = 1.0,
    beta: float = 0.0,
    scope: str = "generation",
    schedule: str = "constant",
    task: TaskIdentity | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Plan:
    """A plan for latents of an SAE; the directions and encoder columns are copied out of it.

    `layer` and `site` are needed only where the SAE does not say what it reads (negative layers
    count from the end).

    Raises:
        UsageError: a latent that the SAE does not have, a layer or site that contradicts it.
        UserError: an SAE for another width or for a deeper model.
    """
    # Whether the weights are those that the SAE was trained on is for the caller to ask.
    point = sae_hook_point(sae, lm, layer=layer, site=site, force=True)
    if sae.spec.centers_input and sae.spec.normalize_activations == "constant_norm_rescale":
        raise UserError(
            f"`sae` {sae.source} scales each token by its length without its mean, which a plan "
            "cannot say: choose another SAE"
        )
    for latent in latents:
        if not 0 <= latent.id < sae.spec.d_sae:
            raise UsageError(
                f"latent {latent.id} is out of range: the SAE {sae.source} has "
                f"{sae.spec.d_sae} latents, 0..{sae.spec.d_sae - 1}"
            )
    ids = [latent.id for latent in latents]
    columns = encoder_columns(sae, ids)
    return Plan(
        model=ModelIdentity(lm.name, lm.fingerprint, lm.n_layers, lm.d_model),
        sae=SAEIdentity(
            _lasting(sae.source),
            sae.sha256,
            sae.spec.architecture,
            sae.spec.k,
            sae.spec.normalize_activations if sae.spec.scales_tokens else "none",
        ),
        site=point.site,
        layer=point.layer,
        latents=tuple(latents),
        directions=sae.W_dec[ids].detach().cpu().clone(),
        method=method,
        unit=unit,
        scale=scale,
        beta=beta,
        scope=scope,
        schedule=schedule,
        task=task,
        metrics=dict(metrics or {}),
        W_enc=columns.get("W_enc"),
        b_enc=columns.get("b_enc"),
        threshold=columns.get("threshold"),
    )


def _lasting(source: str) -> str:
    """A local folder by its absolute path, so that the plan finds it from any folder."""
    folder = Path(source).expanduser()
    return str(folder.absolute()) if source and folder.is_dir() else source


def plan_from_latents(
    lm: LanguageModel,
    sae: SAE,
    layer: int | None,
    values: Mapping[int, float | None],
    *,
    site: str | None = None,
    method: str = "add",
    unit: str = "raw",
    scale: float = 1.0,
    beta: float = 0.0,
    scope: str = "generation",
    schedule: str = "constant",
) -> Plan:
    """A plan for latents chosen by number (`--latents`), with the values given for them.

    Raises what `make_plan` raises, and UsageError for a missing value or a `beta` that is not 0.
    """
    if not values:
        raise UsageError("`latents` is empty: give ID:VALUE,... such as 9143:1.2,412:0.8")
    missing = [i for i, value in values.items() if value is None]
    if missing and method not in NO_DOSE:
        raise UsageError(
            f"`latents` {missing[0]} has no value and `method` {method} needs one: write "
            f"{missing[0]}:VALUE"
        )
    latents = [PlannedLatent(id=i, value=value) for i, value in values.items()]
    return make_plan(
        lm, sae, latents, layer=layer, site=site,
        method=method, unit=unit, scale=scale, beta=beta, scope=scope, schedule=schedule,
    )  # fmt: skip


def parse_latents(text: str) -> dict[int, float | None]:
    """Parse `--latents`: `9143:1.2,412:0.8`, or ids alone for methods without a value.

    Raises UsageError for anything else.
    """
    values: dict[int, float | None] = {}
    for part in (piece.strip() for piece in text.split(",")):
        number, colon, value = part.partition(":")
        try:
            if not re.fullmatch(r"\d+", number.strip()):
                raise ValueError
            latent, chosen = int(number), float(value) if colon else None
        except ValueError:
            raise UsageError(
                f"`latents` must be ID:VALUE,ID:VALUE (such as 9143:1.2,412:0.8) or ID,ID for "
                f"ablate and project, got {part!r} in {text!r}"
            ) from None
        if latent in values:
            raise UsageError(f"`latents` names latent {latent} twice: name each latent once")
        values[latent] = chosen
    return values


def encoder_columns(sae: SAE, ids: Sequence[int]) -> dict[str, Tensor]:
    """The encoder of chosen latents, in float32 and free of b_dec: W_enc, b_enc, threshold.

    Whatever is subtracted from the input is folded in: (x - b_dec) W + b = x W + (b - b_dec W), and
    the same for a token's own mean, which is linear in x. Empty where a latent's value depends on
    more than its column: on all the others (topk), or on a gate. Where the SAE normalises tokens,
    x W is to be divided by `token_divisor` before the bias comes in.
    """
    if not sae.spec.reads_alone:
        return {}
    picked = list(ids)
    columns = sae.W_enc[:, picked].detach().cpu().float()
    bias = sae.b_enc[picked].detach().cpu().float()
    if sae.spec.apply_b_dec_to_input:
        bias = bias - sae.b_dec.detach().cpu().float() @ columns
    if sae.spec.centers_input or sae.spec.normalize_activations == "layer_norm":
        columns = columns - columns.mean(dim=0, keepdim=True)
    tensors = {"W_enc": columns.contiguous(), "b_enc": bias}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold[picked].detach().cpu().float()
    return tensors
