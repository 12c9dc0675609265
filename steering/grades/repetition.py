"""Replies that go round in a loop."""

from collections import defaultdict
from collections.abc import Hashable, Sequence

DEGENERATE_SHARE = 0.20
"""A reply is degenerate when its most repeated 4-gram covers more than this share of its tokens."""


def repetition(tokens: Sequence[Hashable]) -> float:
    """Share of the tokens covered by the most repeated 4-gram; 0 if no 4-gram occurs twice.

    "Most repeated" is the repeated 4-gram that covers the most tokens; occurrences may overlap, and
    a token is counted once. Give it a reply's token ids (without padding), or its words.
    """
    repeated = [where for where in _places(tokens).values() if len(where) > 1]
    covered = max(map(_covered, repeated), default=0)
    return covered / len(tokens) if covered else 0.0


def is_degenerate(token_ids: Sequence[Hashable]) -> bool:
    """Whether a reply goes round in a loop: one 4-gram covers more than 20 % of its tokens, and
    what follows it repeats too.

    Lists, records and calls of one function repeat their form and go on differently each time;
    that is no loop, unless one 4-gram comes eight times and covers half of the reply.
    """
    for where in _places(token_ids).values():
        share = _covered(where) / len(token_ids)
        if len(where) < 2 or share <= DEGENERATE_SHARE:
            continue
        if _recurrences(token_ids, where) >= 0.5 or (len(where) >= 8 and share > 0.5):
            return True
    return False


def _recurrences(tokens: Sequence[Hashable], where: Sequence[int]) -> float:
    """The share of a 4-gram's later occurrences whose stretch, up to the next one, was there."""
    ends = [*where[1:], len(tokens)]
    stretches = [tuple(tokens[a:b]) for a, b in zip(where, ends, strict=True)]
    seen, again = {stretches[0]}, 0
    for stretch in stretches[1:-1]:
        again += stretch in seen
        seen.add(stretch)
    # Nothing says where the last one ends: it may be cut short, or the reply goes on.
    last = stretches[-1]
    again += any(last[: len(other)] == other[: len(last)] for other in seen)
    return again / (len(stretches) - 1)


def _places(tokens: Sequence[Hashable]) -> dict[tuple[Hashable, ...], list[int]]:
    """Where each 4-gram begins."""
    starts: defaultdict[tuple[Hashable, ...], list[int]] = defaultdict(list)
    for index in range(len(tokens) - 3):
        starts[tuple(tokens[index : index + 4])].append(index)
    return starts


def _covered(where: Sequence[int]) -> int:
    """Tokens in any of the 4-grams that begin at these places."""
    return 4 + sum(min(4, b - a) for a, b in zip(where, where[1:], strict=False))
