"""Grades of replies: from the check's verdict, degeneration, and overlap with the content."""

import math
import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Sequence
from enum import Enum
from typing import Literal

import regex

from saesteer.checkpoints.errors import UsageError
from saesteer.steering.checks.language import FUNCTION_WORDS
from saesteer.steering.checks.registry import Verdict
from saesteer.steering.checks.words import UNSPACED, WORD, sentences


class Grade(Enum):
    """A: follows the instruction, on topic. B: follows it otherwise. C: does not follow it."""

    A = "A"
    B = "B"
    C = "C"


DEGENERATE_SHARE = 0.20
"""A reply is degenerate when its most repeated 4-gram covers more than this share of its tokens."""


def content_reference(check_name: str | None) -> Literal["source", "prompted"]:
    """What a reply's content is compared with: the source, or the prompted model's own answer.

    A reply in another language shares few words with its source, so there the prompted answer
    stands in for a reference translation.
    """
    return "prompted" if check_name in ("language", "translation") else "source"


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


def content_words(text: str) -> frozenset[str]:
    """The words that carry the content: case-folded, stop words (en, fr, de, es) left out.

    Kept are words of four letters or more, words with a digit, and shorter names (capitalised,
    not first in their sentence). Thousands separators are dropped, so 3,000 equals 3000, and digits
    of other scripts are the same digits. A run of characters of a script without blanks between
    words gives its pairs of characters, vowel signs included.
    """
    text = _ascii_digits(unicodedata.normalize("NFC", text))
    text = re.sub(r"(?<=\d)[,.'’\u00a0\u2009\u202f](?=\d{3}(?!\d))", "", text)
    kept: set[str] = set()
    for sentence in sentences(text):
        for index, match in enumerate(WORD.finditer(sentence)):
            word = match.group()
            folded = word.casefold()
            if UNSPACED.search(word):
                signs = regex.findall(r"\X", word)
                kept.update("".join(signs[i : i + 2]) for i in range(max(1, len(signs) - 1)))
            elif any(character.isdigit() for character in word):
                kept.add(folded)
            elif any(folded in stop for stop in FUNCTION_WORDS.values()):
                continue
            elif len(word) >= 4 or (index > 0 and len(word) > 1 and word.istitle()):
                kept.add(folded)
    return frozenset(kept)


def _f1(ours: frozenset[str], theirs: frozenset[str]) -> float:
    return 2 * len(ours & theirs) / (len(ours) + len(theirs)) if ours and theirs else 0.0


def content_overlap(output: str, reference: str) -> float:
    """F1 of the content words of a reply and a reference, in 0..1 (see `content_words`)."""
    return _f1(content_words(output), content_words(reference))


def mismatch_floor(
    outputs: Sequence[str],
    references: Sequence[str],
    *,
    percentile: float = 95.0,
    max_pairs: int = 4000,
) -> float:
    """The overlap that replies reach with references of *other* items: what chance explains.

    Nearest-rank percentile of `content_overlap(outputs[i], references[j])` over the pairs i != j
    whose references differ; above `max_pairs` pairs, a fixed random sample. With no such pair
    nothing can be told from chance, and the floor is 1.0, which no reply exceeds.
    """
    if len(outputs) != len(references):
        raise UsageError(f"{len(outputs)} outputs but {len(references)} references; pair them up")
    n = len(outputs)
    ours = [content_words(text) for text in outputs]
    theirs = [content_words(text) for text in references]
    total = n * (n - 1)
    picked = (
        range(total) if total <= max_pairs else random.Random(0).sample(range(total), max_pairs)
    )
    overlaps = []
    for pair in picked:
        i, j = divmod(pair, n - 1)
        j += j >= i  # skip the diagonal
        if references[i] != references[j]:
            overlaps.append(_f1(ours[i], theirs[j]))
    if not overlaps:
        return 1.0
    overlaps.sort()
    return overlaps[max(0, math.ceil(percentile / 100 * len(overlaps)) - 1)]


# 12h30, and 3 000 with a blank that keeps the number on one line, are one number each.
_NUMBER = re.compile(r"\d+(?:(?:[.,:'’٫٬]|[\u00a0\u2009\u202f](?=\d{3}(?!\d))|\s?h\s?)\d+)*")
_GROUPED = re.compile(r"(?<![\d.,:])\d{1,3}(?:\s\d{3})+(?!\d)")
_TIME = re.compile(r"\d{1,2}:\d{2}")


def _ascii_digits(text: str) -> str:
    """The same text with 0 to 9 for the digits of every script."""
    return "".join(
        str(unicodedata.digit(c)) if c.isdecimal() and not c.isascii() else c for c in text
    )


def _digits(number: str) -> str:
    return re.sub(r"\D", "", number).lstrip("0") or "0"


def numbers(text: str) -> frozenset[str]:
    """The numbers written in digits, as digits alone: 3,000 and 3.000 are both 3000."""
    return frozenset(_digits(found) for found in _NUMBER.findall(_ascii_digits(text)))


def keeps_numbers(output: str, source: str) -> bool:
    """Whether every number in the source that has digits stands in the reply too.

    However its thousands are parted, in the digits of any script, and a time in any way of parting
    hours from minutes.
    """
    said = _ascii_digits(output)
    ours = numbers(said) | {_digits(found) for found in _GROUPED.findall(said)}
    for number in _NUMBER.findall(_ascii_digits(source)):
        parts = {_digits(part) for part in number.split(":")}
        if _digits(number) not in ours and not (_TIME.fullmatch(number) and parts <= ours):
            return False
    return True


def loose_variants(output: str) -> list[str]:
    """The reply in IFEval's eight readings: {as it is, without `*`} times {whole, without its
    first line, its last, both}. Zhou et al., arXiv 2311.07911, section 2.2.
    """
    lines = output.split("\n")
    cuts = (
        output,
        "\n".join(lines[1:]).strip(),
        "\n".join(lines[:-1]).strip(),
        "\n".join(lines[1:-1]).strip(),
    )
    return [*cuts, *(cut.replace("*", "") for cut in cuts)]


def grade(
    verdict: Verdict,
    degenerate: bool,
    overlap: float,
    floor: float,
    *,
    loosely: bool = False,
    content_kept: bool = True,
) -> Grade:
    """A, B or C of one reply.

    C: the reply is degenerate, or the check passes on none of its eight readings. A: the check
    passes on the reply as it is, its overlap with the reference exceeds the floor, and
    `content_kept` holds. B: everything else.

    Args:
        loosely: the check passes on one of `loose_variants`.
        content_kept: further conditions on the content, such as `keeps_numbers` in translations.
    """
    passes = verdict is Verdict.PASS
    if degenerate or not (passes or loosely):
        return Grade.C
    return Grade.A if passes and overlap > floor and content_kept else Grade.B
