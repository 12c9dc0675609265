"""What is measured at the last token: one number for each row of logits, in float64."""

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.data.encoding import EncodedPair


def check_metric(metric: str, pairs: list[EncodedPair]) -> None:
    """Raise UsageError for a metric that needs a wrong answer where a pair has none."""
    if metric == "logit-diff" and any(pair.wrong is None for pair in pairs):
        without = sum(pair.wrong is None for pair in pairs)
        raise UsageError(
            f"`metric` logit-diff needs a wrong answer, which {without} of {len(pairs)} pairs do "
            "not have: give wrong, or logprob"
        )


def default_metric(pairs: list[EncodedPair]) -> str:
    """`logit-diff`, which a shift of all logits leaves alone, where every pair has a wrong answer;
    else `logprob`."""
    return "logprob" if any(pair.wrong is None for pair in pairs) else "logit-diff"


def measure(
    metric: str,
    logits: Float[Tensor, "rows vocabulary"],
    pair: EncodedPair,
    base: Float[Tensor, " vocabulary"],
) -> Float[Tensor, " rows"]:
    """The metric of each row.

    `logit-diff` is answer minus wrong, `logprob` in nats, `logit` as it is; `prob` is p of the
    answer, `prob-ratio` that over p in the base run, so that effects are (p' - p) / p: a mean of
    those is led by the pairs whose p was small, where p' / p has no bound; `rr` is 1 over the
    answer's rank; `accuracy` is 1 where the answer comes first of the vocabulary; `kl` is
    KL(base || row) in nats.
    """
    if metric == "logit-diff":
        assert pair.wrong is not None
        return logits[:, pair.answer].double() - logits[:, pair.wrong].double()
    if metric == "logit":
        return logits[:, pair.answer].double()
    if metric == "rr":
        return 1 / _rank(logits, pair.answer)
    if metric == "accuracy":
        return (_rank(logits, pair.answer) == 1).double()
    if metric == "kl":
        before = base.detach().double().log_softmax(-1)
        return (before.exp() * (before - logits.double().log_softmax(-1))).sum(-1)
    logprob = logits[:, pair.answer].double() - logits.double().logsumexp(-1)
    if metric == "logprob":
        return logprob
    if metric == "prob":
        return logprob.exp()
    if metric == "prob-ratio":
        base = base.detach().double()
        return (logprob - (base[pair.answer] - base.logsumexp(-1))).exp()
    raise UsageError(f"`metric` is unknown: {metric!r}")


def _rank(logits: Tensor, answer: int) -> Tensor:
    """From 1; of equal logits, the smaller id comes first."""
    own = logits[:, answer, None]
    before = torch.arange(logits.shape[1], device=logits.device) < answer
    ahead = (logits > own) | ((logits == own) & before)
    return 1 + ahead.sum(-1).double()
