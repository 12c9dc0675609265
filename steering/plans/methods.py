"""The methods and dose units of a plan: what each needs, what it means, what contradicts itself."""

import math
from typing import TYPE_CHECKING

from saesteer.checkpoints.errors import UsageError

if TYPE_CHECKING:
    from saesteer.steering.plans.plan import Plan, PlannedLatent

METHODS = ("add", "add-keep-norm", "set", "min", "max", "scale", "ablate", "project")
"""add alpha; add alpha and rescale to the former length; set to v; at least v; at most v; times a
factor; 0; remove the direction."""

ADDING_METHODS = ("add", "add-keep-norm")
"""Methods that add the same vector everywhere (before the rescaling of add-keep-norm)."""

READING_METHODS = ("set", "min", "max", "scale", "ablate")
"""Methods whose edit depends on the latent's present value."""

NO_DOSE = ("ablate", "project")
"""Methods without a dose."""

UNITS = ("raw", "sigma", "max", "rel")
"""The value itself; times sigma; times the largest activation seen; share of ||h||."""


def doses(plan: "Plan") -> list[float]:
    """One number per latent, in the order of `plan.latents`.

    Adding methods: alpha_j, in the SAE file's units (with unit `rel`: the latents' weights, before
    the sum is rescaled to the relative dose). set, min, max: the value v. scale: the factor. ablate
    and project have none and give 0.

    alpha_j = scale * (mu_j + beta * sigma_j), or scale * value_j; units `sigma` and `max` multiply
    the value (1 where there is none) by sigma_j or by the largest activation seen.

    Raises UsageError when a latent lacks the statistic that this needs.
    """
    if plan.method in NO_DOSE:
        return [0.0] * len(plan.latents)
    return [_dose(plan, latent) for latent in plan.latents]


def _dose(plan: "Plan", latent: "PlannedLatent") -> float:
    factor = 1.0 if plan.unit == "rel" else plan.scale
    if plan.unit in ("sigma", "max"):
        given = 1.0 if latent.value is None else latent.value
        return factor * given * _statistic(latent, plan.unit, f"`unit` {plan.unit}")
    if plan.method == "scale":
        return factor * (1.0 if latent.value is None else latent.value)
    if latent.value is not None:
        return factor * latent.value
    dose = _statistic(latent, "mu", f"`method` {plan.method} without values")
    if plan.beta != 0:
        dose += plan.beta * _statistic(latent, "sigma", f"`beta` {plan.beta:g}")
    return factor * dose


def _statistic(latent: "PlannedLatent", name: str, reason: str) -> float:
    number = getattr(latent, name)
    if number is None:
        raise UsageError(
            f"{reason} needs the {name} of latent {latent.id}, which this plan does not hold: "
            "give values with `latents` ID:VALUE and `unit` raw, or use a plan made by rank"
        )
    return float(number)


def check_dose(plan: "Plan") -> None:
    """Reject methods, units and doses that mean nothing. Raises UsageError, naming the flag."""
    if plan.method not in METHODS:
        raise UsageError(f"`method` must be one of {', '.join(METHODS)}, got {plan.method!r}")
    if plan.unit not in UNITS:
        raise UsageError(f"`unit` must be one of {', '.join(UNITS)}, got {plan.unit!r}")
    for flag, number in (("`scale`", plan.scale), ("`beta`", plan.beta)):
        if not math.isfinite(number):
            raise UsageError(f"{flag} must be a finite number, got {number}")
    for latent in plan.latents:
        for name in ("mu", "sigma", "max", "value", "score"):
            number = getattr(latent, name)
            if number is not None and not math.isfinite(number):
                raise UsageError(f"{name} of latent {latent.id} must be finite, got {number}")
    by_hand = [latent.value is not None for latent in plan.latents]
    if any(by_hand) and not all(by_hand):
        raise UsageError("either every latent has a value (`latents` ID:VALUE) or none has")
    if plan.method in NO_DOSE:
        _check_no_dose(plan, any(by_hand))
        return
    _check_combination(plan, any(by_hand))
    found = doses(plan)
    if plan.scale == 0:
        return
    if plan.method in ADDING_METHODS and not any(found):
        change = "the values in `latents`, or `scale`" if any(by_hand) else "`beta`"
        raise UsageError(f"every dose is 0, so nothing would be added: change {change}")
    if plan.method == "scale" and all(dose == 1 for dose in found):
        raise UsageError(
            "`method` scale by a factor of 1 changes nothing: give factors with `latents` "
            "ID:FACTOR or one with `scale`"
        )


def _check_combination(plan: "Plan", by_hand: bool) -> None:
    if plan.unit == "rel" and plan.method not in ADDING_METHODS:
        raise UsageError(
            f"`unit` rel is for `method` add and add-keep-norm alone, got `method` {plan.method}: "
            "use raw, sigma or max"
        )
    if plan.method == "scale" and plan.unit != "raw":
        raise UsageError(f"`method` scale takes a factor, so `unit` must be raw: {plan.unit!r}")
    if plan.beta != 0 and by_hand:
        raise UsageError(
            f"`beta` {plan.beta:g} needs latents with mu and sigma, and these have values "
            "given by hand: leave `beta` out and use `scale`"
        )
    if plan.beta != 0 and (plan.unit in ("sigma", "max") or plan.method == "scale"):
        raise UsageError(
            f"`beta` {plan.beta:g} has no meaning with `unit` {plan.unit} and `method` "
            f"{plan.method}: leave it out and use `scale`"
        )


def _check_no_dose(plan: "Plan", by_hand: bool) -> None:
    wrong = {
        "values in `latents` (write ID alone)": by_hand,
        f"`beta` {plan.beta:g}": plan.beta != 0,
        f"`unit` {plan.unit}": plan.unit != "raw",
        # 0 is the off switch of every method.
        f"`scale` {plan.scale:g}": plan.scale not in (0, 1),
    }
    for what, given in wrong.items():
        if given:
            raise UsageError(f"`method` {plan.method} takes no dose: leave out {what}")
