"""Token ids as pieces of text, one each, that read as the text when joined."""

from collections.abc import Sequence
from typing import Any

_BROKEN = "�"
_SIGNS = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍"})
_LONGEST = 4
"""Bytes of a character in UTF-8, and so the most tokens that can share one."""


def visible(token: str) -> str:
    """A token with line breaks, tabs and carriage returns as signs."""
    return token if token.isprintable() else token.translate(_SIGNS)


class Pieces:
    """Cuts runs of token ids into pieces of text; each token is decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def one(self, token: int) -> str:
        """The text of one token; of a part of a character the tokenizer's own name for it."""
        text = self._decoded(token)
        if _BROKEN not in text:
            return text
        return str(self._tokenizer.convert_ids_to_tokens(token))

    def of(self, ids: Sequence[int]) -> list[str]:
        """A piece for each token. A character that several tokens share is the piece of the last of
        them, the others' are empty; what is no whole character is shown as U+FFFD."""
        pieces = [self._decoded(token) for token in ids]
        first = 0
        while first < len(ids):
            if _BROKEN in pieces[first]:
                for last in range(first + 2, min(first + _LONGEST, len(ids)) + 1):
                    text = self._tokenizer.decode(list(ids[first:last]))
                    if _BROKEN not in text:
                        pieces[first:last] = [*[""] * (last - first - 1), text]
                        first = last - 1
                        break
            first += 1
        return pieces

    def _decoded(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = str(self._tokenizer.decode([token]))
        return self._known[token]
