"""How an edit's strength changes while text is generated.

The step of a position p after a prompt of P tokens is g = max(0, p - (P - 1)): 0 up to the last
prompt token, whose logits give the first new token, then 1, 2, ... It depends on the position
alone, so that drafts, chunked passes and passes without a cache weight a token alike.
"""

import math
import re
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, none_of

SCHEDULES = ("constant", "first:N", "linear:N", "decay:OMEGA,K", "steps:G=W,G=W,...")
"""The forms that `parse_schedule` accepts."""


@dataclass(frozen=True)
class Schedule:
    """A parsed schedule; made by `parse_schedule`."""

    kind: str
    """The word before the colon."""
    steps: int = 0
    """N of `first:N` and `linear:N`."""
    omega: float = 0.0
    power: float = 0.0
    stages: tuple[tuple[int, float], ...] = ()
    """Of `steps`: from which step on which weight holds, in ascending order from step 0."""

    @property
    def is_constant(self) -> bool:
        """Whether every step has the weight 1."""
        return self.kind == "constant"

    def weights(self, steps: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
        """The share of the edit that is made at each step; above 1 only with `steps`."""
        if self.kind == "first":
            return (steps < self.steps).float()
        if self.kind == "linear":
            return (1 - steps / self.steps).clamp(min=0)
        if self.kind == "decay":
            return (1 + self.omega * steps.float()) ** -self.power
        if self.kind == "steps":
            starts = torch.tensor([start for start, _ in self.stages], device=steps.device)
            shares = torch.tensor([weight for _, weight in self.stages], device=steps.device)
            return shares[torch.searchsorted(starts, steps.contiguous(), right=True) - 1]
        return torch.ones_like(steps, dtype=torch.float32)

    def weight(self, step: int) -> float:
        """The share at one step."""
        return float(self.weights(torch.tensor([[step]])))


def parse_schedule(text: str) -> Schedule:
    """Parse a schedule.

    `constant`; `first:N` (full strength for the first N new tokens, then none); `linear:N` (from
    full strength to none over N tokens); `decay:OMEGA,K` with weight (1 + OMEGA g)^-K (arXiv
    2510.01246, there with K of 3 to 4); `steps:0=1.5,8=1,32=0.5` (from each step on another weight:
    for a format's opening, its body and its close).

    Raises UsageError, which lists what is allowed, for anything else.
    """
    word = text.strip()
    if word == "constant":
        return Schedule("constant")
    if found := re.fullmatch(r"(first|linear):(\d+)", word):
        if int(found[2]) > 0:
            return Schedule(found[1], steps=int(found[2]))
        raise UsageError(f"`schedule` {word}: N must be at least 1 token")
    if found := re.fullmatch(r"decay:([^,]+),([^,]+)", word):
        try:
            omega, power = float(found[1]), float(found[2])
        except ValueError:
            omega, power = -1.0, -1.0
        if math.isfinite(omega) and math.isfinite(power) and omega > 0 and power > 0:
            return Schedule("decay", omega=omega, power=power)
        raise UsageError(f"`schedule` {word}: OMEGA and K must be numbers above 0, as decay:0.05,3")
    if word.startswith("steps:"):
        return Schedule("steps", stages=_stages(word))
    raise none_of("`schedule`", SCHEDULES, text)


def _stages(word: str) -> tuple[tuple[int, float], ...]:
    """The stages of a schedule `steps:0=1.5,8=1`."""
    try:
        pairs = [pair.split("=") for pair in word.removeprefix("steps:").split(",")]
        stages = tuple((int(start), float(weight)) for start, weight in pairs)
    except ValueError:
        stages = ()
    starts = [start for start, _ in stages]
    rising = starts[:1] == [0] and all(a < b for a, b in zip(starts, starts[1:], strict=False))
    if not rising or not all(math.isfinite(weight) and weight >= 0 for _, weight in stages):
        raise UsageError(
            f"`schedule` {word}: give weights from step 0 on, steps in ascending order and weights "
            "of 0 or more, as steps:0=1.5,8=1,32=0.5"
        )
    return stages
