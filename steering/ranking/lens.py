"""The logit lens: the tokens whose logits a direction of the residual stream raises."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.sae.model.language_model import LanguageModel

_ROWS_AT_ONCE = 16384


def lens_tokens(lm: LanguageModel, direction: Float[Tensor, " d_model"], k: int = 6) -> list[str]:
    """The tokens whose logits a direction raises most: the top of W_U norm(d) (logit lens)."""
    return [lm.tokenizer.decode([i]) for i in lens_ids(lm, direction[None], k)[0]]


def lens_ids(lm: LanguageModel, directions: Float[Tensor, "n d_model"], k: int) -> list[list[int]]:
    """Ids of the k tokens that each direction raises most, best first."""
    with torch.inference_mode():
        logits = lm.unembed(normed(lm, directions))
        # Padded vocabularies have untrained rows after the last token.
        logits = logits[:, : len(lm.tokenizer)].float()
        found: list[list[int]] = logits.topk(k).indices.tolist()
    return found


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


def lens_scores(
    lm: LanguageModel,
    directions: Float[Tensor, "d_sae d_model"],
    texts: Sequence[str],
    controls: Sequence[str],
) -> Float[Tensor, " d_sae"]:
    """How much each direction raises the tokens of `texts`: mean logit minus that of `controls`.

    Each distinct token counts once; tokens in both count in neither. The unembedding is averaged
    over the tokens first, so that all latents cost one product. Returns zeros when either has no
    token that the other lacks.
    """

    def ids(strings: Sequence[str]) -> set[int]:
        rows = lm.tokenizer(list(strings), add_special_tokens=False)["input_ids"]
        return {i for row in rows for i in row}

    ours, theirs = ids(texts), ids(controls)
    ours, theirs = ours - theirs, theirs - ours
    scores = torch.zeros(len(directions), dtype=torch.float64)
    if not ours or not theirs:
        return scores
    head = lm.unembed
    with torch.inference_mode():
        weight = next(head.parameters()).float()
        axis = weight[sorted(ours)].mean(dim=0) - weight[sorted(theirs)].mean(dim=0)
        # A bias of the head is the same for every direction and is left out.
        for first in range(0, len(directions), _ROWS_AT_ONCE):
            part = normed(lm, directions[first : first + _ROWS_AT_ONCE]).float()
            scores[first : first + len(part)] = (part @ axis).double().cpu()
    return scores
