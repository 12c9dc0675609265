"""Whether an edit did to its latents what it says: each residual is encoded before and after it.

Adding alpha d_j raises latent j by alpha only where its encoder column has the product 1 with d_j,
no other latent of the plan overlaps with it, and the activation function lets it through.
"""

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
from saesteer.steering.hooking.edits import new_values
from saesteer.steering.hooking.hook import steer
from saesteer.steering.hooking.latent_values import edit_reader, matching_sae, readable
from saesteer.steering.plans.plan import Plan


@dataclass(frozen=True)
class LatentChange:
    """Means over the tokens that an edit changed, in the SAE file's units."""

    id: int
    before: float
    after: float
    asked: float | None
    """The change that the plan asks for; None for `project`, which has no latent semantics."""
    tokens: int
    on_before: float
    """Share of those tokens where the latent is on (not 0)."""
    on_after: float

    @property
    def measured(self) -> float:
        """The change that came of it."""
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
    sae: SAE | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    chat: bool | None = None,
    force: bool = False,
) -> list[LatentChange]:
    """Generate under a plan and encode every residual that it changed, before and after.

    Raises what `steer` raises, and UserError when the latents of the plan can only be read with
    its SAE and that cannot be had.
    """
    if not texts:
        raise UsageError("there is no text to read latents on: give at least one")
    if sae is not None or not readable(plan):
        sae = matching_sae(plan, sae, force)
    reader, point = edit_reader(plan, sae), resolve_site(lm, plan.layer, plan.site)
    prompts = [
        encode_prompt(lm, text, chat=lm.has_chat_template if chat is None else chat)
        for text in texts
    ]
    came: list[Tensor] = []
    pairs: list[tuple[Tensor, Tensor]] = []

    def compare(h: Float[Tensor, "batch seq d_model"]) -> None:
        before = came.pop()
        changed = (h != before).any(dim=-1)
        pairs.append((before[changed].float(), h[changed].float()))

    with (
        hooked(point, lambda h: came.append(h)),
        steer(lm, plan, prompts=prompts, sae=sae, force=force),
        hooked(point, compare),
    ):
        generate(lm, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    h, moved = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    before, after = reader.read(h).double().cpu(), reader.read(moved).double().cpu()
    asked = _asked(plan, h, before)
    return [
        LatentChange(
            latent.id, _mean(before[:, i]), _mean(after[:, i]),
            None if asked is None else _mean(asked[:, i]), len(h),
            _mean((before[:, i] != 0).double()), _mean((after[:, i] != 0).double()),
        )
        for i, latent in enumerate(plan.latents)
    ]  # fmt: skip


def _asked(
    plan: Plan, h: Float[Tensor, "tokens d_model"], now: Float[Tensor, "tokens n"]
) -> Float[Tensor, "tokens n"] | None:
    """a' - a of each latent at full weight."""
    if plan.method == "project":
        return None
    dose = torch.tensor(plan.doses(), dtype=torch.float64)
    if plan.method not in ("add", "add-keep-norm"):
        return new_values(plan.method, now, dose) - now
    if plan.unit == "rel":
        length = (dose @ plan.directions.double()).norm()
        norms: Tensor = h.double().cpu().norm(dim=1, keepdim=True)
        asked: Tensor = norms * (dose * plan.scale / length)
        return asked
    return dose.expand_as(now)


def _mean(values: Float[Tensor, " tokens"]) -> float:
    return float(values.mean()) if len(values) else 0.0
