"""The next token of a row: as `generate` chooses it, with the settings of the row's request."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.model.nucleus import keep_nucleus


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    presence_penalty: float = 0.0
    """Taken from the logit of every token that the answer holds."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token as often as the answer holds it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    """Number of likeliest tokens to report beside the chosen one; None reports nothing."""

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is taken as it is."""
        changed = self.presence_penalty or self.frequency_penalty or self.logit_bias
        return self.temperature == 0 and not changed


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of one place, by the steered model before any setting of the sampling."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens, best first."""


def row_processors(lm: LanguageModel) -> list[Any]:
    """The logits processors that the model's own generation settings ask `generate` for."""
    from transformers import (
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SuppressTokensLogitsProcessor,
    )

    settings = lm.model.generation_config
    found: list[Any] = []
    penalty = getattr(settings, "repetition_penalty", None)
    if penalty not in (None, 1.0):
        found.append(RepetitionPenaltyLogitsProcessor(penalty=penalty))
    if grams := getattr(settings, "no_repeat_ngram_size", None):
        found.append(NoRepeatNGramLogitsProcessor(grams))
    if suppressed := getattr(settings, "suppress_tokens", None):
        found.append(SuppressTokensLogitsProcessor(suppressed, device=lm.device))
    return found


class Sampler:
    """Chooses the tokens of one row.

    Its random numbers are its own: the same seed gives the same answer whatever runs beside it, and
    the one that `generate` gives after `torch.manual_seed` for a batch of one.
    """

    def __init__(
        self, sampling: Sampling, seed: int, processors: Sequence[Any], device: torch.device
    ) -> None:
        self.sampling = sampling
        self._processors = processors
        self._counts: Counter[int] = Counter()
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._device = device

    @property
    def is_plain(self) -> bool:
        """Whether `choose` would take the likeliest token as it is, and report nothing."""
        return self.sampling.is_plain and not self._processors and self.sampling.logprobs is None

    def choose(
        self, logits: Float[Tensor, " vocabulary"], before: Sequence[int]
    ) -> tuple[int, TokenLogprobs | None]:
        """The next token, from logits in float32; `before` are the tokens of the row so far."""
        sampling = self.sampling
        scores = logits[None]
        if self._processors:
            ids = torch.tensor([list(before)], device=self._device)
            for processor in self._processors:
                scores = processor(ids, scores)
        scores = self._adjusted(scores)
        if sampling.temperature == 0:
            token = int(scores.argmax(dim=-1))
        else:
            kept = keep_nucleus(scores / sampling.temperature, sampling.top_p)
            shares = torch.softmax(kept, dim=-1)
            token = int(torch.multinomial(shares, 1, generator=self._generator))
        self._counts[token] += 1
        return token, self._reported(logits, token)

    def _adjusted(self, scores: Float[Tensor, "one vocabulary"]) -> Float[Tensor, "one vocabulary"]:
        """The scores with penalties and biases."""
        sampling = self.sampling
        changes = dict(sampling.logit_bias)
        if sampling.presence_penalty or sampling.frequency_penalty:
            for token, count in self._counts.items():
                taken = sampling.presence_penalty + count * sampling.frequency_penalty
                changes[token] = changes.get(token, 0.0) - taken
        if not changes:
            return scores
        scores = scores.clone()
        scores[0, list(changes)] += torch.tensor(list(changes.values()), device=self._device)
        return scores

    def _reported(self, logits: Float[Tensor, " vocabulary"], token: int) -> TokenLogprobs | None:
        wanted = self.sampling.logprobs
        if wanted is None:
            return None
        logprobs = torch.log_softmax(logits, dim=-1)
        top: tuple[tuple[int, float], ...] = ()
        if wanted:
            values, ids = logprobs.topk(min(wanted, len(logprobs)))
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenLogprobs(float(logprobs[token]), top)
