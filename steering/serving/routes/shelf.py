"""What a server can steer with: its plans by name, and the latents of its SAE."""

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.model.hooks import HookPoint, resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.model.sae_places import is_plain, steered
from saesteer.steering.hooking.edits import make_edit
from saesteer.steering.hooking.latent_values import matching_sae, needs_sae, with_gate
from saesteer.steering.plans.from_sae import plan_from_latents
from saesteer.steering.plans.methods import METHODS, UNITS
from saesteer.steering.plans.plan import Plan
from saesteer.steering.plans.plan_file import load_plan
from saesteer.steering.serving.routes.api_errors import ApiError, Fields, shown, wrong

_PLANS_KEPT = 256
_LARGEST = 1e6
MOST_LATENTS = 256
MOST_ENTRIES = 16
_OF_PLANS = ("plan", "scale", "times", "beta", "scope", "schedule", "method", "unit", "gate")
_OF_LATENTS = ("latents", "scale", "scope", "schedule", "method", "unit", "gate")


class Shelf:
    """Plans and an SAE, opened and checked against the model.

    Args:
        plans: names, each with a plan or its path.
        sae: what latents are chosen from by number.
        force: accept plans and an SAE that were made for other weights.

    Raises:
        UserError: a plan or an SAE that is not for this model; methods or gates that need an SAE
            which cannot be opened.
    """

    def __init__(
        self,
        lm: LanguageModel,
        plans: Mapping[str, Plan | str | Path] | None = None,
        sae: SAE | None = None,
        *,
        force: bool = False,
    ) -> None:
        self.lm, self.sae, self.force = lm, sae, force
        self.point: HookPoint | None = None
        if sae is not None:
            self.point, _ = steered(sae, lm, force=force)
        self.plans: dict[str, Plan] = {}
        self.saes: list[SAE] = [] if sae is None else [sae]
        for name, plan in (plans or {}).items():
            opened = plan if isinstance(plan, Plan) else load_plan(plan)
            opened.check_model(lm, force)
            for part in opened.parts:
                resolve_site(lm, part.layer, part.site)
                if needs_sae(part) and all(one.sha256 != part.sae.sha256 for one in self.saes):
                    self.saes.append(matching_sae(part, None, force))
                make_edit([part], self.saes, force)
            self.plans[name] = opened
        self._made: OrderedDict[str, Plan] = OrderedDict()

    @property
    def reads(self) -> tuple[SAE, HookPoint] | None:
        """The SAE whose latents can be watched, and where."""
        if self.sae is None or self.point is None or not is_plain(self.sae):
            return None
        return self.sae, self.point

    def steering(self, asked: Any, where: str = "steer") -> list[Plan]:
        """The plans of the field `steer` of a request; entries that are switched off are left out.

        Raises ApiError 400 for anything that cannot be.
        """
        entries = [asked] if isinstance(asked, dict) else asked
        if entries is None:
            return []
        if not isinstance(entries, list) or len(entries) > MOST_ENTRIES:
            raise wrong(where, f"an object, or a list of at most {MOST_ENTRIES}", asked)
        plans = [self._plan(entry, f"{where}[{i}]") for i, entry in enumerate(entries)]
        return [plan for plan in plans if not plan.is_off]

    def _plan(self, entry: Any, where: str) -> Plan:
        if not isinstance(entry, dict):
            raise wrong(where, "an object", entry)
        if (entry.get("plan") is None) == (entry.get("latents") is None):
            raise ApiError(
                400,
                f"'{where}' must have either 'plan' or 'latents', got the fields "
                f"{', '.join(sorted(entry)) or 'none'}",
                param=where,
            )
        key = json.dumps(entry, sort_keys=True)
        if key not in self._made:
            named = entry.get("plan") is not None
            fields = Fields(entry, _OF_PLANS if named else _OF_LATENTS, f"{where}.")
            try:
                made = self._of_name(fields) if named else self._of_latents(fields)
            except UserError as error:
                raise ApiError(400, f"'{where}': {error}", param=where) from error
            self._made[key] = made
            while len(self._made) > _PLANS_KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return self._made[key]

    def _settings(self, fields: Fields) -> dict[str, Any]:
        """The fields that are settings of a plan's parts."""
        settings: dict[str, Any] = {}
        for field in ("scope", "schedule"):
            if fields.has(field):
                settings[field] = fields.text(field)
        for field, words in (("method", tuple(METHODS)), ("unit", UNITS)):
            if fields.has(field):
                settings[field] = fields.text(field)
                if settings[field] not in words:
                    allowed = f"one of {', '.join(words)}"
                    raise wrong(fields.name(field), allowed, settings[field])
        for field in ("scale", "beta"):
            if fields.has(field):
                settings[field] = fields.number(field, -_LARGEST, _LARGEST)
        return settings

    def _of_name(self, fields: Fields) -> Plan:
        name = fields.text("plan")
        if name not in self.plans:
            known = ", ".join(self.plans) or "none: the server was started without 'plan'"
            raise ApiError(
                400,
                f"'{fields.name('plan')}' {shown(name)} is not a plan of this server; there are "
                f"{known}",
                param=fields.name("plan"),
                code="plan_not_found",
            )
        plan = self.plans[name]
        if settings := self._settings(fields):
            plan = plan.with_changes(**settings)
        times = fields.number("times", -_LARGEST, _LARGEST)
        if times is not None:
            parts = [dataclasses.replace(one, scale=one.scale * times) for one in plan.parts]
            plan = plan.with_changes(parts=parts)
        return self._gated(plan, fields)

    def _of_latents(self, fields: Fields) -> Plan:
        if self.sae is None:
            raise ApiError(
                400,
                f"'{fields.name('latents')}' needs an SAE and the server was started without one: "
                "start it with `sae`, or name a 'plan'",
                param=fields.name("latents"),
            )
        given = fields.mapping("latents") or {}
        what = f'1 to {MOST_LATENTS} latents with their values, such as {{"9143": 1.2}}'
        if not 1 <= len(given) <= MOST_LATENTS:
            raise wrong(fields.name("latents"), what, given)
        values: dict[int, float | None] = {}
        for name, value in given.items():
            if not name.isdecimal() or int(name) >= self.sae.spec.d_sae:
                numbers = f"named by numbers in 0..{self.sae.spec.d_sae - 1}"
                raise wrong(fields.name("latents"), numbers, name)
            if value is not None:
                own = Fields({name: value}, [name], f"{fields.name('latents')}.")
                value = own.number(name, -_LARGEST, _LARGEST)
            values[int(name)] = value
        if len(values) < len(given):
            raise wrong(fields.name("latents"), "named once each", list(given))
        plan = plan_from_latents(self.lm, self.sae, None, values, **self._settings(fields))
        return self._gated(plan, fields)

    def _gated(self, plan: Plan, fields: Fields) -> Plan:
        gate = fields.text("gate")
        if not gate:
            return plan
        for number, part in enumerate(plan.parts):
            sae = next((one for one in self.saes if one.sha256 == part.sae.sha256), None)
            plan = with_gate(plan, gate, sae, part=number)
            part = plan.parts[number]
            if needs_sae(part) and sae is None:
                raise UsageError(
                    f"'gate' reads latents of {part.sae.source}, which this server has not opened: "
                    "start it with `sae`"
                )
        return plan

    def watched(self, asked: Any) -> list[int]:
        """The latents of the field `activations`. Raises ApiError 400."""
        if asked is None:
            return []
        if self.reads is None:
            raise ApiError(
                400,
                "'activations' are of latents of the server's SAE, and it has none that reads "
                "where it steers: start it with `sae`",
                param="activations",
            )
        d_sae = self.reads[0].spec.d_sae
        numbers = isinstance(asked, list) and all(
            isinstance(i, int) and not isinstance(i, bool) and 0 <= i < d_sae for i in asked
        )
        if not numbers or not 1 <= len(asked) <= 16 or len(set(asked)) < len(asked):
            raise wrong("activations", f"1 to 16 different latents in 0..{d_sae - 1}", asked)
        return list(asked)

    def describe(self) -> dict[str, Any]:
        """The plans and the SAE, JSON-ready."""
        return {
            "plans": [self._described(name, plan) for name, plan in self.plans.items()],
            "sae": None if self.sae is None else self._described_sae(self.sae),
            "methods": list(METHODS),
            "units": list(UNITS),
        }

    def _described_sae(self, sae: SAE) -> dict[str, Any]:
        assert self.point is not None
        return {
            "name": Path(sae.source).name or sae.source,
            "d_sae": sae.spec.d_sae,
            "architecture": sae.spec.architecture,
            "layer": self.point.layer,
            "site": self.point.site,
            "reads": self.reads is not None,
        }

    def _described(self, name: str, plan: Plan) -> dict[str, Any]:
        return {
            "name": name,
            "task": None if plan.task is None else plan.task.name,
            "conditional": plan.when is not None,
            "dose": dict(plan.metrics.get("dose") or {}) or None,
            "parts": [
                {
                    "layer": part.layer,
                    "site": part.site,
                    "method": part.method,
                    "unit": part.unit,
                    "scale": part.scale,
                    "scope": part.scope,
                    "schedule": part.schedule,
                    "gate": part.gate,
                    "latents": [
                        {"id": latent.id, "lens": list(latent.lens)} for latent in part.latents
                    ],
                }
                for part in plan.parts
            ],
        }


def as_one_plan(plans: Sequence[Plan]) -> Plan:
    """Several plans as one of all their parts. Raises ApiError 400 where that changes them."""
    first, *others = plans
    if others and any(plan.when is not None for plan in plans):
        raise ApiError(
            400,
            "one of several plans acts only where its condition holds: their damage can only be "
            "measured one by one",
            param="steer",
        )
    return first.with_changes(parts=[part for plan in plans for part in plan.parts])
