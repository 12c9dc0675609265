"""What heads would give with some of their inputs from another model.

At token p a head's output is sum_s softmax(q_p k_s)_s v_s over the tokens s <= p. Here q, k and v
are those of one model, some of them those of another that read the same prompt, and the output is
computed anew; put in the place of the head's z, it says whether the difference between the models
came in with what the head looks for (q), where it looks (k), or what it moves (v).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from saesteer.mechanisms.patching.sites import run_model
from saesteer.sae.model.attention import HeadTap, head_tap
from saesteer.sae.model.language_model import LanguageModel

SITES = ("q", "k", "v", "scores")
Inputs = dict[tuple[int, str], Tensor]


def head_inputs(lm: LanguageModel, ids: Sequence[int]) -> tuple[Inputs, HeadTap]:
    """q, k, v and masked scores `[head, token, …]` of every block of one run, and the tap, which
    knows how scores are scaled."""
    kept: Inputs = {}

    def keep(place: tuple[int, str]) -> None:
        tap.edits[place] = lambda values: kept.update({place: values[0].detach()})

    rows = torch.tensor([list(ids)], device=lm.device)
    with torch.no_grad(), head_tap(lm) as tap:
        for layer in range(lm.n_layers):
            for site in SITES:
                keep((layer, site))
        run_model(lm, rows, use_cache=False)
    return kept, tap


def mixed_output(
    own: Inputs, theirs: Inputs, taken: str, layer: int, head: int, at: int, tap: HeadTap
) -> Tensor:
    """z `[d_head]` of a head at token `at`, with the inputs named in `taken` (some of q, k, v) from
    the other model. Masks, scale and soft-cap are the own model's."""
    q, k, v = (
        (theirs if site in taken else own)[layer, site][head].double() for site in ("q", "k", "v")
    )
    scaling, softcap = tap.scaling[layer]
    scores = k[: at + 1] @ q[at] * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    # Masked keys (a sliding window) have the lowest number or minus infinity for a score.
    before = own[layer, "scores"][head, at, : at + 1]
    hidden = before <= torch.finfo(before.dtype).min / 2
    pattern = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return (pattern @ v[: at + 1]).to(own[layer, "v"])
