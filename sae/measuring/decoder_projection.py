"""A proxy for whether an SAE's L0 is right: how far inputs project on rows that should be silent.

Chanin and Garriga-Alonso, arXiv 2508.16560. Decoder rows that are true features are nearly
orthogonal to inputs without those features. When L0 is too low or too high, rows are mixtures of
features, and inputs project on more of them. Among SAEs of the same activations and width, the one
whose n-th largest projection is smallest has the L0 to choose.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.measuring.matching import unit_rows

# Projections held at once; more rows would not change the third digit.
_MOST = 2**24
MOST_ROWS = 4096


def rows_wanted(d_sae: int) -> int:
    """How many rows of activations `decoder_projection` makes use of."""
    return max(1, min(MOST_ROWS, _MOST // d_sae))


def decoder_projection(
    sae: SAE, x: Float[Tensor, "rows d_model"], n: int | None = None
) -> dict[str, Any]:
    """The (n * rows)-th largest of all products of x - b_dec with unit decoder rows.

    `n` is by default half of d_sae. It has to be well above L0: projections up to L0 are of latents
    that should fire. In units of the activations, so it compares SAEs of one place only.
    """
    d_sae = sae.spec.d_sae
    n = d_sae // 2 if n is None else n
    x = x[: rows_wanted(d_sae)].float()
    products = (x - sae.b_dec.float()) @ unit_rows(sae.W_dec).T
    # The (n * rows)-th largest, counted from 0, as the paper's code does.
    place = products.numel() - n * len(x)
    value = products.flatten().kthvalue(max(1, place)).values
    return {"n": n, "rows": len(x), "value": float(value)}
