"""Which words of a text exist, by the frequency lists of `wordfreq`.

wordfreq (Speer 2022, doi 10.5281/zenodo.7199437) counts words in books, subtitles, news,
encyclopedias and the web. Its scale is Zipf's: log10 of the occurrences in 1,000 million words.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from saesteer.steering.checks.language import FUNCTION_WORDS
from saesteer.steering.checks.words import WORD, sentences

REAL_WORD = 1.9
"""A word of this Zipf frequency or more exists: about once in twelve million words. Below it the
lists hold misspellings and words of other languages as well."""

FOREIGN = 1.3
"""A rare word that is this much more frequent in the prompt's language is a word of that one."""

MOST_FOREIGN_RUN = 2
"""The longest run of words that do not exist in the language: three are a phrase of another one."""

LEAST_SHARE = 0.90
"""The share of real words that a fluent answer has at least."""

INSTALL = "pip install wordfreq"


@functools.lru_cache
def frequency(lang: str) -> Callable[[str], float] | None:
    """Zipf frequencies of the words of a language (ISO 639-1); None without a list of it.

    Chinese, Japanese, Korean and other scripts without blanks between words have none here, because
    finding their words takes more than a list.
    """
    try:
        import wordfreq
    except ImportError:
        return None
    if lang in ("zh", "ja", "ko", "th") or lang not in wordfreq.available_languages("small"):
        return None
    counts = wordfreq.get_frequency_dict(lang, wordlist="best")

    def zipf(word: str) -> float:
        return float(wordfreq.freq_to_zipf(counts[word])) if word in counts else 0.0

    return zipf


def reason_without(lang: str) -> str:
    """Why there is no list of a language, and what to do."""
    try:
        import wordfreq  # noqa: F401
    except ImportError:
        return f"not graded: the frequency lists are missing; {INSTALL}"
    return f"not graded: wordfreq has no list of words for the language {lang!r}"


@dataclass(frozen=True)
class RealWords:
    """How many words of a text exist."""

    share: float
    """Of the words looked up; 0 where the text has none."""
    counted: int
    """Words looked up: without names of the source, numbers and single letters."""
    unknown: tuple[str, ...]
    """The words that do not exist in the language, in their order."""
    longest_run: int = 0
    """The most of them in a row."""


def _spoken(text: str) -> Iterator[tuple[str, bool]]:
    """The words of a text, and whether each begins its sentence."""
    for sentence in sentences(text):
        for index, match in enumerate(WORD.finditer(sentence)):
            yield match.group(), index == 0


def names(text: str, lang: str) -> frozenset[str]:
    """The names in a text, case-folded: capitalised words within a sentence, and rare first ones.

    In German every noun is capitalised, so only words that the list does not know count there.
    """
    zipf = frequency(lang)
    found = set()
    for word, first in _spoken(text):
        if not word[:1].isupper() or len(word) < 2:
            continue
        rare = zipf is None or zipf(word.casefold()) < (REAL_WORD if lang == "de" else 3.6)
        if rare or (not first and lang != "de"):
            found.add(word.casefold())
    return frozenset(found)


def real_words(
    text: str, lang: str, *, other: str | None = None, aside: Iterable[str] = ()
) -> RealWords | None:
    """Count the words of `text` that exist in `lang`; None without a frequency list of it.

    Args:
        other: the prompt's language, whose words do not count where the answer is in another.
        aside: case-folded words that are not looked up: names of the source.
    """
    zipf = frequency(lang)
    if zipf is None:
        return None
    theirs = frequency(other) if other is not None and other != lang else None
    skipped = frozenset(aside)
    own, prompts = FUNCTION_WORDS.get(lang, frozenset()), FUNCTION_WORDS.get(other or "", ())
    unknown, counted, run, longest = [], 0, 0, 0
    for match in WORD.finditer(text):
        word = match.group().casefold()
        if word in skipped or len(word) < 2 or any(c.isdigit() for c in word):
            continue
        counted += 1
        ours = zipf(word)
        known = ours >= REAL_WORD or (lang == "de" and _compound(word, zipf))
        if known and theirs is not None and word not in own:
            rare = ours < 4.0 and theirs(word) - ours > FOREIGN
            known = not rare and word not in prompts
        run = 0 if known else run + 1
        longest = max(longest, run)
        if not known:
            unknown.append(word)
    share = 1 - len(unknown) / counted if counted else 0.0
    return RealWords(share, counted, tuple(unknown), longest)


_LINKS = re.compile(r"(?:es|en|er|s|n|e)$")


def _compound(word: str, zipf: Callable[[str], float]) -> bool:
    """Whether a German word is two common words of four letters or more, joined or linked."""
    for cut in range(4, len(word) - 3):
        head, tail = word[:cut], word[cut:]
        # The genitive's s is no part of the word.
        if max(zipf(tail), zipf(tail.removesuffix("s"))) >= 3.0 and (
            zipf(head) >= 3.0 or zipf(_LINKS.sub("", head)) >= 3.0
        ):
            return True
    return False
