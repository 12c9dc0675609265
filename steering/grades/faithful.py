"""Is a reply faithful: is the content there."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from saesteer.steering.grades.content import content_words_in_order, coverage, same_order
from saesteer.steering.grades.dictionaries import bilingual, how_to_install
from saesteer.steering.grades.numbers import keeps_numbers, numbers
from saesteer.steering.grades.spoken import spoken

FLOORS: Mapping[str, float] = MappingProxyType(
    {"translation": 0.50, "copy": 0.75, "rewriting": 0.50, "short": 0.30, "about": 0.25}
)
"""The least share of the source's content words in a faithful reply, by what its task asks for.

Fixed on development contents: each is above what 99 % of replies to other contents reach (`docs/
grades.md`), and as far below good replies as that allows.
"""

FEWEST_FOUND = 2
"""Content words that a faithful reply shares with its source at least: one is chance."""

LEAST_FROM_SOURCE = 0.50
"""In a copy or a rewriting, the share of the reply's content words that come from the source: the
rest is about something else, such as the instruction."""

LEAST_ORDER = 0.60
"""In a copy, the share of the source's words that stand beside their neighbours."""

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "translation": "translation",
        "json": "rewriting",
        "python": "copy",
        "uppercase": "copy",
        "lowercase": "copy",
        "quotes": "copy",
        "bullets": "rewriting",
        "keyword": "rewriting",
        "question": "short",
        "summary": "about",
        "length": "short",
    }
)
"""What the task of a check asks for; of those not named, a reply about the source."""

UNSPACED_LANGUAGES = ("zh", "ja", "ko", "th")


@dataclass(frozen=True)
class Faithful:
    """Whether the content is there, and how much of it."""

    passes: bool | None
    """None where a dictionary is missing, or the content has no words to look for."""
    reason: str
    """Why it fails, or is not graded; empty where it passes."""
    coverage: float | None = None
    """Share of the source's content words that the reply holds, in lemmas."""
    floor: float | None = None
    """The share it has to have."""
    found: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def kind_of(check_name: str | None) -> str:
    """What a task asks for, by the name of its check: a key of `FLOORS`."""
    return KINDS.get(check_name or "", "about")


def faithful(
    reply: str,
    source: str,
    *,
    check_name: str | None,
    lang: str,
    source_lang: str,
    dictionaries: str | Path | None = None,
) -> Faithful:
    """Judge one reply.

    The source's content words are looked for by their lemmas: in a reply of its language as they
    are, in one of another language through a bilingual dictionary and as they stand (names). The
    share found must reach the floor of the kind of task, and two at least must be found where the
    source has them. Half of the content words of a copy or a rewriting must be the source's, too. A
    translation and a copy keep the numbers written in digits; a copy also the
    order of the words. JSON is judged by its values; a program has to parse, and is judged by its
    strings, numbers and comments; a reply that is neither, where one was asked for, fails.
    """
    kind = kind_of(check_name)
    floor = FLOORS[kind]
    said = spoken(check_name, reply)
    if said is None:
        return Faithful(False, f"no {'program' if check_name == 'python' else 'JSON'}", 0.0, floor)
    for one in (source_lang, lang):
        if one in UNSPACED_LANGUAGES:
            return Faithful(None, f"not graded: the words of the language {one!r} cannot be told")
    by = None
    if lang != source_lang:
        by = bilingual(source_lang, lang, dictionaries)
        if by is None:
            return Faithful(None, f"not graded: {how_to_install(source_lang, lang)}")
    held = coverage(source, said, source_lang, target=lang, by=by)
    looked_for = len(held.found) + len(held.missing)
    if not looked_for and not numbers(source):
        return Faithful(None, "not graded: the content has no words that could be looked for")
    result = (held.share, floor, held.found, held.missing)
    if looked_for:
        if held.share < floor:
            return Faithful(False, f"{held.share:.0%} of the content is there", *result)
        if len(held.found) < min(FEWEST_FOUND, len(content_words_in_order(source, source_lang))):
            return Faithful(False, "one word of the content is there", *result)
    if kind in ("copy", "rewriting") and held.of_answer < LEAST_FROM_SOURCE:
        return Faithful(False, f"{held.of_answer:.0%} of it is the content", *result)
    if kind in ("translation", "copy") and not keeps_numbers(said, source):
        return Faithful(False, "a number is not there", *result)
    if kind == "copy" and same_order(source, said) < LEAST_ORDER:
        return Faithful(False, "the content's words are in another order", *result)
    return Faithful(True, "", *result)
