"""Is a reply fluent: words that exist, in an order that sentences have, without loops."""

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from saesteer.steering.checks.language import LANGUAGES, language_identifier
from saesteer.steering.checks.words import letters
from saesteer.steering.grades.natural import Naturalness
from saesteer.steering.grades.real_words import (
    LEAST_SHARE,
    MOST_FOREIGN_RUN,
    names,
    real_words,
    reason_without,
)
from saesteer.steering.grades.repetition import is_degenerate
from saesteer.steering.grades.spoken import spoken
from saesteer.steering.grades.word_order import MOST_BREAKS, order_breaks, scrambled


@dataclass(frozen=True)
class Fluent:
    """Whether a reply is fluent, and by what it was judged."""

    passes: bool | None
    """None where a resource is missing: `reason` says which."""
    reason: str
    """Why it fails, or is not graded; empty where it passes."""
    degenerate: bool
    real_words: float | None = None
    """Share of the words that exist in the language; None where there are none, or no list."""
    unknown: tuple[str, ...] = ()
    """The first words that do not exist."""
    nats: float | None = None
    """Nats per token under the unsteered model, without a prompt; None without a model."""
    order_gain: float | None = None
    """By how many nats a word the reply is likelier than its words shuffled; None without one."""


@functools.lru_cache(4096)
def content_language(text: str) -> str:
    """The language (ISO 639-1) of a content, as py3langid has it; English for a few letters."""
    if letters(text) < 10:
        return "en"
    found = str(language_identifier().rank(text)[0][0])
    return found if found in LANGUAGES else "en"


def fluent(
    reply: str,
    source: str,
    *,
    check_name: str | None,
    lang: str,
    source_lang: str,
    tokens: Sequence[Hashable] | None = None,
) -> Fluent:
    """Judge one reply by its words.

    It fails where it is empty or degenerate (one 4-gram covers more than a fifth of its tokens);
    under 90 % of its words exist in `lang`, names of the source, numbers and single letters aside,
    or three in a row do not, as where it opens in another language; its function words stand where
    none can, or it has the source's words without their neighbours. `with_naturalness` adds what a
    model says.

    Args:
        lang: the language that the reply should be in.
        source_lang: that of the source.
        tokens: the reply's token ids; by default its words.
    """
    loops = is_degenerate(tokens if tokens is not None else reply.split())
    said = spoken(check_name, reply)
    fails = functools.partial(Fluent, False, degenerate=loops)
    if not reply.strip():
        return fails("empty")
    if loops:
        return fails("a loop")
    if said is None:
        said = reply
    found = real_words(
        said,
        lang,
        other=source_lang,
        aside=names(source, source_lang),
    )
    if found is None:
        return Fluent(None, reason_without(lang), loops)
    share = found.share if found.counted else None
    facts = functools.partial(
        Fluent,
        degenerate=loops,
        real_words=share,
        unknown=found.unknown[:10],
    )
    if share is not None and share < LEAST_SHARE:
        return facts(False, f"{share:.0%} of its words exist")
    if found.longest_run > MOST_FOREIGN_RUN:
        return facts(False, f"{found.longest_run} words in a row are of no such language")
    breaks = order_breaks(said, lang)
    if breaks is not None and breaks[0] > MOST_BREAKS * breaks[1]:
        return facts(False, f"{breaks[0]} function words stand where none can")
    if lang == source_lang and scrambled(source, said):
        return facts(False, "the source's words in another order")
    return facts(True, "")


def with_naturalness(found: Fluent, natural: Naturalness) -> Fluent:
    """The judgement with what the unsteered model says added: it can only fail a reply."""
    passes = False if natural.unlike else found.passes
    return replace(
        found,
        passes=passes,
        reason=natural.unlike or found.reason,
        nats=natural.nats,
        order_gain=natural.order_gain,
    )
