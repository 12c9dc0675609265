"""The words that carry a content, by their lemmas, and how many of them an answer has."""

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from saesteer.steering.checks.language import FUNCTION_WORDS
from saesteer.steering.checks.words import WORD
from saesteer.steering.grades.dictionaries import Bilingual
from saesteer.steering.grades.real_words import frequency, names

_TOO_COMMON = 5.75
"""Words of this Zipf frequency say nothing of a content: "while", "because", "been"."""


def folded(word: str) -> str:
    """A word without case and accents."""
    parts = unicodedata.normalize("NFD", word.casefold())
    return "".join(c for c in parts if not unicodedata.combining(c))


@functools.lru_cache(100_000)
def lemma(word: str, lang: str) -> str:
    """The dictionary form of a word, case-folded; the word itself where none is known.

    By simplemma, which has lists for the languages of the checks; without it words are their own
    lemmas.
    """
    try:
        import simplemma
    except ImportError:
        return word.casefold()
    try:
        return str(simplemma.lemmatize(word, lang=lang)).casefold()
    except ValueError:  # a language that simplemma does not know
        return word.casefold()


def _tokens(text: str) -> list[str]:
    text = unicodedata.normalize("NFC", text)
    return [match.group() for match in WORD.finditer(text)]


def content_words_in_order(text: str, lang: str) -> list[str]:
    """The words of three letters or more that are neither common nor function words, and names.

    As they are written. Numbers in digits are no words here: `keeps_numbers` looks after them.
    """
    zipf, called = frequency(lang), names(text, lang)
    stop = FUNCTION_WORDS.get(lang, frozenset())
    kept = []
    for word in _tokens(text):
        low = word.casefold()
        if any(c.isdigit() for c in word):
            continue
        common = low in stop or len(low) < 3 or (zipf is not None and zipf(low) >= _TOO_COMMON)
        if low in called and low not in stop or not common:
            kept.append(word)
    return kept


@dataclass(frozen=True)
class Coverage:
    """How much of a content an answer holds."""

    share: float
    """Of the content words that could be looked for; 0 where there are none."""
    found: tuple[str, ...]
    """Content words that the answer holds, as the source writes them."""
    missing: tuple[str, ...]
    of_answer: float
    """Share of the answer's content words that come from the source; 1 between languages, where
    that cannot be told."""


def _forms(word: str, lang: str) -> frozenset[str]:
    """The ways in which a word may be met: as it is and by its lemma, without accents."""
    return frozenset({folded(word), folded(lemma(word, lang)), folded(lemma(word.lower(), lang))})


def _alike(one: str, other: str) -> bool:
    """Whether two forms are inflections of one stem: five letters, or more, in common in front."""
    shared = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        shared += 1
    return shared >= 5 and shared >= 0.7 * max(len(one), len(other))


def _within(part: str, whole: str) -> bool:
    """Whether a word begins or ends a compound."""
    return (
        len(part) >= 4 and len(whole) > len(part) and whole.startswith(part) | whole.endswith(part)
    )


class _Answer:
    """The words of an answer, with the forms of each."""

    def __init__(self, text: str, lang: str) -> None:
        self.lang = lang
        self.words = _tokens(text)
        self.forms = [_forms(word, lang) for word in self.words]
        self.first: dict[str, int] = {}
        for place, forms in enumerate(self.forms):
            for form in forms:
                self.first.setdefault(form, place)

    def place(self, forms: frozenset[str], *, exactly: bool = False) -> int | None:
        """Where one of the forms stands; None: nowhere.

        Unless `exactly` so, an inflection or a compound of it counts too.
        """
        for form in forms:
            if form in self.first:
                return self.first[form]
        if exactly:
            return None
        for form in forms:
            for other, place in self.first.items():
                if _alike(form, other) or (
                    self.lang in ("de", "nl", "sv", "da") and _within(form, other)
                ):
                    return place
        return None


def coverage(
    source: str, answer: str, lang: str, *, target: str | None = None, by: Bilingual | None = None
) -> Coverage:
    """The share of the source's content words that an answer holds.

    In one language a word counts as held by its lemma or its stem. In two (`target`), by one of its
    translations, or a word of the answer whose translation it is, or as it stands (names, words
    that both languages have). Words without an entry are not looked for, unless they are found.
    """
    wanted = content_words_in_order(source, lang)
    unique = list({folded(lemma(word, lang)): word for word in reversed(wanted)}.values())[::-1]
    said = _Answer(answer, target or lang)
    back = _backward(said, by) if by is not None and by.backward is not None else {}
    found, missing = [], []
    for word in unique:
        forms = _forms(word, lang)
        # Between languages only what is written the same is the same word: salad has English stems.
        place = said.place(forms, exactly=by is not None)
        known = by is None
        if by is not None:
            for meaning in _meanings(word, lang, by):
                known = True
                if place is None:
                    place = _phrase_place(meaning, said)
            if place is None:
                place = next((back[form] for form in forms if form in back), None)
        if place is not None:
            found.append(word)
        elif known:
            missing.append(word)
    total = len(found) + len(missing)
    return Coverage(
        len(found) / total if total else 0.0,
        tuple(found),
        tuple(missing),
        _from_source(source, answer, lang) if by is None else 1.0,
    )


def _from_source(source: str, answer: str, lang: str) -> float:
    """The share of an answer's content words that its source has."""
    held = _Answer(source, lang)
    said = {folded(lemma(word, lang)): word for word in content_words_in_order(answer, lang)}
    known = sum(held.place(_forms(word, lang)) is not None for word in said.values())
    return known / len(said) if said else 0.0


def _meanings(word: str, lang: str, by: Bilingual) -> list[tuple[str, ...]]:
    found = by.forward.translations(word) | by.forward.translations(lemma(word, lang))
    return sorted(found)


def _phrase_place(phrase: Sequence[str], said: _Answer) -> int | None:
    """Where a translation stands: its words that are no function words."""
    stop = FUNCTION_WORDS.get(said.lang, frozenset())
    parts = [part for word in phrase for part in _tokens(word)]
    parts = [part for part in parts if len(part) >= 2 and part not in stop]
    places = [said.place(_forms(part, said.lang)) for part in parts]
    known = [place for place in places if place is not None]
    return min(known) if known and len(known) == len(places) else None


def _backward(said: _Answer, by: Bilingual) -> dict[str, int]:
    """Words of the source's language that the answer's words translate to, with their places."""
    assert by.backward is not None
    stop = FUNCTION_WORDS.get(said.lang, frozenset())
    found: dict[str, int] = {}
    for place, word in enumerate(said.words):
        if len(word) < 3 or word.casefold() in stop:
            continue
        meanings = by.backward.translations(word) | by.backward.translations(lemma(word, said.lang))
        for phrase in meanings:
            parts = [part for part in phrase if part not in FUNCTION_WORDS.get(by.source, ())]
            if len(parts) == 1:
                for form in _forms(parts[0], by.source):
                    found.setdefault(form, place)
    return found


def same_order(source: str, answer: str) -> float:
    """The share of the source's words that an answer repeats in runs of their order, in 0..1.

    Matching blocks of two words or more (Ratcliff and Obershelp), over the source's words.
    """
    ours = [folded(word) for word in _tokens(source)]
    theirs = [folded(word) for word in _tokens(answer)]
    matcher = SequenceMatcher(None, ours, theirs, autojunk=False)
    kept = sum(block.size for block in matcher.get_matching_blocks() if block.size >= 2)
    return kept / len(ours) if ours else 0.0
