"""Words, sentences and code blocks of a reply, for checks and grades."""

import re

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]")
_URL = re.compile(r"(?:https?://|www\.)\S+")
_INLINE_CODE = re.compile(r"`[^`\n]*`")
_ABBREVIATIONS = frozenset("dr mr mrs ms prof st vs etc e.g i.e a.m p.m no".split())


def words(text: str) -> list[str]:
    """The words of a text, case-folded; a word may hold an apostrophe."""
    return [match.group().casefold().replace("’", "'") for match in _WORD.finditer(text)]


def sentences(text: str) -> list[str]:
    """Split a text at . ! ? (and their CJK forms) where a new sentence begins.

    A full stop does not end a sentence after a known abbreviation or a single letter, nor before a
    lower-case word. The rest of the text is the last sentence.
    """
    found: list[str] = []
    start = 0
    for match in re.finditer(r"[.!?…]+[\"'”’»)\]*]*(?=\s)|[。！？]+[」』”]*", text):
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


def fences(text: str) -> list[tuple[str, str, bool]]:
    """(info word, body, closed) of each block fenced by three backticks."""
    parts = text.split("```")
    blocks = []
    for index in range(1, len(parts), 2):
        first, newline, rest = parts[index].partition("\n")
        info, body = (first.strip(), rest) if newline else ("", parts[index])
        blocks.append((info.casefold(), body, index + 1 < len(parts)))
    return blocks


def prose(text: str) -> str:
    """The text without code blocks, inline code and URLs."""
    outside = " ".join(text.split("```")[::2])
    return _URL.sub(" ", _INLINE_CODE.sub(" ", outside))


def letters(text: str) -> int:
    """The number of letters of any script."""
    return sum(character.isalpha() for character in text)
