"""From scores to a choice: filters, near-duplicates, and fusion of several rankings."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saesteer.steering.ranking.detection_scores import NEUTRAL
from saesteer.steering.ranking.reading import ControlRates

DENSE_RATE = 0.2
"""A latent on at more than this share of plain text's tokens is dense."""

TEMPLATE_SHARE = 0.9
"""A latent belongs to the template when its rate there makes up more than this share of the sum of
its rates there and in texts."""

DUPLICATE_COSINE = 0.9
"""Two latents whose decoder rows have a larger cosine are duplicates."""

LEADERS = 500
"""Latents, best first, among which duplicates are looked for."""

FUSION_CONSTANT = 60
"""Of reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009)."""

FilterMasks = dict[str, Bool[Tensor, " d_sae"]]


def best_first(score: Float[Tensor, " d_sae"], mu: Float[Tensor, " d_sae"]) -> Tensor:
    """All latents `[d_sae]`, best first: by score, ties by mu, then by number; NaN comes last."""
    order = torch.argsort(mu, descending=True, stable=True)
    known = score.nan_to_num(nan=-torch.inf)
    return order[torch.argsort(known[order], descending=True, stable=True)]


def filter_masks(control: ControlRates, q: Float[Tensor, " d_sae"], max_fdr: float) -> FilterMasks:
    """Which latents each filter would remove, `[d_sae]` each.

    - `dense`: on at more than `DENSE_RATE` of the tokens of plain texts;
    - `template`: on at the template, position 0 and attention sinks rather than in plain texts:
      r_other / (r_other + r_text) above `TEMPLATE_SHARE`, by rates, so that a long template does
      not count for more;
    - `fdr`: q above `max_fdr`.
    """
    both = control.other + control.text
    share = control.other / both.clamp_min(1e-12)
    return {
        "dense": control.text > DENSE_RATE,
        "template": (both > 0) & (share > TEMPLATE_SHARE),
        "fdr": q > max_fdr,
    }


def masked_out(
    filters: Mapping[str, Bool[Tensor, " d_sae"]], drop: Sequence[str]
) -> Bool[Tensor, " d_sae"] | None:
    """The latents that the filters in `drop` remove, without `duplicate`, which needs an order."""
    masks = [filters[name] for name in drop if name != "duplicate"]
    return torch.stack(masks).any(dim=0) if masks else None


def duplicates(leaders: Sequence[int], directions: Float[Tensor, "n d_model"]) -> dict[int, int]:
    """For each latent whose direction a better one already has: that better one.

    `leaders` are latents, best first, and `directions` their decoder rows. A latent that resembles
    only a duplicate is kept.
    """
    rows = torch.nn.functional.normalize(directions.detach().float(), dim=-1).cpu()
    alike = rows @ rows.T > DUPLICATE_COSINE
    found: dict[int, int] = {}
    kept: list[int] = []
    for place, latent in enumerate(leaders):
        twin = next((other for other in kept if bool(alike[place, other])), None)
        if twin is None:
            kept.append(place)
        else:
            found[latent] = leaders[twin]
    return found


def fuse(
    columns: Mapping[str, Float[Tensor, " d_sae"]], mu: Float[Tensor, " d_sae"]
) -> Float[Tensor, " d_sae"]:
    """Reciprocal rank fusion: sum over columns of 1 / (60 + rank), rank from 1.

    A latent gets nothing from a column where it is NaN or not above neutral.
    """
    total = torch.zeros(len(mu), dtype=torch.float64)
    for name, column in columns.items():
        order = best_first(column, mu)
        shares = torch.empty(len(mu), dtype=torch.float64)
        shares[order] = 1 / (FUSION_CONSTANT + torch.arange(1, len(mu) + 1, dtype=torch.float64))
        total += torch.where(column > NEUTRAL.get(name, 0.0), shares, 0.0)
    return total
