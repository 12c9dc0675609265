"""Nucleus (top-p) sampling without sorting the vocabulary (Holtzman et al., arXiv 1904.09751)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# So many tokens hold any usual nucleus; where they do not, the whole vocabulary is sorted.
_CUT = 1024


class Nucleus:
    """A logits processor for transformers' `generate`: temperature, then top-p.

    It gives what `TemperatureLogitsWarper` and `TopPLogitsWarper` give. The latter sorts the whole
    vocabulary at each step, which for 150,000 tokens takes longer than a small model's pass.
    """

    def __init__(self, temperature: float, top_p: float) -> None:
        self.temperature = temperature
        self.top_p = top_p

    def __call__(
        self, input_ids: Int[Tensor, "batch seq"], scores: Float[Tensor, "batch vocabulary"]
    ) -> Float[Tensor, "batch vocabulary"]:
        return keep_nucleus(scores / self.temperature, self.top_p)


def keep_nucleus(
    scores: Float[Tensor, "batch vocabulary"], top_p: float
) -> Float[Tensor, "batch vocabulary"]:
    """The scores of the fewest likeliest tokens that hold `top_p` of the probability; -inf for all
    others. `top_p` is in (0, 1]; 1 keeps every token."""
    if top_p >= 1:
        return scores
    vocabulary = scores.shape[-1]
    values, tokens = scores.topk(min(_CUT, vocabulary), dim=-1)
    whole = scores.logsumexp(dim=-1, keepdim=True)
    mass = (values - whole).double().exp()
    if values.shape[-1] < vocabulary and bool((mass.sum(dim=-1) < top_p).any()):
        values, tokens = scores.sort(dim=-1, descending=True)
        mass = (values - whole).double().exp()
    # A token stays where those likelier than it hold less than top_p; so the likeliest does.
    likelier = mass.cumsum(dim=-1) - mass
    kept = values.masked_fill(likelier >= top_p, -torch.inf)
    return torch.full_like(scores, -torch.inf).scatter(-1, tokens, kept)
