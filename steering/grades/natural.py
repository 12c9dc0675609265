"""How natural a text is to the unsteered model: its perplexity, and the order of its words."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.grades.log_probs import cross_entropies

SHUFFLES = 4
"""Random orders that a reply is compared with."""

LEAST_GAIN = 0.5
"""Nats a word that a reply has to be likelier than the mean of its shuffled orders."""

LEAST_GAIN_ELSEWHERE = -0.5
"""The same for replies in another language than the contents', whose order small models hardly
know: only what is clearly less likely than its words shuffled fails."""

FEWEST_WORDS = 5
"""Replies of fewer words have too few orders to tell."""

MARGIN = 2.0
"""Nats per token that a reply may lie outside the middle 98 % of the model's own answers: what
people write is that much more surprising to a small model than what it writes itself."""


@dataclass(frozen=True)
class Naturalness:
    """One reply under the unsteered model."""

    nats: float | None
    """Nats per token, without a prompt; None for a reply without tokens."""
    order_gain: float | None
    """Nats a word that it is likelier than its words in random orders; None for few words."""
    unlike: str = ""
    """Why it is unlike text of the language; empty where it is not."""


def own_range(nats: Sequence[float]) -> tuple[float, float] | None:
    """The range of the model's own answers: their middle 98 %, and `MARGIN` on each side.

    None for fewer than eight of them, which tell little about their range.
    """
    if len(nats) < 8:
        return None
    low, high = np.percentile(nats, [1, 99])
    return float(low) - MARGIN, float(high) + MARGIN


def naturalness(
    lm: LanguageModel,
    replies: Sequence[str],
    *,
    within: tuple[float, float] | None = None,
    shuffled: Sequence[bool] | None = None,
    least_gain: float = LEAST_GAIN,
) -> list[Naturalness]:
    """Judge replies: two numbers each, from one batch of passes.

    Args:
        within: nats per token of natural text; None judges no perplexity.
        shuffled: for each reply, whether to judge the order of its words (by default of all).
        least_gain: nats a word by which a reply has to be likelier than in random orders.
    """
    rows: list[list[int]] = []
    spans: list[tuple[int, int]] = []
    for number, reply in enumerate(replies):
        words = reply.split()
        texts = [reply]
        if len(words) >= FEWEST_WORDS and (shuffled is None or shuffled[number]):
            draw = random.Random(reply)  # the same orders whatever stands beside it
            for _ in range(SHUFFLES):
                texts.append(" ".join(draw.sample(words, len(words))))
        spans.append((len(rows), len(texts)))
        rows += [lm.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    nats = cross_entropies(lm, rows)
    found = []
    for (start, n), reply in zip(spans, replies, strict=True):
        own, gain = nats[start], None
        if own is not None and n > 1:
            totals = [
                (nats[i] or 0.0) * len(rows[i]) / len(reply.split())
                for i in range(start, start + n)
            ]
            gain = sum(totals[1:]) / (n - 1) - totals[0]
        found.append(Naturalness(own, gain, _unlike(own, gain, within, least_gain)))
    return found


def _unlike(
    nats: float | None, gain: float | None, within: tuple[float, float] | None, least_gain: float
) -> str:
    if nats is not None and within is not None and not within[0] <= nats <= within[1]:
        return (
            f"{nats:.2f} nats per token, out of the model's own {within[0]:.2f} to {within[1]:.2f}"
        )
    if gain is not None and gain < least_gain:
        return f"its words in another order are as likely ({gain:.2f} nats a word)"
    return ""
