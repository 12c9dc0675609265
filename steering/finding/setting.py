"""A setting of the search: which phases, at which layers, how strongly, how; and its plan."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.finding.phases import Phases
from saesteer.steering.plans.part import PlanPart, SAEIdentity
from saesteer.steering.plans.plan import Condition, ModelIdentity, Plan, PlannedLatent, TaskIdentity
from saesteer.steering.tasks.task import Task

SCHEDULES = {
    "constant": "constant",
    "opening": "steps:0=1.5,8=1",
    "opening only": "steps:0=1,10=0.35",
    "body": "steps:0=0.6,4=1",
    "close": "steps:0=1,16=1.4",
}
"""Doses over the tokens of a reply: a format's opening, body and close may need different ones."""


@dataclass(frozen=True)
class Setting:
    """One way to steer. Doses of 0 leave a phase out."""

    tail_layers: tuple[int, ...]
    tail_dose: float
    """a: of the instruction's own effect at the prompt's tail."""
    reply_layers: tuple[int, ...]
    reply_dose: float
    """c: of the mean difference at replies, at each of its layers."""
    method: str = "set-to"
    """At the tail: `set-to` (plain + a V), or `add` (a V added to what earlier layers made)."""
    schedule: str = "constant"
    """Of the replies' dose; a key of `SCHEDULES`."""

    @property
    def phases(self) -> str:
        """`both`, `tail` or `replies`."""
        if not (self.reply_layers and self.reply_dose):
            return "tail"
        return "both" if self.tail_layers and self.tail_dose else "replies"

    def row(self) -> dict[str, Any]:
        """Every field, JSON-ready."""
        row = asdict(self)
        return {**row, "phases": self.phases, "schedule": SCHEDULES[self.schedule]}

    def __str__(self) -> str:
        said = []
        if self.phases != "replies":
            how = "" if self.method == "set-to" else " (add)"
            said.append(f"tail {_layers(self.tail_layers)} a {self.tail_dose:.2f}{how}")
        if self.phases != "tail":
            when = "" if self.schedule == "constant" else f" ({self.schedule})"
            said.append(f"replies {_layers(self.reply_layers)} c {self.reply_dose:.3f}{when}")
        return ", ".join(said)


def _layers(layers: Sequence[int]) -> str:
    """`8-20` for consecutive layers, else a list."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))


class Proposals:
    """Makes the plans of settings, from directions or from what stands in for them."""

    def __init__(self, lm: LanguageModel, task: Task, phases: Phases) -> None:
        self.phases = phases
        self._model = ModelIdentity(lm.name, lm.fingerprint, lm.n_layers, lm.d_model)
        self._task = TaskIdentity(task.name, task.hash, task.wordings)
        self._tails = [
            direction_part(layer, rows, scope=phases.scope)
            for layer, rows in enumerate(phases.tail)
        ]
        self._replies = [
            direction_part(layer, row[None], scope="replies")
            for layer, row in enumerate(phases.replies)
        ]

    def with_parts(self, tails: dict[int, PlanPart], replies: dict[int, PlanPart]) -> "Proposals":
        """The same with other parts at some layers, such as latents of an SAE."""
        made = Proposals.__new__(Proposals)
        made.__dict__.update(self.__dict__)
        made._tails = [tails.get(i, part) for i, part in enumerate(self._tails)]
        made._replies = [replies.get(i, part) for i, part in enumerate(self._replies)]
        return made

    def plan(self, setting: Setting, when: Condition | None = None) -> Plan:
        """The plan of a setting."""
        parts = []
        if setting.phases != "replies":
            for layer in setting.tail_layers:
                part = self._tails[layer]
                parts.append(replace(part, method=setting.method, scale=setting.tail_dose))
        if setting.phases != "tail":
            schedule = SCHEDULES[setting.schedule]
            for layer in setting.reply_layers:
                part = self._replies[layer]
                parts.append(replace(part, scale=setting.reply_dose, schedule=schedule))
        return Plan(model=self._model, parts=parts, task=self._task, when=when)


def direction_part(layer: int, rows: Float[Tensor, "places d_model"], *, scope: str) -> PlanPart:
    """A part that adds one vector everywhere, or at each of the last places of a prompt's scope.

    Each direction is a linear latent of length 1, with its own length as its mean.
    """
    lengths = rows.double().norm(dim=1)
    unit = (rows.double() / lengths.clamp(min=1e-30)[:, None]).float()
    return PlanPart(
        sae=SAEIdentity("directions", "", "linear"),
        site="resid_post",
        layer=layer,
        latents=tuple(PlannedLatent(id=i, mu=float(length)) for i, length in enumerate(lengths)),
        directions=unit,
        scope=scope,
        by_place=torch.eye(len(rows)) if scope == "tail" else None,
        W_enc=unit.T.contiguous(),
        b_enc=torch.zeros(len(rows)),
    )
