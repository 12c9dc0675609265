"""Fluency of answers: repetition, variety, and perplexity under the unsteered model."""

import math
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from saesteer.steering.grades.repetition import repetition


def distinct(tokens: Sequence[Hashable], n: int) -> float | None:
    """Number of distinct n-grams over number of n-grams; None for fewer than n tokens."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def zlib_ratio(text: str) -> float | None:
    """Compressed over raw bytes: small for repetitive text; None for no text."""
    raw = text.encode("utf-8", "surrogatepass")
    return len(zlib.compress(raw, 9)) / len(raw) if raw else None


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
    thoughts: Sequence[int] = (),
) -> Fluency:
    """Summarise the answers of an arm.

    Args:
        rows: token ids of each answer.
        nats: their `log_probs.cross_entropies`.
        floor: nats per token below which an answer is too predictable.
        thoughts: tokens of thoughts before each answer, which `rows` leaves out and which count
            towards `max_new_tokens`.
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
        truncated=sum(
            len(row) + before >= max_new_tokens
            for row, before in zip(rows, thoughts or [0] * len(rows), strict=True)
        )
        / n,
        empty=sum(not text.strip() for text in texts) / n,
        tokens=sum(len(row) for row in rows) / n,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
