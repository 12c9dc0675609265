"""Fluency of answers: repetition, variety, and perplexity under the unsteered model."""

import math
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import pad_right
from saesteer.steering.evaluation.grading import repetition

# Log-probabilities over the vocabulary of this many tokens are held at once.
_TOKENS_AT_ONCE = 512


def distinct(tokens: Sequence[Hashable], n: int) -> float | None:
    """Number of distinct n-grams over number of n-grams; None for fewer than n tokens."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def zlib_ratio(text: str) -> float | None:
    """Compressed over raw bytes: small for repetitive text; None for no text."""
    raw = text.encode("utf-8", "surrogatepass")
    return len(zlib.compress(raw, 9)) / len(raw) if raw else None


def cross_entropies(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> list[float | None]:
    """Nats per token of each row of token ids under the model, without a prompt.

    A start token precedes every row, so that its first token counts too. None for empty rows.
    """
    start = lm.tokenizer.bos_token_id
    start = lm.tokenizer.eos_token_id if start is None else start
    start = lm.pad_id if start is None else int(start)
    found: list[float | None] = [None] * len(rows)
    order = sorted((i for i in range(len(rows)) if rows[i]), key=lambda i: len(rows[i]))
    while order:
        longest = len(rows[order[-1]]) + 1
        chunk, order = _split_off(order, max(1, _TOKENS_AT_ONCE // longest))
        ids, mask = pad_right(lm, [[start, *rows[i]] for i in chunk])
        with torch.inference_mode():
            logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            log_probs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
            nats = -log_probs.gather(2, ids[:, 1:, None]).squeeze(2)
            kept = mask[:, 1:].to(nats.dtype)
            means = (nats * kept).sum(dim=1) / kept.sum(dim=1)
        for i, value in zip(chunk, means.tolist(), strict=True):
            found[i] = float(value)
    return found


def _split_off(order: list[int], size: int) -> tuple[list[int], list[int]]:
    """The last `size` entries of a list, and the others before them."""
    return order[-size:], order[:-size]


@dataclass(frozen=True)
class Fluency:
    """Averages over the answers of one arm; None where no answer was long enough."""

    perplexity: float | None
    """exp of the median answer's nats per token under the unsteered model, without its prompt."""
    too_predictable: float | None
    """Share of answers below the 5th percentile of the unsteered arm: loops are easy to predict."""
    distinct_1: float | None
    distinct_2: float | None
    distinct_3: float | None
    repetition: float
    """Mean share of an answer's tokens that its most repeated 4-gram covers."""
    zlib_ratio: float | None
    truncated: float
    """Share of answers that ran into the token limit."""
    empty: float
    """Share of answers without text."""
    tokens: float
    """Mean length."""

    def row(self) -> dict[str, Any]:
        """Every field, JSON-ready."""
        return asdict(self)


def fluency(
    rows: Sequence[Sequence[int]],
    texts: Sequence[str],
    nats: Sequence[float | None],
    *,
    max_new_tokens: int,
    floor: float | None = None,
) -> Fluency:
    """Summarise the answers of an arm.

    Args:
        rows: token ids of each answer.
        nats: their `cross_entropies`.
        floor: nats per token below which an answer is too predictable.
    """
    known = [value for value in nats if value is not None]
    n = max(len(rows), 1)
    too_low = None
    if floor is not None and known:
        too_low = sum(value < floor for value in known) / len(known)
    return Fluency(
        perplexity=math.exp(median(known)) if known else None,
        too_predictable=too_low,
        distinct_1=_mean([distinct(row, 1) for row in rows]),
        distinct_2=_mean([distinct(row, 2) for row in rows]),
        distinct_3=_mean([distinct(row, 3) for row in rows]),
        repetition=sum(repetition(row) for row in rows) / n,
        zlib_ratio=_mean([zlib_ratio(text) for text in texts]),
        truncated=sum(len(row) >= max_new_tokens for row in rows) / n,
        empty=sum(not text.strip() for text in texts) / n,
        tokens=sum(len(row) for row in rows) / n,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
