"""Checks whether an edit changes its latents as asked: residuals are encoded before and after it.

Adding alpha d_j raises latent j by alpha only where its encoder column has the product 1 with d_j,
no other latent of the plan overlaps with it, and the activation function lets it through.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.model.generation import generate
from saesteer.sae.model.hooks import hooked, resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import encode_prompt
from saesteer.steering.hooking.hook import steer
from saesteer.steering.hooking.latent_values import (
    SAEs,
    edit_reader,
    given_sae,
    matching_sae,
    readable,
)
from saesteer.steering.plans.part import PlanPart, weighted_sum
from saesteer.steering.plans.plan import Plan


@dataclass(frozen=True)
class LatentChange:
    """Means over the tokens that an edit changed, in the SAE file's units."""

    id: int
    before: float
    after: float
    asked: float | None
    """The change that the plan asks for; None for `project`, which gives latents no values."""
    tokens: int
    on_before: float
    """Share of those tokens where the latent is on (not 0)."""
    on_after: float
    part: int = 0
    """Which part of the plan it belongs to."""

    @property
    def measured(self) -> float:
        """The change that was measured."""
        return self.after - self.before

    @property
    def share(self) -> float | None:
        """Measured over asked; None where nothing is asked."""
        return self.measured / self.asked if self.asked else None


def read_back(
    lm: LanguageModel,
    plan: Plan,
    texts: Sequence[str],
    *,
    sae: SAEs = None,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    chat: bool | None = None,
    force: bool = False,
) -> list[LatentChange]:
    """Generate under a plan and encode every residual that it changed, before and after.

    The latents of all parts, in their order. Raises what `steer` raises, and UserError when the
    latents of a part can only be read with its SAE which cannot be opened.
    """
    if not texts:
        raise UsageError("there is no text to read latents on: give at least one")
    prompts = [
        encode_prompt(lm, text, chat=lm.has_chat_template if chat is None else chat)
        for text in texts
    ]
    measured = []
    with contextlib.ExitStack() as stack:
        # Nested contexts edit in the order of the parts; hooks around each see its residuals.
        for number in range(len(plan.parts)):
            seen = _BeforeAndAfter(lm, plan, number, sae, force)
            measured.append(seen)
            stack.enter_context(hooked(seen.point, seen.keep))
            stack.enter_context(
                steer(lm, plan.only(number), prompts=prompts, sae=seen.sae, force=force)
            )
            stack.enter_context(hooked(seen.point, seen.compare))
        generate(lm, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [change for seen in measured for change in seen.changes()]


class _BeforeAndAfter:
    """The residuals that one part changes, before its edit and after it."""

    def __init__(self, lm: LanguageModel, plan: Plan, number: int, saes: SAEs, force: bool) -> None:
        self._part, self._number = plan.parts[number], number
        self.sae: SAE | None = given_sae(self._part, saes)
        if self.sae is not None or not readable(self._part):
            self.sae = matching_sae(self._part, self.sae, force)
        self.point = resolve_site(lm, self._part.layer, self._part.site)
        self._waiting: list[Tensor] = []
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def keep(self, h: Float[Tensor, "batch seq d_model"]) -> None:
        """The hook before the edit."""
        self._waiting.append(h)

    def compare(self, h: Float[Tensor, "batch seq d_model"]) -> None:
        """The hook after the edit: keeps the residuals that it changed."""
        before = self._waiting.pop()
        changed = (h != before).any(dim=-1)
        self._pairs.append((before[changed].float(), h[changed].float()))

    def changes(self) -> list[LatentChange]:
        """Means over all changed residuals, for each latent of the part."""
        reader = edit_reader(self._part, self.sae)
        h, moved = (torch.cat(rows) for rows in zip(*self._pairs, strict=True))
        before, after = reader.read(h).double().cpu(), reader.read(moved).double().cpu()
        asked = _asked(self._part, h, before)
        return [
            LatentChange(
                latent.id,
                _mean(before[:, i]),
                _mean(after[:, i]),
                None if asked is None else _mean(asked[:, i]),
                len(h),
                _mean((before[:, i] != 0).double()),
                _mean((after[:, i] != 0).double()),
                self._number,
            )
            for i, latent in enumerate(self._part.latents)
        ]


def _asked(
    part: PlanPart, h: Float[Tensor, "tokens d_model"], now: Float[Tensor, "tokens n"]
) -> Float[Tensor, "tokens n"] | None:
    """a' - a of each latent at full weight."""
    dose = torch.tensor(part.doses(), dtype=torch.float64)
    if part.does.new_value is not None:
        return part.does.new_value(now, dose) - now
    if not part.does.adds or part.by_place is not None:
        return None
    if part.unit == "rel":
        length = weighted_sum(part.doses(), part.directions).norm()
        norms: Tensor = h.double().cpu().norm(dim=1, keepdim=True)
        asked: Tensor = norms * (dose * part.scale / length)
        return asked
    return dose.expand_as(now)


def _mean(values: Float[Tensor, " tokens"]) -> float:
    return float(values.mean()) if len(values) else 0.0
