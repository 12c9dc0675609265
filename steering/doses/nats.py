"""Doses in nats: the scale at which a plan has a given cost on neutral questions.

The cost of a scale is measured by `NeutralProbe`: the rise of the cross-entropy of the unsteered
model's own answers (`ce`), or KL(plain || steered) (`kl`), both in nats per answer token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.steering.doses.sweep import Budget
from saesteer.steering.evaluation.damage import Damage, NeutralProbe, Question
from saesteer.steering.hooking.tracking.finite import NotFiniteError
from saesteer.steering.plans.methods import METHODS
from saesteer.steering.plans.plan import Plan

_PRICELESS = Damage(math.inf, math.inf, 0.0, math.inf, None, None, None)
_DOUBLINGS = 12
_BISECTIONS = 20


@dataclass(frozen=True)
class Dose:
    """The scale that was found, and its measured cost."""

    plan: Plan
    """The plan at that scale, with `facts` in its metrics under `dose`."""
    target: Budget
    cost: float
    damage: Damage
    trials: tuple[tuple[float, float], ...]
    """Scale and cost of every measurement, in order."""
    texts: int
    """Number of texts that it was measured on."""
    neutral: bool
    """Whether they were the built-in neutral questions."""

    def facts(self) -> dict[str, Any]:
        """The target and the measurement, JSON-ready."""
        return {
            "unit": self.target.kind,
            "asked": self.target.limit,
            "measured": self.cost,
            "scale": self.plan.scale,
            "relative_dose": self.damage.relative_dose,
            "on": "neutral questions" if self.neutral else "given texts",
            "texts": self.texts,
        }


def dose_plan(
    model: str | LanguageModel,
    plan: Plan,
    target: Budget,
    *,
    texts: Sequence[str] | None = None,
    tolerance: float = 0.05,
    max_new_tokens: int = 24,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = no_progress,
) -> Dose:
    """Find the scale at which a plan costs a given number of nats, by doubling and bisection.

    The search begins at the plan's scale and keeps its sign. It brackets the target between a
    scale that costs less and one that costs as much or more, so it finds a crossing even where the
    cost is not monotonic in the scale.

    Args:
        target: `Budget("ce", 0.1)` for a rise of 0.1 nats per token, `Budget("kl", 0.1)`.
        texts: prompts on whose unsteered answers the cost is measured, such as the contents of the
            plan's task; by default the neutral questions.
        tolerance: largest distance of the cost from the target, as a share of the target.
        max_new_tokens: length of the answers.

    Raises:
        UsageError: a method whose edit does not grow with the scale, or a tolerance outside (0, 1).
        UserError: no scale reaches the target, or the cost jumps over it; a plan for another model.
    """
    growing = [name for name, method in METHODS.items() if method.grows]
    if plan.method not in growing:
        raise UsageError(
            f"`dose` needs an edit that grows with its scale: `method` {', '.join(growing)}, got "
            f"{plan.method}"
        )
    if not 0 < tolerance < 1:
        raise UsageError(f"tolerance must be in (0, 1), got {tolerance}")
    lm = as_language_model(model, device=device, dtype=dtype)
    plan.check_model(lm)
    questions = None if texts is None else [Question(text, ()) for text in texts]
    probe = NeutralProbe(lm, questions, max_new_tokens=max_new_tokens)
    search = _Search(probe, plan, target, progress)
    scale, damage = search.run(tolerance)
    found = Dose(
        plan.with_changes(scale=scale),
        target,
        target.spent(damage),
        damage,
        tuple(search.trials),
        len(probe.questions),
        texts is None,
    )
    metrics = {**plan.metrics, "dose": found.facts()}
    return replace(found, plan=found.plan.with_changes(metrics=metrics))


class _Search:
    """Brackets the target by doubling or halving the scale, then bisects on a log scale."""

    def __init__(self, probe: NeutralProbe, plan: Plan, target: Budget, progress: Progress) -> None:
        self._probe, self._plan, self._target = probe, plan, target
        self._progress = progress
        self._sign = math.copysign(1.0, plan.scale)
        self.trials: list[tuple[float, float]] = []

    def run(self, tolerance: float) -> tuple[float, Damage]:
        """The scale that was found, and its damage. Raises UserError when there is none."""
        goal, size = self._target.limit, abs(self._plan.scale) or 1.0
        low, (high, damage) = 0.0, (size, self._measure(size))
        # Double until the cost reaches the target; if the first scale does, halve until below it.
        while self._cost(damage) < goal:
            if len(self.trials) > _DOUBLINGS:
                raise self._out_of_reach(damage)
            low, high = high, 2 * high
            damage = self._measure(high)
        while low == 0 and len(self.trials) <= _DOUBLINGS and not self._near(damage, tolerance):
            tried = self._measure(high / 2)
            if self._cost(tried) < goal:
                low = high / 2
            else:
                high, damage = high / 2, tried
        for _ in range(_BISECTIONS):
            if self._near(damage, tolerance):
                return self._sign * high, damage
            middle = math.sqrt(low * high) if low > 0 else high / 2
            tried = self._measure(middle)
            if self._near(tried, tolerance):
                return self._sign * middle, tried
            if self._cost(tried) < goal:
                low = middle
            else:
                high, damage = middle, tried
        raise UserError(
            f"`dose` {self._name}: the cost jumps to {self._cost(damage):.3g} between scale "
            f"{self._sign * low:.5g} and {self._sign * high:.5g}: ask for another dose, or use "
            "`scale`"
        )

    def _measure(self, size: float) -> Damage:
        self._progress("find the dose", len(self.trials), len(self.trials) + 1, "scales")
        scale = self._sign * size
        try:
            damage = self._probe.measure(self._plan.with_changes(scale=scale))
        except NotFiniteError:  # more than the model's numbers hold: dearer than any goal
            damage = _PRICELESS
        self.trials.append((scale, self._target.spent(damage)))
        self._progress("find the dose", len(self.trials), len(self.trials), "scales")
        return damage

    def _cost(self, damage: Damage) -> float:
        cost = self._target.spent(damage)
        return cost if math.isfinite(cost) else math.inf  # NaN when the edit breaks the model

    def _near(self, damage: Damage, tolerance: float) -> bool:
        return abs(self._cost(damage) - self._target.limit) <= tolerance * self._target.limit

    def _out_of_reach(self, damage: Damage) -> UserError:
        scale, cost = max(self.trials, key=lambda trial: trial[1])
        return UserError(
            f"`dose` {self._name} is out of reach: at most {cost:.3g} nats a token were measured, "
            f"at scale {scale:.4g}, and scale {self._sign * self.trials[-1][0]:.4g} (relative dose "
            f"{damage.relative_dose or 0.0:.3g}) costs {self.trials[-1][1]:.3g}: ask for less, or "
            "use another `scope` or other latents"
        )

    @property
    def _name(self) -> str:
        return f"{self._target.kind}={self._target.limit:g}"
