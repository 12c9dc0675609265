"""The latents of a plan, and their doses: the number that the method uses for each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from saesteer.checkpoints.errors import UsageError, none_of
from saesteer.steering.plans.methods import METHODS, UNITS


@dataclass(frozen=True)
class PlannedLatent:
    """One latent of a plan. `mu`, `sigma` and `max` are in the units of the SAE's activations."""

    id: int
    """Row of W_dec."""
    score: float | None = None
    """The score that it was ranked by."""
    mu: float | None = None
    """Mean activation over the samples where it is active."""
    sigma: float | None = None
    """Standard deviation over the same samples."""
    lens: tuple[str, ...] = ()
    """Tokens whose logits its direction raises most."""
    value: float | None = None
    """A value chosen by hand, which replaces mu + beta * sigma."""
    max: float | None = None
    """Largest activation seen, for unit `max`."""


def doses(
    latents: Sequence[PlannedLatent], *, method: str, unit: str, scale: float, beta: float
) -> list[float]:
    """One number per latent, in their order.

    Adding methods: alpha_j, in the SAE file's units (with unit `rel`: the latents' weights, before
    the sum is rescaled to the relative dose). set, min, max: the value v. scale: the factor.
    Methods without a dose give 0.

    alpha_j = scale * (mu_j + beta * sigma_j), or scale * value_j; units `sigma` and `max` multiply
    the value (1 where there is none) by sigma_j or by the largest activation seen.

    Raises UsageError when a latent lacks the statistic that this needs.
    """
    does = METHODS[method]
    if not does.takes_dose:
        return [0.0] * len(latents)
    factor = 1.0 if unit == "rel" else scale

    def base(latent: PlannedLatent) -> float:
        given = 1.0 if latent.value is None else latent.value
        if unit in ("sigma", "max"):
            return given * _statistic(latent, unit, f"`unit` {unit}")
        if does.is_factor or latent.value is not None:
            return given
        mean = _statistic(latent, "mu", f"`method` {method} without values")
        if beta == 0:
            return mean
        return mean + beta * _statistic(latent, "sigma", f"`beta` {beta:g}")

    return [factor * base(latent) for latent in latents]


def _statistic(latent: PlannedLatent, name: str, reason: str) -> float:
    number = getattr(latent, name)
    if number is None:
        raise UsageError(
            f"{reason} needs the {name} of latent {latent.id}, which this plan does not hold: "
            "give values with `latents` ID:VALUE and `unit` raw, or use a plan made by rank"
        )
    return float(number)


def check_latents(latents: Sequence[PlannedLatent]) -> None:
    """Raise UsageError for no latents, latents named twice, or negative numbers."""
    if not latents:
        raise UsageError("a plan needs at least one latent: give `latents` ID:VALUE,...")
    ids = [latent.id for latent in latents]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise UsageError(f"latent {twice[0]} is in the plan twice: name each latent once")
    if min(ids) < 0:
        raise UsageError(f"latent {min(ids)} is negative: latents are numbered from 0")


def check_doses(
    latents: Sequence[PlannedLatent], *, method: str, unit: str, scale: float, beta: float
) -> None:
    """Raise UsageError, naming the argument, for invalid or contradictory settings of a dose."""
    if method not in METHODS:
        raise none_of("`method`", METHODS, method)
    if unit not in UNITS:
        raise none_of("`unit`", UNITS, unit)
    for flag, number in (("`scale`", scale), ("`beta`", beta)):
        if not math.isfinite(number):
            raise UsageError(f"{flag} must be a finite number, got {number}")
    for latent in latents:
        for name in ("mu", "sigma", "max", "value", "score"):
            number = getattr(latent, name)
            if number is not None and not math.isfinite(number):
                raise UsageError(f"{name} of latent {latent.id} must be finite, got {number}")
    by_hand = [latent.value is not None for latent in latents]
    if any(by_hand) and not all(by_hand):
        raise UsageError("either every latent has a value (`latents` ID:VALUE) or none has")
    if not METHODS[method].takes_dose:
        _check_no_dose(method, unit, scale, beta, any(by_hand))
        return
    _check_combination(method, unit, beta, any(by_hand))
    found = doses(latents, method=method, unit=unit, scale=scale, beta=beta)
    if scale == 0:
        return
    if METHODS[method].sums and not any(found):
        change = "the values in `latents`, or `scale`" if any(by_hand) else "`beta`"
        raise UsageError(f"every dose is 0, so nothing would be added: change {change}")
    if METHODS[method].is_factor and all(dose == 1 for dose in found):
        raise UsageError(
            f"`method` {method} by a factor of 1 changes nothing: give factors with `latents` "
            "ID:FACTOR or one with `scale`"
        )


def _check_combination(method: str, unit: str, beta: float, by_hand: bool) -> None:
    does = METHODS[method]
    if does.is_factor and unit not in ("raw", "rel"):
        raise UsageError(f"`method` {method} takes a factor, so `unit` must be raw: {unit!r}")
    if unit not in does.units:
        others = [name for name, other in METHODS.items() if unit in other.units]
        raise UsageError(
            f"`unit` {unit} is for `method` {' and '.join(others)} alone, got `method` {method}: "
            f"use {' or '.join(does.units)}"
        )
    if beta != 0 and by_hand:
        raise UsageError(
            f"`beta` {beta:g} needs latents with mu and sigma, and these have values "
            "given by hand: leave `beta` out and use `scale`"
        )
    if beta != 0 and (unit in ("sigma", "max") or does.is_factor):
        raise UsageError(
            f"`beta` {beta:g} has no meaning with `unit` {unit} and `method` "
            f"{method}: leave it out and use `scale`"
        )


def _check_no_dose(method: str, unit: str, scale: float, beta: float, by_hand: bool) -> None:
    wrong = {
        "values in `latents` (write ID alone)": by_hand,
        f"`beta` {beta:g}": beta != 0,
        f"`unit` {unit}": unit not in METHODS[method].units,
        # 0 is the off switch of every method.
        f"`scale` {scale:g}": scale not in (0, 1),
    }
    for what, given in wrong.items():
        if given:
            raise UsageError(f"`method` {method} takes no dose: leave out {what}")
