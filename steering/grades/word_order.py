"""Word order that no sentence has: a test by function words, for shuffled text and word salad.

Articles stand before what they belong to: one that is followed by another article, a preposition, a
conjunction or the end of a sentence marks text whose words are in no order. Likewise prepositions
before conjunctions or the end, and conjunctions before the end. The pairs below are those that good
sentences do not have, so that a single one counts; a few occur in titles or quoted words, so that
it is their share of all function words that is judged.
"""

import re
import unicodedata
from dataclasses import dataclass

import regex

from saesteer.steering.checks.language import FUNCTION_WORDS
from saesteer.steering.checks.words import WORD

MOST_BREAKS = 0.06
"""The largest share of a fluent answer's words that stand where they cannot."""


@dataclass(frozen=True)
class _Classes:
    """Function words of one language by what may follow them."""

    articles: frozenset[str]
    """Articles and possessives that are no pronouns."""
    doubtful: frozenset[str]
    """Articles that are pronouns as well, before verbs."""
    prepositions: frozenset[str]
    conjunctions: frozenset[str]
    finite: frozenset[str] = frozenset()
    """Forms of to be and to have, and subject pronouns: no article precedes them."""
    binding: frozenset[str] | None = None
    """Prepositions that no conjunction follows; None: all of them. The others are adverbs too."""
    after_doubtful: frozenset[str] = frozenset()
    """Prepositions that follow articles used as pronouns: "los de"."""
    final_prepositions: bool = False
    """Whether a sentence may end in a preposition (English, and German's prefixes)."""
    apart: frozenset[tuple[str, str]] = frozenset()
    """Pairs that the language contracts to one word, or never has."""


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _pairs(text: str) -> frozenset[tuple[str, str]]:
    found = [pair.split() for pair in text.split(",")]
    return frozenset((first, second) for first, second in found)


_LANGUAGES = {
    "en": _Classes(
        articles=_set("a an every its my our the their your"),
        doubtful=frozenset(),
        prepositions=_set(
            """among at beside between during for from into of onto toward towards upon with"""
        ),
        conjunctions=_set("although and because but if or whereas"),
        finite=_set(
            """am are as be been by could did do does had has have he i in is it on she should
            than that they this to was we were which who would"""
        ),
        binding=_set("among between during from into of toward towards upon"),
        final_prepositions=True,
        apart=_pairs(
            """and of, for of, he the, i the, of of, of to, she the, they the, to of, to to, we the,
            with of"""
        ),
    ),
    "fr": _Classes(
        articles=_set(
            """au aux cet cette chaque du ma mes mon nos notre quelques ses un une vos votre"""
        ),
        doubtful=_set("des l la le les leur"),
        prepositions=_set(
            """avec chez d dans de depuis dès entre par pendant pour sans sous sur vers à"""
        ),
        conjunctions=_set("car et mais ou qu que"),
        finite=_set(
            """a avaient avait elle elles est il ils je n ne nous on ont qui s se sont tu vous y
            étaient était"""
        ),
        apart=_pairs(
            """avec de, dans dans, dans de, dans à, de de, de est, de ont, de
            à, et et, n la, pour de, qu de, s de, s la, sur de, à de, à est"""
        ),
    ),
    "de": _Classes(
        articles=_set("eine einem einen eines mein meine meinen seine seinem seinen unser unsere"),
        doubtful=_set("das dem den der des die einer ihr ihre ihrem ihren"),
        prepositions=_set(
            """am an auf aus bei durch für gegen im in mit nach ohne seit um unter vom von während
            zu zum zur zwischen über"""
        ),
        conjunctions=_set("aber dass denn ob oder sondern und weil"),
        finite=_set(
            """er haben hat hatte hatten ich ist man nicht sind war waren wir wird wurde wurden"""
        ),
        binding=_set("für gegen im ohne vom von während zum zur zwischen"),
        final_prepositions=True,
        apart=_pairs(
            """am der, im das, im der, im die, im ein, im im, in in, vom der, zum der, zum die, zur
            der, zur die"""
        ),
    ),
    "es": _Classes(
        articles=_set("al cada mi mis nuestra nuestro nuestros su sus tu un una unas unos"),
        doubtful=_set("del el la las los"),
        prepositions=_set("a con de desde durante en entre hacia hasta para por sin sobre"),
        conjunctions=_set("e ni o pero porque si y"),
        after_doubtful=_set("de en con a"),
        finite=_set(
            """ella ellos era eran es está están fue ha había han le les me no nosotros se son
            yo él"""
        ),
        apart=_pairs("""a de, con de, de de, de y, en de, en en, se de, se un, y y"""),
    ),
    "it": _Classes(
        articles=_set("""al dal del il mia mio nel nostra nostro ogni sua sul suo un una uno"""),
        doubtful=_set("ai gli i lo alla dalla dei della delle l la le nei nella sulla"),
        prepositions=_set("a con da di durante fra in per senza su tra verso"),
        conjunctions=_set("che e ma né o perché se"),
        after_doubtful=_set("a da"),
        finite=_set("aveva era erano ha hanno io lei loro lui noi non si sono è"),
        apart=_pairs("a di, a il, con di, da il, di di, di il, di la, in il, in la, su il"),
    ),
}


def knows_order(lang: str) -> bool:
    """Whether there are rules for a language."""
    return lang in _LANGUAGES


def order_breaks(text: str, lang: str) -> tuple[int, int] | None:
    """(words that stand where they cannot, all words); None for a language without rules."""
    rules = _LANGUAGES.get(lang)
    if rules is None:
        return None
    breaks = total = 0
    if lang == "de" and not text.isupper():
        breaks += _articles_without_noun(text)
    if not text.isupper():
        breaks += _capitals_within(text, lang)
    for clause in _CLAUSE_END.split(unicodedata.normalize("NFC", text)):
        said = [match.group().casefold() for match in _WORD_OR_COMMA.finditer(clause)]
        total += len(said) - said.count(",")
        for place, word in enumerate(said):
            following, beyond = (*said[place + 1 : place + 3], None, None)[:2]
            if "," in (word, following):  # an insertion may follow any word
                continue
            if lang == "de" and place and said[place - 1] == "," and word in rules.doubtful:
                continue  # a relative pronoun
            breaks += word == following and word not in _TWICE
            breaks += _breaks(word, following, beyond, rules) or (
                following is not None and lang in _ELIDED and _not_elided(word, following, lang)
            )
    return breaks, total


_WORD_OR_COMMA = regex.compile(rf"{WORD.pattern}|,")
_CLAUSE_END = re.compile(r"(?:a\.m|p\.m)?[.!?…;:\n\"“”«»()\[\]{}–—]+")

_OR = _set("or ou oder o")
_THAT = _set("que qu che")
_TWICE = _set("had that nous vous die das der sie no very bye ha")
"""Words that may stand twice in a row."""

_POLITE = _set("i sie ihr ihre ihrem ihren ihrer su")
"""Function words that are capitalised within a sentence."""


def _capitals_within(text: str, lang: str) -> int:
    """Function words with a capital within a sentence, beside words without."""
    found = 0
    for clause in re.split(r"[^\w\s'’-]+", text):
        said = WORD.findall(clause)
        for before, word in zip(said, said[1:], strict=False):
            low = word.casefold()
            small = before.islower() and word.istitle()
            found += small and low in FUNCTION_WORDS.get(lang, ()) and low not in _POLITE
    return found


_ELIDED = {
    "fr": _set("le la de ne se me te que"),
    "it": _set("lo la il una della dello alla allo nella dalla"),
    "en": _set("a"),
}
"""Words that lose their vowel, or take an n, before a vowel."""


def _not_elided(word: str, following: str, lang: str) -> bool:
    """Whether a word stands whole before a vowel; h, y and numbers are exceptions of their own."""
    if lang == "en" and word == "an":
        return following[:1] in "bcdfgjkpqtvwyz"
    if word not in _ELIDED[lang] or len(following) < 2 and following not in ("a", "à"):
        return False
    if lang == "en":
        return following[:1] in "aeio" and not following.startswith(("one", "once", "eu"))
    vowel = unicodedata.normalize("NFD", following[:1])[:1] in "aeiou"
    return vowel and following not in ("onze", "onzième", "oui", "un", "une", "uno", "unique")


def _articles_without_noun(text: str) -> int:
    """German articles that no capitalised word follows within five words of their clause."""
    found = 0
    articles = _LANGUAGES["de"].articles | _set("im zum zur vom")
    for clause in _CLAUSE_END.split(text):
        said = [match.group() for match in WORD.finditer(clause)]
        for i, word in enumerate(said):
            after = said[i + 1 : i + 6]
            if word.casefold() in articles and not any(w[:1].isupper() for w in after):
                found += 1
    return found


LEAST_KEPT = 0.3
"""Of neighbouring words that both come from the source, the share that are neighbours there."""


def scrambled(source: str, answer: str) -> bool:
    """Whether an answer's words are the source's, but hardly any stand beside their neighbours.

    Judged where five or more pairs of neighbours, and half of all, consist of words of the source.
    """
    ours = [match.group().casefold() for match in WORD.finditer(source)]
    said = [match.group().casefold() for match in WORD.finditer(answer)]
    known, near = set(ours), set(zip(ours, ours[1:], strict=False))
    pairs = [pair for pair in zip(said, said[1:], strict=False) if known.issuperset(pair)]
    if len(pairs) < max(5, 0.5 * (len(said) - 1)):
        return False
    return sum(pair in near for pair in pairs) < LEAST_KEPT * len(pairs)


def _breaks(word: str, following: str | None, beyond: str | None, rules: _Classes) -> bool:
    """Whether nothing of the language stands like a word before the two that come after it."""
    if following is None:
        if word in rules.articles or (word in rules.conjunctions and len(word) < 4):
            return True
        return not rules.final_prepositions and word in rules.prepositions
    if (word, following) in rules.apart:
        return True
    # "one or two", "with or without"
    paired = following in _OR or beyond in rules.prepositions
    joins = following in rules.conjunctions and not paired and following not in _THAT
    if word in rules.articles:
        return (
            joins
            or following in rules.prepositions
            or following in rules.articles | rules.doubtful | rules.finite
        )
    if word in rules.doubtful:
        own = following in rules.prepositions and following not in rules.after_doubtful
        return joins or own or following in rules.articles
    if word in (rules.prepositions if rules.binding is None else rules.binding):
        return joins
    return word in rules.conjunctions and following == word
