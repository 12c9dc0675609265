"""The logit lens: the tokens whose logits a direction of the residual stream raises and lowers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.sae.model.language_model import LanguageModel

_LOGITS_AT_ONCE = 2**24
"""64 MB, and a copy."""


@dataclass(frozen=True, eq=False)
class Lens:
    """The ends of the logit lens of n directions, on the CPU."""

    up: Int[Tensor, "n k"]
    """Ids of the tokens that are raised most, best first."""
    up_logits: Float[Tensor, "n k"]
    down: Int[Tensor, "n k"]
    """Ids of the tokens that are lowered most."""
    down_logits: Float[Tensor, "n k"]


def normed(lm: LanguageModel, directions: Float[Tensor, "n d_model"]) -> Tensor:
    """Directions through the final norm, as the unembedding sees them."""
    weight = next(lm.unembed.parameters())
    d = directions.to(weight.device, weight.dtype)
    # The length only matters relative to the norm's epsilon, negligible at sqrt(d_model).
    lengths = d.float().norm(dim=-1, keepdim=True).clamp_min(1e-12)
    factor: Tensor = math.sqrt(d.shape[-1]) / lengths
    d = d * factor.to(d.dtype)
    if lm.final_norm is None:
        return d
    after: Tensor = lm.final_norm(d)
    return after


def logits_of(
    lm: LanguageModel, directions: Float[Tensor, "n d_model"], rows: int
) -> Iterator[Float[Tensor, "_ vocabulary"]]:
    """W_U norm(d) of some `rows` directions after the other, in float32."""
    for first in range(0, len(directions), rows):
        logits = lm.unembed(normed(lm, directions[first : first + rows]))
        # Padded vocabularies have untrained rows after the last token.
        yield logits[:, : len(lm.tokenizer)].float()


def lens(lm: LanguageModel, directions: Float[Tensor, "n d_model"], k: int) -> Lens:
    """The `k` tokens that each direction raises and lowers most, and those logits."""
    vocabulary = len(lm.tokenizer)
    k = min(k, vocabulary)
    ends: list[list[Tensor]] = [[], [], [], []]
    with torch.inference_mode():
        for logits in logits_of(lm, directions, max(1, _LOGITS_AT_ONCE // vocabulary)):
            up, down = logits.topk(k), logits.topk(k, largest=False)
            for found, values in zip(
                ends, (up.indices, up.values, down.indices, down.values), strict=True
            ):
                found.append(values.cpu())
    return Lens(*(torch.cat(found) for found in ends))
