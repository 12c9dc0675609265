"""Text from tokens that come one by one: whole characters only, cut at stop strings."""

from collections.abc import Sequence
from typing import Any

_CONTEXT = 8
"""Tokens that are decoded again in front of a new one: what it reads as may depend on them."""


class TextStream:
    """The text of one answer, piece by piece.

    The pieces, joined, are the text: what is not certain yet (bytes of a character that is not
    complete, the beginning of a stop string) is held back.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._start = self._read = 0
        self._held = ""
        self.stopped = False
        """Whether a stop string has come; the text ends before it."""

    def add(self, token: int) -> tuple[str, str]:
        """Take a token; returns the text that is certain by now, and what this token reads as.

        The second is the token's own part of the text, held back or not; empty where the token is a
        part of a character.
        """
        self._ids.append(token)
        before = self._decode(self._start, self._read)
        whole = self._decode(self._start, len(self._ids))
        if whole.endswith("\ufffd"):
            return "", ""
        piece = whole[len(before) :]
        self._start, self._read = max(0, len(self._ids) - _CONTEXT), len(self._ids)
        return self._pass(piece), piece

    def finish(self) -> str:
        """The rest of the text, when no token follows."""
        rest = ""
        if self._read < len(self._ids):
            before = self._decode(self._start, self._read)
            rest = self._decode(self._start, len(self._ids))[len(before) :]
        said = self._pass(rest)
        if not self.stopped:
            said, self._held = said + self._held, ""
        return said

    def _decode(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True))

    def _pass(self, piece: str) -> str:
        """What of the held text and a new piece can be said."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
