"""Overlap of a reply's words with those of a reference: a figure of the report, not a grade."""

import math
import random
import re
import unicodedata
from collections.abc import Sequence

import regex

from saesteer.checkpoints.errors import UsageError
from saesteer.steering.checks.language import FUNCTION_WORDS
from saesteer.steering.checks.words import UNSPACED, WORD, sentences
from saesteer.steering.grades.numbers import ascii_digits


def content_words(text: str) -> frozenset[str]:
    """The words that carry the content: case-folded, stop words (en, fr, de, es) left out.

    Kept are words of four letters or more, words with a digit, and shorter names (capitalised,
    not first in their sentence). Thousands separators are dropped, so 3,000 equals 3000, and digits
    of other scripts are the same digits. A run of characters of a script without blanks between
    words gives its pairs of characters, vowel signs included.
    """
    text = ascii_digits(unicodedata.normalize("NFC", text))
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
