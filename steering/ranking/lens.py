"""The logit lens: the tokens whose logits a direction of the residual stream raises."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.reading.lens import logits_of, normed

_ROWS_AT_ONCE = 16384


def lens_tokens(lm: LanguageModel, direction: Float[Tensor, " d_model"], k: int = 6) -> list[str]:
    """The tokens whose logits a direction raises most: the top of W_U norm(d) (logit lens)."""
    return [lm.tokenizer.decode([i]) for i in lens_ids(lm, direction[None], k)[0]]


def lens_ids(lm: LanguageModel, directions: Float[Tensor, "n d_model"], k: int) -> list[list[int]]:
    """Ids of the k tokens that each direction raises most, best first."""
    found: list[list[int]] = []
    with torch.inference_mode():
        for logits in logits_of(lm, directions, len(directions)):
            found += logits.topk(k).indices.tolist()
    return found


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
