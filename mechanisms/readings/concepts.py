"""`ffn_concepts`: the directions that an MLP writes, and how far they turned.

The last matrix of a block's MLP has a row of d_model for each neuron; the rows are centred, and
their k leading principal directions V span what the MLP writes. Two models, or two blocks, are
compared by the overlap |V_a^T V_b|_F^2 / k: 1 for one subspace, k / d_model for unrelated ones.
A direction's words are the top of its products with the unit rows of the unembedding, at each end
apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.hooks import resolve_site
from saesteer.sae.model.language_model import LanguageModel

Array = np.ndarray
_MATRICES = {"Linear": 0, "Conv1D": 1}
"""Class of a matrix -> which axis of its weight is what comes out: GPT-2 keeps [in, out]."""


def neuron_rows(lm: LanguageModel, layer: int) -> Tensor:
    """What each neuron of a block's MLP writes, `[d_ff, d_model]`, float64.

    Raises UserError for a block whose MLP has no such matrix, as in a mixture of experts.
    """
    module = resolve_site(lm, layer, "mlp_out").module
    around: nn.Module = lm.blocks[layer] if not any(True for _ in module.children()) else module
    found = [
        part for name, part in around.named_modules()
        if "att" not in name.lower() and type(part).__name__ in _MATRICES
        and part.weight.shape[_MATRICES[type(part).__name__]] == lm.d_model
    ]  # fmt: skip
    if not found:
        raise UserError(
            f"block {layer} of {lm.name} has no one matrix that its MLP writes by: `what` concepts "
            "needs one"
        )
    weight: Tensor = found[-1].weight.detach().double()
    return weight.T if _MATRICES[type(found[-1]).__name__] == 0 else weight


def leading_directions(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(V `[d_model, k]`, the share of variance of each) of centred rows."""
    centred = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    order = values.argsort(descending=True)[:k]
    return vectors[:, order], values[order].clamp_min(0) / values.sum()


def overlap(one: Tensor, other: Tensor) -> float:
    """|V_a^T V_b|_F^2 / k of two orthonormal bases `[d_model, k]`."""
    return float((one.T @ other).square().sum() / one.shape[1])


def largest_angle(one: Tensor, other: Tensor) -> float:
    """The largest principal angle between two subspaces, in degrees."""
    smallest = torch.linalg.svdvals(one.T @ other).min().clamp(-1, 1)
    return float(torch.rad2deg(torch.arccos(smallest)))


def direction_words(lm: LanguageModel, directions: Tensor, top: int) -> list[tuple[list[str], ...]]:
    """The words at either end of each direction `[d_model, n]`."""
    unembed: Any = lm.unembed
    weight = unembed.weight.detach().to(torch.float32)
    unit = weight / weight.norm(dim=1, keepdim=True).clamp_min(1e-12)
    scores = (unit @ directions.to(unit)).T
    top = min(top, scores.shape[1])
    ends = [scores.topk(top, largest=largest).indices for largest in (True, False)]
    decode = lm.tokenizer.convert_ids_to_tokens
    return [tuple(decode(row.tolist()) for row in pair) for pair in zip(*ends, strict=True)]


def field_shares(
    words: Sequence[tuple[list[str], ...]], fields: Mapping[str, Sequence[str]], seed: int
) -> dict[str, dict[str, float]]:
    """Share of the top words that belong to each field, with a bootstrap over directions."""
    found = {}
    drawn = np.random.default_rng(seed)
    picks = drawn.integers(0, len(words), (1000, len(words)))
    for name, members in fields.items():
        known = {word.lower() for word in members}
        shares = np.array(
            [np.mean([_plain(w) in known for end in ends for w in end]) for ends in words]
        )
        low, high = np.percentile(shares[picks].mean(1), [2.5, 97.5])
        found[name] = {"value": float(shares.mean()), "low": float(low), "high": float(high)}
    return found


def _plain(token: str) -> str:
    return token.lstrip("Ġ▁ ").lower()
