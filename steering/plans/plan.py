"""A steering plan: the model it is for, and the parts that edit it.

Plans are made from a ranking, from latents by number (`from_sae`), from directions (`directions`)
or from parts; `plan_file` reads and writes them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.shown import Shown
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.hooking.gates import Gate
from saesteer.steering.plans.condition import Condition as Condition
from saesteer.steering.plans.latents import PlannedLatent as PlannedLatent
from saesteer.steering.plans.part import PlanPart as PlanPart
from saesteer.steering.plans.part import SAEIdentity as SAEIdentity

T = TypeVar("T")


@dataclass(frozen=True)
class ModelIdentity:
    """The language model a plan belongs to."""

    name: str
    hash: str
    n_layers: int
    d_model: int


@dataclass(frozen=True)
class TaskIdentity:
    """The instruction task a plan was ranked for."""

    name: str
    hash: str
    instructions: tuple[str, ...] = ()
    """Every wording of the instruction, for the scope `after-instruction`; empty in older plans."""


class _OfParts(Generic[T]):
    """A field of the parts as an attribute of the plan; UsageError where the parts differ in it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, plan: "Plan", owner: type) -> T:
        value: T = _agreed(plan.parts, self._name)
        return value


@dataclass(frozen=True, kw_only=True, eq=False, init=False, repr=False)
class Plan(Shown):
    """Parts, in the order in which they edit, and the model that they are for.

    Most plans have one part, whose fields can be used as if they were the plan's own:
    `Plan(model=..., sae=..., site=..., layer=..., latents=..., directions=...)`, `plan.layer`,
    `plan.with_changes(scale=2.0)`. In a plan of several parts a field can be read, or changed in
    all of them, where they have the same value; otherwise use `plan.parts` and
    `with_changes(part=...)`.
    """

    model: ModelIdentity
    parts: tuple[PlanPart, ...]
    task: TaskIdentity | None
    metrics: Mapping[str, Any]
    when: Condition | None
    """Which rows it edits, decided on their prompts; None: all of them."""

    # See PlanPart for these fields.
    sae = _OfParts[SAEIdentity]()
    site = _OfParts[str]()
    layer = _OfParts[int]()
    latents = _OfParts[tuple[PlannedLatent, ...]]()
    directions = _OfParts[Tensor]()
    method = _OfParts[str]()
    unit = _OfParts[str]()
    scale = _OfParts[float]()
    beta = _OfParts[float]()
    scope = _OfParts[str]()
    schedule = _OfParts[str]()
    gate = _OfParts[str]()
    parsed_gate = _OfParts[Gate]()
    W_enc = _OfParts[Tensor | None]()
    b_enc = _OfParts[Tensor | None]()
    threshold = _OfParts[Tensor | None]()
    by_place = _OfParts[Tensor | None]()
    gate_ids = _OfParts[tuple[int, ...]]()
    gate_W_enc = _OfParts[Tensor | None]()
    gate_b_enc = _OfParts[Tensor | None]()
    gate_threshold = _OfParts[Tensor | None]()
    ids = _OfParts[tuple[int, ...]]()

    def _facts(self) -> dict[str, Any]:
        parts = self.parts
        layers = sorted({part.layer for part in parts})
        shared = {
            name: next(iter(values)) if len(values) == 1 else "several"
            for name in ("site", "method", "scope", "scale")
            if (values := {getattr(part, name) for part in parts})
        }
        return {
            "model": self.model.name,
            "task": None if self.task is None else repr(self.task.name),
            "parts": None if len(parts) == 1 else len(parts),
            "layers": layers[0] if len(layers) == 1 else layers,
            **shared,
            "latents": sum(len(part.latents) for part in parts),
            "conditional": "yes" if self.when is not None else None,
        }

    def __init__(
        self,
        *,
        model: ModelIdentity,
        parts: Sequence[PlanPart] = (),
        task: TaskIdentity | None = None,
        metrics: Mapping[str, Any] | None = None,
        when: Condition | None = None,
        **fields: Any,
    ) -> None:
        """A plan of `parts` with `fields` changed in them, or of one part made from `fields`.

        Raises:
            UsageError: a layer that the model does not have; a change of a field whose values
                differ between the parts.
            UserError: directions of another width than the model's.
        """
        made = _changed(parts, fields) if parts else (PlanPart(**fields),)
        for name, value in (
            ("model", model),
            ("parts", made),
            ("task", task),
            ("metrics", dict(metrics or {})),
            ("when", when),
        ):
            object.__setattr__(self, name, value)
        for part in self.parts:
            if not 0 <= part.layer < model.n_layers:
                raise UsageError(
                    f"layer must be in 0..{model.n_layers - 1} for {model.name}, got {part.layer}"
                )
            if part.directions.shape[1] != model.d_model:
                raise UserError(
                    f"directions has shape {list(part.directions.shape)} and {model.name} has "
                    f"d_model {model.d_model}: make the plan again"
                )

        if when is not None and not (
            0 <= when.layer < model.n_layers and len(when.weight) == model.d_model
        ):
            raise UserError(
                f"`when` reads layer {when.layer} with {len(when.weight)} numbers, and "
                f"{model.name} has {model.n_layers} layers of width {model.d_model}: make the plan "
                "again"
            )

    @property
    def part(self) -> PlanPart:
        """The only part. Raises UsageError when there are several."""
        if len(self.parts) > 1:
            raise UsageError(
                f"this plan has {_listed(self.parts)}, and this is for plans of one part: choose "
                "one with plan.only(number)"
            )
        return self.parts[0]

    def only(self, number: int) -> "Plan":
        """The plan with only one of the parts, counted from 0."""
        return self.with_changes(parts=(self.parts[number],))

    def with_changes(self, *, part: int | None = None, **changes: Any) -> "Plan":
        """A copy of the plan with other values of its own fields or of those of its parts.

        A field of the parts is changed in part number `part` (from 0), or in all of them. Then all
        parts must have the same value before, because a change relative to different values would
        be ambiguous; only `scale=0`, which switches parts off, is always allowed. Raises UsageError
        otherwise, and for values that are not valid.
        """
        values: dict[str, Any] = {
            "model": self.model,
            "parts": self.parts,
            "task": self.task,
            "metrics": self.metrics,
            "when": self.when,
        }
        if part is not None:
            own = {name: value for name, value in changes.items() if name not in values}
            parts = list(self.parts)
            parts[part] = dataclasses.replace(parts[part], **own)
            changes = {"parts": parts, **{k: v for k, v in changes.items() if k not in own}}
        return Plan(**{**values, **changes})

    @property
    def is_off(self) -> bool:
        """Whether every part is switched off (scale 0)."""
        return all(part.scale == 0 for part in self.parts)

    def doses(self) -> list[float]:
        """One number per latent of a plan of one part, in the order of `latents`."""
        return self.part.doses()

    def top(self, k: int) -> "Plan":
        """The plan, of one part, with its first `k` latents. Raises UsageError if it has fewer."""
        if not 1 <= k <= len(self.part.latents):
            raise UsageError(f"`top` must be in 1..{len(self.latents)} for this plan, got {k}")
        return self.select(range(k))

    def select(self, indices: Sequence[int]) -> "Plan":
        """The plan, of one part, with only the latents at these indices, in this order."""
        return self.with_changes(parts=(self.part.select(indices),))

    def check_model(self, lm: LanguageModel, force: bool = False) -> None:
        """Raise UserError when the plan was made for another model.

        `force` accepts other weights and another depth; another width is always an error.
        """
        ours, name = self.model, lm.name
        if ours.d_model != lm.d_model:
            raise UserError(
                f"`plan` was made for {ours.name}, whose d_model is {ours.d_model}; {name} has "
                f"{lm.d_model}: use `model` {ours.name} or another plan"
            )
        layers = [part.layer for part in self.parts]
        deepest = max(layers if self.when is None else [*layers, self.when.layer])
        if deepest >= lm.n_layers:
            raise UserError(
                f"`plan` steers layer {deepest} of {ours.name} and {name} has layers "
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


def _agreed(parts: Sequence[PlanPart], name: str) -> Any:
    """The value that a field has in all parts. Raises UsageError when they differ."""
    first, *others = (getattr(part, name) for part in parts)
    if others and (isinstance(first, Tensor) or any(other != first for other in others)):
        raise UsageError(
            f"`{name}` is not the same in all parts of this plan, {_listed(parts)}: say which part "
            "is meant (plan.parts, plan.with_changes(part=...))"
        )
    return first


def _changed(parts: Sequence[PlanPart], fields: Mapping[str, Any]) -> tuple[PlanPart, ...]:
    known = {field.name for field in dataclasses.fields(PlanPart)}
    for name in fields.keys() & known:
        if not (name == "scale" and fields[name] == 0):
            _agreed(parts, name)
    return tuple(dataclasses.replace(part, **fields) if fields else part for part in parts)


def _listed(parts: Sequence[PlanPart]) -> str:
    return ", ".join(f"part {number} ({part.where})" for number, part in enumerate(parts))
