"""Checks of the language a reply is written in."""

import functools
import re
from collections import Counter
from typing import Any

from saesteer.checkpoints.errors import UsageError, meant
from saesteer.steering.checks.registry import Verdict, check
from saesteer.steering.checks.words import CJK, letters, prose, words

LANGUAGES = tuple(
    "ar cs da de el en es fi fr he hi hu it ja ko la nl pl pt ro ru sv th tr uk vi zh".split()
)
"""Languages that the check distinguishes. The list is short because with all of py3langid's 140,
similar languages (Occitan, Aragonese, Luxembourgish, Nigerian Pidgin) take probability away from
short French, Spanish, German and English texts."""

_LANGUAGE_PROBABILITY = 0.5
_FOREIGN_WORD_SHARE = 0.25
_FEWEST_LETTERS = 20
_FEWEST_LETTERS_CJK = 10  # zh, ja, ko: one character says about as much as two letters

FUNCTION_WORDS: dict[str, frozenset[str]] = {
    "en": frozenset(
        """a about after all also an and any are as at be because been before being between but by
        can could d did didn do does don during for from had has have he her here hers
        him his how i if in into is it its just like ll m me more most my no not of on
        one only or other our out over re s she should so some such t than that the
        their them then there these they this those to too under until up ve very was we
        were what when where which while who whom whose why will with would you your""".split()
    ),
    "fr": frozenset(
        """a afin ai alors après as au aussi aux avant avec bien c car ce cela ces cet cette chaque
        chez comme contre d dans de depuis des donc dont du elle elles en encore entre
        est et eu fait il ils j je jusqu l la laquelle le lequel les leur leurs lors
        lorsque lui m mais me mes mon même n ne non nos notre nous on ont ou où par
        parce pas pendant peu peut plus pour pourquoi puis puisque qu quand que quel
        quelle qui quoi s sa sans se ses si son sont sous sur t ta te tous tout toute
        toutes trop très tu un une vers votre vous y à étaient était être""".split()
    ),
    "de": frozenset(
        """aber alle als also am an auch auf aus bei bevor bin bis da damit das dass dem den denn
        der des die dies diese dieser dieses doch dort du durch ein eine einem einen
        einer eines er es für gegen habe haben hat hatte hatten her hier hin ich ihr
        ihre ihrem ihren ihrer im in ist ja jede jeden jeder jedes kann kein keine mehr
        mein meine mit nach nicht noch nur ob obwohl oder ohne schon sehr sein seine
        seinem seinen seiner seit sich sie sind so um und uns unser unter vom von vor
        war waren warum was weil wenn werden wie will wir wird wo wurde wurden zu zum
        zur zwei zwischen über""".split()
    ),
    "es": frozenset(
        """a al antes aunque cada como con cuando de del desde donde dos durante e el ella ellas
        ellos en entre era eran es esa ese eso esta estas este esto estos está están fue
        fueron ha había habían han hasta hay he la las le les lo los me mi mientras mis
        muy más nada ni no nos nosotros nuestra nuestro o otra otro para pero poco por
        porque que quien qué se sea según ser si sin sobre son su sus sí también tan
        tenía tiene toda todas todo todos tras tu un una uno unos y ya yo""".split()
    ),
}
"""Common words per language, split at apostrophes ("n" and "t" of contractions). They are
the second criterion of the language check, and the stop words of `content_words`."""


@functools.cache
def language_identifier() -> Any:
    """py3langid's identifier, restricted to `LANGUAGES`, with normed probabilities."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(LANGUAGES)
    return identifier


def _function_words_agree(text: str, lang: str) -> bool | None:
    """Whether the common words in a text are those of `lang`; None when there are none.

    This finds half-translated text, which the identifier's letter statistics miss.
    """
    if lang not in FUNCTION_WORDS:
        return None
    own_list = FUNCTION_WORDS[lang]
    counts = Counter(re.findall(r"[^\W_]+", text.casefold()))
    own = sum(n for word, n in counts.items() if word in own_list)
    foreign = max(
        sum(n for word, n in counts.items() if word in theirs and word not in own_list)
        for other, theirs in FUNCTION_WORDS.items()
        if other != lang
    )
    if own + foreign == 0:
        return None
    # A single foreign word may be a name, a quotation, or a word missing in our list.
    return foreign < 2 or foreign <= _FOREIGN_WORD_SHARE * (own + foreign)


@check("language")
def check_language(output: str, source: str, *, lang: str) -> Verdict:
    """The reply, without code blocks and URLs, is written in `lang` (ISO 639-1).

    Two criteria must agree: py3langid restricted to `LANGUAGES` (probability at least .5), and,
    for en, fr, de and es, the common words (one, or at most a quarter of them, another language's).
    Undetermined under 20 letters (10 for zh, ja, ko).
    """
    if lang not in LANGUAGES:
        near = meant(lang, LANGUAGES)
        raise UsageError(f"unknown language {lang!r}{near}: a check knows {', '.join(LANGUAGES)}")
    if not output.strip():
        return Verdict.FAIL
    text = " ".join(prose(output).split())
    fewest = _FEWEST_LETTERS_CJK if lang in ("zh", "ja", "ko") else _FEWEST_LETTERS
    if letters(text) < fewest:
        return Verdict.UNDETERMINED
    best, probability = language_identifier().rank(text)[0]
    if best != lang or _function_words_agree(text, lang) is False:
        return Verdict.FAIL
    return Verdict.PASS if probability >= _LANGUAGE_PROBABILITY else Verdict.UNDETERMINED


def _width(text: str) -> float:
    """Length in Latin letters; a CJK character says about as much as 2.5 of them."""
    cjk = len(CJK.findall(text))
    return letters(text) - cjk + 2.5 * cjk


def _four_grams(text: str) -> set[str]:
    plain = " ".join(words(text))
    return {plain[i : i + 4] for i in range(len(plain) - 3)}


@check("translation")
def check_translation(output: str, source: str, *, lang: str) -> Verdict:
    """The reply is in `lang` and looks like a translation of the source, not like a copy.

    Of the shorter text's character 4-grams fewer than half occur in the other (so that a copy, or
    the source followed by its translation, fails), and the length ratio is .5 to 2. Whether the
    content is right is for `content_overlap` to say.
    """
    verdict = check_language(output, source, lang=lang)
    if verdict is Verdict.FAIL:
        return verdict
    ours, theirs = _four_grams(output), _four_grams(source)
    if ours and theirs and len(ours & theirs) >= 0.5 * min(len(ours), len(theirs)):
        return Verdict.FAIL
    if not 0.5 * _width(source) <= _width(output) <= 2.0 * _width(source):
        return Verdict.FAIL
    return verdict
