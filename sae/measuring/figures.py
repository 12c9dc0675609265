"""The figures of an SAE: what each row of activations gives, and what is made of the sums.

`docs/metrics.md` defines them and says which of other tools' figures they equal.
"""

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

OF_ROWS = (
    "rows",
    "error",
    "variance",
    "square",
    "output_square",
    "product",
    "active",
    "cosine",
    "norm_ratio",
    "token_error",
    "deviation_error",
)
"""What `row_values` gives for each row."""
OF_RUNS = ("ce_plain", "ce_spliced", "ce_ablated", "ce_zero", "kl")
"""What running the model gives for each row."""

Sums = dict[str, NDArray[np.float64]]
# Lengths below this count as none; a quotient of zeros is then 0.
_TINY = 1e-30


def row_values(
    x: Float[Tensor, "rows d_model"],
    reconstruction: Float[Tensor, "rows d_model"],
    latents: Float[Tensor, "rows d_sae"],
    mean: Float[Tensor, " d_model"],
) -> dict[str, Float[Tensor, " rows"]]:
    """What the sums are made of; `mean` is the mean of x over everything that is measured.

    - `error` ||x - x^||^2, `variance` ||x - mean||^2, `square` ||x||^2, `output_square` ||x^||^2,
      `product` <x, x^>, `active`: latents that are not 0;
    - `cosine` of x and x^, `norm_ratio` ||x^|| / ||x||, `token_error` ||x - x^||^2 / ||x||^2,
      `deviation_error` ||x - x^||^2 / ||x - mean||^2: to be averaged over rows.
    """
    error = (x - reconstruction).square().sum(dim=1)
    variance = (x - mean).square().sum(dim=1)
    square, output_square = x.square().sum(dim=1), reconstruction.square().sum(dim=1)
    product = (x * reconstruction).sum(dim=1)
    length = square.sqrt().clamp(min=_TINY)
    output_length = output_square.sqrt()
    return {
        "rows": torch.ones_like(error),
        "error": error,
        "variance": variance,
        "square": square,
        "output_square": output_square,
        "product": product,
        "active": (latents != 0).sum(dim=1).to(error.dtype),
        "cosine": product / (length * output_length).clamp(min=_TINY),
        "norm_ratio": output_length / length,
        "token_error": error / square.clamp(min=_TINY),
        "deviation_error": error / variance.clamp(min=_TINY),
    }


def figures_of_rows(sums: Sums) -> Sums:
    """The figures of rows alone; every sum may be an array, one entry per resample."""
    rows = np.maximum(sums["rows"], 1)
    return {
        "fvu": sums["error"] / np.maximum(sums["variance"], _TINY),
        "l0": sums["active"] / rows,
        "cosine": sums["cosine"] / rows,
        "relative_norm": sums["norm_ratio"] / rows,
        "shrinkage": _ratio(sums["product"], sums["output_square"]),
        "token_error": sums["token_error"] / rows,
        "ev_legacy": 1 - sums["deviation_error"] / rows,
        "ev_about_zero": 1 - _ratio(sums["error"], sums["square"]),
    }


def figures_of_runs(sums: Sums) -> Sums:
    """The figures of the model's predictions, in nats per token."""
    rows = np.maximum(sums["rows"], 1)
    plain, spliced = sums["ce_plain"], sums["ce_spliced"]
    ablated, zero = sums["ce_ablated"], sums["ce_zero"]
    return {
        "ce_plain": plain / rows,
        "ce_spliced": spliced / rows,
        "ce_ablated": ablated / rows,
        "ce_zero": zero / rows,
        "ce_recovered": _ratio(ablated - spliced, ablated - plain),
        "ce_recovered_zero": _ratio(zero - spliced, zero - plain),
        "ce_increase": (spliced - plain) / rows,
        "kl": sums["kl"] / rows,
    }


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    """NaN where there is nothing to divide by."""
    return above / np.where(below == 0, np.nan, below)
