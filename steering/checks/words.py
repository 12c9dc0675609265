"""Words, sentences and code fences of a reply: what the checks and the grades count.

`regex` knows Unicode's properties: letters with their combining marks, and the scripts that write
no blanks between words.
"""

import contextlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import regex

# Vowel signs are marks, and some words hold joiners.
_LETTERS = r"[\p{L}\p{N}][\p{L}\p{N}\p{M}\u200c\u200d]*"
WORD = regex.compile(_LETTERS)
_WORD = regex.compile(rf"{_LETTERS}(?:['’]{_LETTERS})*")
_IN_WORD = regex.compile(r"[\p{L}\p{N}\p{M}_\u200c\u200d]")
UNSPACED = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
)
"""Scripts without blanks between words, or (Hangul) with particles that are part of the word."""
CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]")
_URL = re.compile(r"(?:https?://|www\.)\S+")
_INLINE_CODE = re.compile(r"`[^`\n]*`")
_ABBREVIATIONS = frozenset("dr mr mrs ms prof st vs etc e.g i.e a.m p.m no".split())


def words(text: str) -> list[str]:
    """The words of a text, case-folded; a word may hold an apostrophe."""
    text = unicodedata.normalize("NFC", text)
    return [match.group().casefold().replace("’", "'") for match in _WORD.finditer(text)]


def folded(text: str) -> str:
    """One form of what is written alike: composed, case-folded, with one kind of apostrophe."""
    composed = unicodedata.normalize("NFC", text).casefold().replace("’", "'")
    return unicodedata.normalize("NFC", composed)


def cuts_word(text: str, place: int) -> bool:
    """Whether a word goes on across this place; in scripts without blanks, only a letter does."""
    if not 0 < place < len(text):
        return False
    before, after = text[place - 1], text[place]
    if unicodedata.category(after).startswith("M"):
        return True
    if UNSPACED.match(before) or UNSPACED.match(after):
        return False
    return bool(_IN_WORD.match(before) and _IN_WORD.match(after))


def occurrences(text: str, phrases: Sequence[str], *, ignore_case: bool = True) -> int:
    """How often any of the phrases occurs as whole words; what overlaps counts once."""
    form = folded if ignore_case else lambda given: unicodedata.normalize("NFC", given)
    text = form(text)
    spans = []
    for phrase in {form(given.strip()) for given in phrases}:
        at = text.find(phrase)
        while at >= 0:
            if not cuts_word(text, at) and not cuts_word(text, at + len(phrase)):
                spans.append((at, at + len(phrase)))
            at = text.find(phrase, at + 1)
    count = reached = 0
    for start, end in sorted(spans):
        if start >= reached:
            count, reached = count + 1, end
    return count


_THINKING = regex.compile(
    r"\s*(?:<(think|thinking|thought|reasoning)>|\[THINK\]|<\|channel\|>analysis<\|message\|>)"
)
_OPENED = regex.compile(rf"{_THINKING.pattern}\s*$")
_THOUGHT = regex.compile(
    r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]|<\|channel\|>final<\|message\|>"
)


_kept: ContextVar[bool] = ContextVar("thoughts_kept", default=False)


@contextlib.contextmanager
def keeping_thoughts(keep: bool = True) -> Iterator[None]:
    """Inside, thoughts are part of a reply (if `keep`), and graded as its other text."""
    token = _kept.set(keep)
    try:
        yield
    finally:
        _kept.reset(token)


def without_thinking(reply: str) -> str:
    """The answer of a reply that begins with thoughts, as models write them between marks.

    A template may have written the opening mark itself, so what comes before a closing mark is
    thought too. Thoughts that never end leave no answer. Inside `keeping_thoughts`: the reply.
    """
    return reply if _kept.get() else answer_in(reply)


def opens_thoughts(prompt: str) -> bool:
    """Whether a rendered prompt ends with the mark that begins thoughts."""
    return not _kept.get() and _OPENED.search(prompt) is not None


def ends_thoughts(reply: str) -> bool:
    """Whether a reply holds a mark that ends thoughts."""
    return _THOUGHT.search(reply) is not None


def answer_in(reply: str) -> str:
    """`without_thinking`, also inside `keeping_thoughts`."""
    ends = list(_THOUGHT.finditer(reply))
    if ends and (_THINKING.match(reply) or not _THINKING.search(reply, 0, ends[0].start())):
        return reply[ends[0].end() :].lstrip()
    return "" if not ends and _THINKING.match(reply) else reply


def sentences(text: str) -> list[str]:
    """Split a text at . ! ? (and their CJK forms) where a new sentence begins.

    A full stop does not end a sentence after a known abbreviation or a single letter, nor before a
    lower-case word. The rest of the text is the last sentence.
    """
    found: list[str] = []
    start = 0
    for match in re.finditer(r"[.!?…؟۔։।॥]+[\"'”’»)\]*]*(?=\s)|[。！？｡]+[」』”]*", text):
        before = text[start : match.start()].split()
        last = before[-1].strip("\"'“‘(").casefold() if before else ""
        after = text[match.end() :].lstrip()
        if match.group()[0] == ".":
            if last in _ABBREVIATIONS or (len(last) == 1 and last.isalpha()):
                continue
            if after[:1].islower():
                continue
        if piece := text[start : match.end()].strip():
            found.append(piece)
        start = match.end()
    if rest := text[start:].strip():
        found.append(rest)
    return found


@dataclass(frozen=True)
class _Block:
    """A fenced block: its place in the text, from its first mark to behind its last."""

    start: int
    end: int
    info: str
    body: str
    closed: bool


_OPENING = re.compile(r"(`{3,})|^[ \t]*(~{3,})", re.MULTILINE)
_LANGUAGE = re.compile(
    r"[ \t]*(json|jsonc|python3?|py|text|plaintext|markdown|md)[ \t]+(?=\S)", re.I
)


def _blocks(text: str) -> Iterator[_Block]:
    """Blocks fenced by backticks or tildes.

    A block ends at a line that holds its marks alone, so that they may stand in its body; where no
    such line is, at the next marks.
    """
    place = 0
    while opening := _OPENING.search(text, place):
        marks, behind = opening[1] or opening[2], opening.end()
        line, newline, _ = text[behind:].partition("\n")
        if newline and marks not in line:
            info, begin = line.strip().casefold(), behind + len(line) + 1
            alone = re.compile(rf"^[ \t]*{re.escape(marks)}+[ \t]*\r?$", re.MULTILINE)
            closing = alone.search(text, begin)
        else:
            named = _LANGUAGE.match(text, behind)
            info, begin = (named[1].casefold(), named.end()) if named else ("", behind)
            closing = None
        closing = closing or re.compile(re.escape(marks)).search(text, begin)
        stop = len(text) if closing is None else closing.start()
        place = len(text) if closing is None else closing.end()
        yield _Block(opening.start(), place, info, text[begin:stop], closing is not None)


def fences(text: str) -> list[tuple[str, str, bool]]:
    """(info word, body, closed) of each block fenced by three backticks or tildes, or more."""
    return [(block.info, block.body, block.closed) for block in _blocks(text)]


def prose(text: str) -> str:
    """The text without code blocks, inline code and URLs."""
    outside, place = [], 0
    for block in _blocks(text):
        outside.append(text[place : block.start])
        place = block.end
    outside.append(text[place:])
    return _URL.sub(" ", _INLINE_CODE.sub(" ", " ".join(outside)))


def letters(text: str) -> int:
    """The number of letters of any script."""
    return sum(character.isalpha() for character in text)
