"""Checks of the content of a reply: questions, keywords, summaries, phrases."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from saesteer.checkpoints.errors import UsageError
from saesteer.steering.checks.registry import Verdict, check, need_whole
from saesteer.steering.checks.words import (
    cuts_word,
    folded,
    occurrences,
    sentences,
    words,
)

_QUESTION_WORDS = frozenset("who whom whose what which when where why how".split())
_AUXILIARIES = frozenset(
    """am is are was were do does did have has had can could will would shall should may might must
    isn't aren't wasn't weren't don't doesn't didn't haven't hasn't hadn't can't couldn't won't
    wouldn't shouldn't mustn't""".split()
)


def _asks(sentence: str) -> bool:
    """Whether a clause begins with an auxiliary, or has a question word among its first three."""
    for clause in re.split(r"[,;:]\s|\s[-–—]+\s", sentence):
        start = words(clause)[:3]
        start = [re.sub(r"'(?:s|re|d|ll|ve)$", "", word) for word in start]  # "what's" asks too
        if start and (start[0] in _AUXILIARIES or not _QUESTION_WORDS.isdisjoint(start)):
            return True
    return False


@check("question")
def check_question(output: str, source: str) -> Verdict:
    """The reply ends with an English question that is not the source with another final mark."""
    text = output.strip()
    if not text:
        return Verdict.FAIL
    if words(text) == words(source):
        return Verdict.FAIL
    bare = text.rstrip("\"'”’»)]*_ ")
    last = sentences(bare)[-1:] or [bare]
    if bare.endswith(("?", "？")):
        return Verdict.PASS if _asks(last[0]) else Verdict.FAIL
    cut_off = bare[-1:].isalnum() or bare.endswith((",", ";"))
    return Verdict.UNDETERMINED if cut_off and _asks(last[0]) else Verdict.FAIL


@check("keyword")
def check_keyword(
    output: str,
    source: str,
    *,
    keyword: str,
    inflections: Sequence[str] = (),
    ignore_case: bool = True,
    at_least: int = 1,
) -> Verdict:
    """The keyword, or one of the given inflections, occurs as whole words `at_least` times.

    Undetermined when the source holds it that often already: a copy would pass.
    """
    forms = [keyword, *inflections]
    if not all(isinstance(form, str) and form.strip() for form in forms):
        raise UsageError(f"keyword and inflections must be non-empty texts, got {forms!r}")
    need_whole("at_least", at_least, 1)
    if occurrences(output, forms, ignore_case=ignore_case) < at_least:
        return Verdict.FAIL
    copied = occurrences(source, forms, ignore_case=ignore_case) >= at_least
    return Verdict.UNDETERMINED if copied else Verdict.PASS


@check("summary")
def check_summary(
    output: str, source: str, *, shortest: float = 0.05, longest: float = 0.5
) -> Verdict:
    """One sentence, `shortest` to `longest` times the source's length, not copied out of it.

    A copy: a run of words of the source makes up 80 % of the reply. Undetermined when the sentence
    has no end, as in a reply cut off, or the source is a single sentence.
    """
    if not 0 <= shortest < longest <= 1:
        raise UsageError(f"shortest {shortest!r} must be below longest {longest!r}, both in 0..1")
    text = output.strip()
    ours, theirs = words(text), words(source)
    if not ours:
        return Verdict.FAIL
    if len(sentences(text)) != 1 or len(text) > longest * len(source):
        return Verdict.FAIL
    matcher = SequenceMatcher(None, theirs, ours, autojunk=False)
    run = matcher.find_longest_match(0, len(theirs), 0, len(ours)).size
    if run >= 0.8 * len(ours):
        return Verdict.FAIL
    if not text.rstrip("\"'”’»)]*_ ").endswith((".", "!", "?", "…", "。", "！", "？")):
        return Verdict.UNDETERMINED
    if len(text) < shortest * len(source):
        return Verdict.FAIL
    return Verdict.PASS if len(sentences(source)) > 1 else Verdict.UNDETERMINED


@check("forbidden")
def check_forbidden(output: str, source: str, *, keywords: Sequence[str]) -> Verdict:
    """None of the keywords occurs as whole words, ignoring case, in a reply that is not a copy.

    A copy of the source fails. Undetermined under 5 words, where keywords are absent by chance.
    """
    if not keywords or not all(isinstance(word, str) and word.strip() for word in keywords):
        raise UsageError(f"keywords must be non-empty texts, got {keywords!r}")
    ours = words(output)
    if not ours or ours == words(source):
        return Verdict.FAIL
    if occurrences(output, keywords):
        return Verdict.FAIL
    return Verdict.PASS if len(ours) >= 5 else Verdict.UNDETERMINED


@check("end_phrase")
def check_end_phrase(output: str, source: str, *, phrase: str) -> Verdict:
    """The reply ends with exactly this phrase, ignoring case, after at least one other word.

    Quotation marks and asterisks around the reply or the phrase are ignored.
    """
    ours, wanted = _plain_edge(output), _plain_edge(phrase)
    if not wanted:
        raise UsageError(f"phrase must be a non-empty text, got {phrase!r}")
    said_before = words(ours.removesuffix(wanted))
    ends = ours.endswith(wanted) and not cuts_word(ours, len(ours) - len(wanted))
    return Verdict.PASS if ends and said_before else Verdict.FAIL


@check("start_phrase")
def check_start_phrase(output: str, source: str, *, phrase: str) -> Verdict:
    """The reply begins with exactly this phrase, ignoring case, and continues after it.

    Undetermined when the source begins with it too: a copy would pass.
    """
    ours, wanted = _plain_edge(output), _plain_edge(phrase)
    if not wanted:
        raise UsageError(f"phrase must be a non-empty text, got {phrase!r}")
    if not _begins(ours, wanted) or not words(ours.removeprefix(wanted)):
        return Verdict.FAIL
    copied = _begins(_plain_edge(source), wanted)
    return Verdict.UNDETERMINED if copied else Verdict.PASS


def _begins(text: str, phrase: str) -> bool:
    """Whether a text begins with the whole words of a phrase."""
    return text.startswith(phrase) and not cuts_word(text, len(phrase))


def _plain_edge(text: str) -> str:
    """Folded, with one kind of apostrophe, without quotation marks and asterisks at both ends."""
    return " ".join(folded(text).split()).strip('"“”„«»‹›「」『』*_ ')
