"""Latents of an SAE in place of directions: a few decoder rows whose sum is nearly the direction.

Orthogonal matching pursuit: the row that agrees most with what is left is taken next, and all
weights are fitted again by least squares (Pati, Rezaiifar and Krishnaprasad 1993). Several
directions, those of the places of a tail, are taken together and share their latents (Tropp,
Gilbert and Strauss 2006). How few latents keep the effect is for the model to say.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.model.hooks import sae_hook_point
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.plans.from_sae import encoder_columns
from saesteer.steering.plans.part import PlanPart, SAEIdentity
from saesteer.steering.plans.plan import PlannedLatent
from saesteer.steering.ranking.lens import lens_tokens

LENSES = 8
"""Latents of each phase whose lens tokens are told."""


@dataclass(frozen=True, eq=False)
class Pursuit:
    """Latents in the order in which they were taken, and how near each number of them comes."""

    ids: tuple[int, ...]
    weights: tuple[Tensor, ...]
    """After each step, the weights `[places, n]` of the n latents taken so far."""
    explained: tuple[float, ...]
    """After each step, the share of the directions' squared length that the sum holds."""


def pursue(
    directions: Float[Tensor, "places d_model"], rows: Float[Tensor, "d_sae d_model"], most: int
) -> Pursuit:
    """Take up to `most` decoder rows for some directions together, in float64.

    Ends early when nothing is left that a row agrees with.
    """
    wanted, rows = directions.double(), rows.double()
    lengths = rows.norm(dim=1)
    usable = lengths > 1e-8
    unit = rows / lengths.clamp(min=1e-8)[:, None]
    total = float((wanted**2).sum())
    ids: list[int] = []
    weights: list[Tensor] = []
    explained: list[float] = []
    left = wanted
    for _ in range(min(most, len(rows))):
        agreement = ((left @ unit.T) ** 2).sum(dim=0).masked_fill(~usable, -1.0)
        agreement[ids] = -1.0
        best = int(agreement.argmax())
        if float(agreement[best]) <= 1e-12 * total:
            break
        ids.append(best)
        basis = rows[ids]
        fitted = torch.linalg.lstsq(basis.T, wanted.T).solution.T
        left = wanted - fitted @ basis
        weights.append(fitted)
        explained.append(1 - float((left**2).sum()) / total)
    return Pursuit(tuple(ids), tuple(weights), tuple(explained))


@dataclass(frozen=True, eq=False)
class LatentPhases:
    """Both phases at the layer of one SAE, as latents."""

    sae: SAE
    layer: int
    site: str
    directions: dict[str, Float[Tensor, "places d_model"]]
    """By phase, `tail` and `replies`."""
    scope: str
    """Of the tail's part."""
    pursuits: dict[str, Pursuit]

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        sae: SAE,
        tail: Float[Tensor, "layers places d_model"],
        replies: Float[Tensor, "layers d_model"],
        scope: str,
        most: int,
    ) -> "LatentPhases":
        """Raises UserError for an SAE whose latents have no unit of their own, or of another
        site."""
        point = sae_hook_point(sae, lm)
        if sae.spec.scales_tokens or point.site != "resid_post":
            what = "scales each token" if sae.spec.scales_tokens else f"reads {point.site}"
            raise UserError(
                f"`sae` {sae.source} {what}, and directions are found in the residual after a "
                "block: give SAEs of resid_post with one scale for all tokens"
            )
        rows = sae.W_dec.detach().cpu()
        directions = {"tail": tail[point.layer], "replies": replies[point.layer][None]}
        pursuits = {phase: pursue(rows_of, rows, most) for phase, rows_of in directions.items()}
        return cls(sae, point.layer, point.site, directions, scope, pursuits)

    def part(self, lm: LanguageModel, phase: str, n: int) -> PlanPart:
        """The part of the first n latents of a phase, as long as the direction at each place."""
        pursuit, wanted = self.pursuits[phase], self.directions[phase].double()
        n = min(n, len(pursuit.ids))
        ids = list(pursuit.ids[:n])
        rows = self.sae.W_dec[ids].detach().cpu().clone()
        weights = pursuit.weights[n - 1]
        lengths = (weights @ rows.double()).norm(dim=1, keepdim=True)
        weights = weights * wanted.norm(dim=1, keepdim=True) / lengths.clamp(min=1e-8)
        by_place = weights.float() if phase == "tail" and self.scope == "tail" else None
        values = [1.0] * n if by_place is not None else weights[0].tolist()
        columns = encoder_columns(self.sae, ids)
        spec = self.sae.spec
        return PlanPart(
            sae=SAEIdentity(self.sae.source, self.sae.sha256, spec.architecture, spec.k),
            site=self.site,
            layer=self.layer,
            latents=tuple(
                PlannedLatent(id=i, value=value, lens=tuple(lens_tokens(lm, row.float())))
                for i, value, row in zip(ids, values, rows, strict=True)
            ),
            directions=rows,
            scope=self.scope if phase == "tail" else "replies",
            by_place=by_place,
            W_enc=columns.get("W_enc"),
            b_enc=columns.get("b_enc"),
            threshold=columns.get("threshold"),
        )

    def count(self, phase: str, share: float) -> int:
        """The fewest latents that hold a share of the squared length, or all that were taken."""
        held = self.pursuits[phase].explained
        return next((n for n, value in enumerate(held, 1) if value >= share), len(held))

    def row(self, share: float, lm: LanguageModel) -> dict[str, object]:
        """The latents of each phase at a share of the squared length, JSON-ready.

        `lens` has the tokens that the decoder rows of the first few promote most.
        """
        found: dict[str, object] = {
            "layer": self.layer,
            "sae": self.sae.source,
            "sae_sha256": self.sae.sha256,
        }
        for phase, pursuit in self.pursuits.items():
            n = self.count(phase, share)
            held = pursuit.explained[n - 1]
            rows = self.sae.W_dec[list(pursuit.ids[: min(n, LENSES)])].detach().cpu().float()
            found[phase] = {
                "latents": list(pursuit.ids[:n]),
                "squared_length_explained": held,
                "lens": [lens_tokens(lm, row) for row in rows],
            }
        return found
