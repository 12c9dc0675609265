"""Pairing two sets of directions: two SAEs of different seeds, or an SAE and the true features."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import SAE

MOST_ROWS = 16_384
"""Of the smaller set: the time of the Hungarian method grows with its cube."""
SAME = 0.7
"""Two latents with a cosine above this are counted as the same."""


@dataclass(frozen=True)
class Matching:
    """One-to-one pairs of rows of two sets, with the largest sum of similarities."""

    first: Int[Tensor, " pairs"]
    second: Int[Tensor, " pairs"]
    similarity: Float[Tensor, " pairs"]


def unit_rows(rows: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    """Rows of length 1, in float32; rows of zeros stay."""
    return torch.nn.functional.normalize(rows.float(), dim=1)


def match(similarity: Float[Tensor, "first second"]) -> Matching:
    """The Hungarian method. Every row of the smaller set gets a partner.

    Raises UserError for more than `MOST_ROWS` of them.
    """
    from scipy.optimize import linear_sum_assignment

    smaller = min(similarity.shape)
    if smaller > MOST_ROWS:
        raise UserError(
            f"the Hungarian method pairs up to {MOST_ROWS:,} rows of the smaller set, got "
            f"{smaller:,}: compare narrower SAEs"
        )
    rows, columns = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    first, second = torch.from_numpy(rows), torch.from_numpy(columns)
    return Matching(first, second, similarity.cpu()[first, second])


def stability(sae: SAE, other: SAE) -> dict[str, Any]:
    """How far two SAEs have learnt the same decoder directions.

    - `matched_cosine`: mean cosine of the decoder rows that the Hungarian method pairs;
      `matched_share`: share of the pairs above 0.7;
    - `best_cosine`: mean over the latents of `sae` of the largest cosine with any row of `other`,
      where several may have the same partner.

    Raises UserError when they write rows of different widths, or are too wide to be paired.
    """
    width, wanted = other.W_dec.shape[1], sae.W_dec.shape[1]
    if width != wanted:
        raise UserError(
            f"`against` {other.source or '(in memory)'} writes rows of width {width}, the SAE "
            f"{sae.source or '(in memory)'} of width {wanted}: give an SAE of the same place"
        )
    cosines = unit_rows(sae.W_dec) @ unit_rows(other.W_dec.to(sae.W_dec.device)).T
    pairs = match(cosines)
    return {
        "source": other.source,
        "sha256": other.sha256,
        "d_sae": other.spec.d_sae,
        "pairs": len(pairs.first),
        "matched_cosine": float(pairs.similarity.mean()),
        "matched_share": float((pairs.similarity > SAME).float().mean()),
        "best_cosine": float(cosines.amax(dim=1).mean()),
    }
