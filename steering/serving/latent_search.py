"""Latents by the tokens that they stand for: from the pages of `latents`, or by the logit lens."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.model.sae_places import steered
from saesteer.steering.ranking.lens import lens_ids

_LENS_TOKENS = 8
# At most this many logits exist at a time (64 MiB in float32).
_LOGITS = 2**24


@dataclass(frozen=True)
class LatentCard:
    """What is known of a latent."""

    id: int
    description: str
    """What someone or something says of it; empty where nothing does."""
    tokens: tuple[str, ...]
    """Those that it stands for, most telling first."""
    largest: float | None = None
    """Largest activation seen."""
    density: float | None = None
    """Share of tokens at which it is active."""


class LatentSearch:
    """Cards of latents, found by words in their tokens and descriptions."""

    def __init__(self, cards: Sequence[LatentCard], source: str) -> None:
        self.source = source
        """Where the cards are from, for people."""
        self._cards = {card.id: card for card in cards}
        self._words = {
            card.id: " ".join([card.description, *card.tokens]).casefold() for card in cards
        }

    def __len__(self) -> int:
        return len(self._cards)

    def find(self, text: str, limit: int) -> list[LatentCard]:
        """The cards in which every word of `text` occurs; a number is a latent's own.

        First those where a word is a whole token, earlier tokens before later ones, then the rest
        by number.
        """
        words = text.casefold().split()
        if not words:
            return list(self._cards.values())[:limit]
        if text.strip().isdecimal() and int(text) in self._cards:
            return [self._cards[int(text)]]
        found = [i for i, known in self._words.items() if all(word in known for word in words)]
        found.sort(key=lambda i: (self._place(i, words), i))
        return [self._cards[i] for i in found[:limit]]

    def cards(self, ids: Sequence[int]) -> list[LatentCard]:
        """The cards of latents by number; an empty one where nothing is known."""
        return [self._cards.get(i) or LatentCard(i, "", ()) for i in ids]

    def _place(self, latent: int, words: Sequence[str]) -> int:
        tokens = [token.strip().casefold() for token in self._cards[latent].tokens]
        places = [tokens.index(word) for word in words if word in tokens]
        return min(places, default=len(tokens) + 1)


def read_cards(folder: str | Path, d_sae: int) -> LatentSearch:
    """The cards of `latents.jsonl` in a folder: one JSON object a line, with `id` and, where known,
    `description` or `descriptions`, `telling`, `lens_up`, `top`, `max` and `density`.

    Raises UserError for a file that is missing, or has a line that is none of these.
    """
    file = Path(folder).expanduser()
    file = file / "latents.jsonl" if file.is_dir() else file
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"`latents` {folder}: {file.name} cannot be read ({error}): give the folder that "
            "`saesteer latents` wrote"
        ) from error
    cards = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                cards.append(_card(json.loads(line), d_sae))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"`latents` {folder}: line {number} of {file.name} is no latent of this SAE "
                    f"({type(error).__name__}: {error}): give the folder that was written for it"
                ) from error
    return LatentSearch(cards, file.name)


def _card(row: dict[str, Any], d_sae: int) -> LatentCard:
    latent = row["id"]
    if not isinstance(latent, int) or not 0 <= latent < d_sae:
        raise ValueError(f"id must be in 0..{d_sae - 1}, got {latent!r}")
    described = row.get("description") or ""
    for one in row.get("descriptions") or ():
        described = described or str(one["text"])
    tokens = [*_tokens(row.get("telling")), *_tokens(row.get("lens_up")), *_top_tokens(row)]
    return LatentCard(
        latent, str(described), tuple(dict.fromkeys(tokens)), row.get("max"), row.get("density")
    )


def _tokens(listed: Any) -> list[str]:
    """The tokens of a list of texts, or of objects with `token`."""
    words = [one.get("token") if isinstance(one, dict) else one for one in listed or ()]
    return [word for word in words if isinstance(word, str)]


def _top_tokens(row: dict[str, Any]) -> list[str]:
    """The strongest token of each of the latent's top contexts."""
    found = []
    for context in row.get("top") or ():
        if isinstance(context, dict) and isinstance(context.get("tokens"), list):
            at, tokens = context.get("index"), context["tokens"]
            if isinstance(at, int) and 0 <= at < len(tokens) and isinstance(tokens[at], str):
                found.append(tokens[at])
    return found


def lens_cards(
    lm: LanguageModel, sae: SAE, *, force: bool = False, progress: Progress = no_progress
) -> LatentSearch:
    """Cards by the logit lens: the tokens whose logits each decoder row raises most.

    It costs a product of all decoder rows with the unembedding.
    """
    _, view = steered(sae, lm, force=force)
    rows = max(1, _LOGITS // len(lm.tokenizer))
    cards: list[LatentCard] = []
    total = sae.spec.d_sae
    progress("logit lens", 0, total, "latents")
    for first in range(0, total, rows):
        directions = view.W_dec[first : first + rows].detach()
        for ids in lens_ids(lm, directions, _LENS_TOKENS):
            tokens = tuple(str(lm.tokenizer.decode([i])) for i in ids)
            cards.append(LatentCard(len(cards), "", tokens))
        progress("logit lens", len(cards), total, "latents")
    return LatentSearch(cards, "logit lens")
