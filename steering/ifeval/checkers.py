"""The 25 checkers of IFEval (Zhou et al., arXiv 2311.07911), from the paper's description and the
behaviour of its released code.

Each is `checker(text, **kwargs) -> bool`, where the keyword arguments are those of the standard
JSONL; arguments that a row leaves out or sets to null are not passed. Three instructions need a
language identifier, and two a sentence splitter. As in the released code these are langdetect, and
NLTK with its punkt data, where installed. Otherwise py3langid and our own splitter replace them,
and `stand_ins` lists the instructions concerned.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from saesteer.checkpoints.errors import UserError
from saesteer.steering.checks import words as text_tools

Checker = Callable[..., bool]
CHECKERS: dict[str, Checker] = {}
"""By the instruction's id in the data."""


def _checker(name: str) -> Callable[[Checker], Checker]:
    def register(function: Checker) -> Checker:
        CHECKERS[name] = function
        return function

    return register


def _holds(count: int, relation: str, wanted: int) -> bool:
    if relation == "less than":
        return count < wanted
    if relation == "at least":
        return count >= wanted
    raise UserError(f"IFEval knows the relations 'less than' and 'at least', got {relation!r}")


# --- replacements for missing packages -----------------------------------------------------------


@functools.cache
def _langdetect() -> Any:
    """The langdetect package with a fixed seed, or None."""
    try:
        import langdetect
    except ImportError:
        return None
    langdetect.DetectorFactory.seed = 0
    return langdetect


@functools.cache
def _punkt() -> Any:
    """NLTK's English sentence splitter with its data, or None. Nothing is downloaded."""
    try:
        import nltk

        return nltk.tokenize.PunktTokenizer("english")
    except (ImportError, LookupError, AttributeError):
        return None


def stand_ins() -> dict[str, str]:
    """Instructions not judged as in the released code, and what is used instead."""
    found = {}
    if _langdetect() is None:
        for name in ("language:response_language", *_CASE):
            found[name] = "py3langid instead of langdetect"
    if _punkt() is None:
        for name in ("length_constraints:number_sentences", "change_case:capital_word_frequency"):
            found[name] = "own sentence and word splitter instead of NLTK"
    return found


_CASE = ("change_case:english_capital", "change_case:english_lowercase")


def _language_is(text: str, lang: str) -> bool:
    """Whether the text is in a language; unidentifiable text passes, as in the released code."""
    package = _langdetect()
    if package is None:
        from py3langid.langid import classify

        if not any(character.isalpha() for character in text):
            return True
        return bool(classify(text)[0] == lang.split("-")[0])
    try:
        return bool(package.detect(text) == lang)
    except package.LangDetectException:
        return True


def _sentence_count(text: str) -> int:
    punkt = _punkt()
    return len(punkt.tokenize(text)) if punkt is not None else len(text_tools.sentences(text))


def _tokens(text: str) -> Sequence[str]:
    """Words and marks, as NLTK's word_tokenize cuts them."""
    punkt = _punkt()
    if punkt is None:
        return re.findall(r"\w+(?:[-.]\w+)*|[^\w\s]", text)
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer = NLTKWordTokenizer()
    return [word for part in punkt.tokenize(text) for word in tokenizer.tokenize(part)]


# --- keywords ------------------------------------------------------------------------------------


@_checker("keywords:existence")
def existence(text: str, *, keywords: Sequence[str]) -> bool:
    """Every keyword, as a regular expression, occurs, ignoring case."""
    return all(re.search(keyword, text, re.IGNORECASE) for keyword in keywords)


@_checker("keywords:frequency")
def keyword_frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """The keyword occurs `relation` (less than, at least) `frequency` times."""
    return _holds(len(re.findall(keyword, text, re.IGNORECASE)), relation, frequency)


@_checker("keywords:forbidden_words")
def forbidden_words(text: str, *, forbidden_words: Sequence[str]) -> bool:
    """No forbidden word occurs as a whole word."""
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


@_checker("keywords:letter_frequency")
def letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """A character occurs `let_relation` (less than, at least) `let_frequency` times."""
    return _holds(text.lower().count(letter.lower()), let_relation, let_frequency)


# --- language and length -------------------------------------------------------------------------


@_checker("language:response_language")
def response_language(text: str, *, language: str) -> bool:
    """The whole text is in a language."""
    return _language_is(text, language)


@_checker("length_constraints:number_sentences")
def number_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    """The text has `relation` (less than, at least) `num_sentences` sentences."""
    return _holds(_sentence_count(text), relation, num_sentences)


@_checker("length_constraints:number_words")
def number_words(text: str, *, num_words: int, relation: str) -> bool:
    """Words are runs of letters, digits and underscores."""
    return _holds(len(re.findall(r"\w+", text)), relation, num_words)


@_checker("length_constraints:number_paragraphs")
def number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """Exactly `num_paragraphs` paragraphs between lines of ***; only outer ones may be empty."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    return sum(bool(part.strip()) for part in parts) == num_paragraphs


@_checker("length_constraints:nth_paragraph_first_word")
def nth_paragraph_first_word(
    text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """Exactly `num_paragraphs` paragraphs between blank lines; number `nth_paragraph` begins with
    `first_word`."""
    parts = text.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    if nth_paragraph > count:
        return False
    paragraph = parts[nth_paragraph - 1].strip()
    if not paragraph:
        return False
    start = paragraph.split()[0].lstrip("'").lstrip('"')
    bare = re.match(r"[^.,?!'\"]*", start)
    found = bare[0].lower() if bare else ""
    return count == num_paragraphs and found == first_word.lower()


# --- content and format --------------------------------------------------------------------------


@_checker("detectable_content:number_placeholders")
def number_placeholders(text: str, *, num_placeholders: int) -> bool:
    """At least `num_placeholders` placeholders in square brackets."""
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


@_checker("detectable_content:postscript")
def postscript(text: str, *, postscript_marker: str) -> bool:
    """A postscript with this marker; for P.S. and P.P.S blanks between the letters are allowed."""
    pattern = {
        "P.P.S": r"\s*p\.\s?p\.\s?s.*$",
        "P.S.": r"\s*p\.\s?s\..*$",
    }.get(postscript_marker, rf"\s*{postscript_marker.lower()}.*$")
    return re.search(pattern, text.lower(), re.MULTILINE) is not None


@_checker("detectable_format:number_bullet_lists")
def number_bullet_lists(text: str, *, num_bullets: int) -> bool:
    """Exactly `num_bullets` lines that start with * (but not **) or -."""
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


@_checker("detectable_format:constrained_response")
def constrained_response(text: str) -> bool:
    """One of the three fixed answers occurs."""
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


@_checker("detectable_format:number_highlighted_sections")
def number_highlighted_sections(text: str, *, num_highlights: int) -> bool:
    """At least `num_highlights` passages marked as *highlight* or **highlight**."""
    single = [part for part in re.findall(r"\*[^\n\*]*\*", text) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n\*]*\*\*", text) if part[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


@_checker("detectable_format:multiple_sections")
def multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least `num_sections` numbered sections, such as `Section 1`."""
    parts = re.split(rf"\s?{section_spliter}\s?\d+\s?", text)
    return len(parts) - 1 >= num_sections


@_checker("detectable_format:json_format")
def json_format(text: str) -> bool:
    """The whole text, without a fence around it, is JSON."""
    body = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        body = body.removeprefix(fence)
    try:
        json.loads(body.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


@_checker("detectable_format:title")
def title(text: str) -> bool:
    """A title in double angular brackets."""
    found = re.findall(r"<<[^\n]+>>", text)
    return any(part.lstrip("<").rstrip(">").strip() for part in found)


# --- combinations, beginnings and ends -----------------------------------------------------------


@_checker("combination:two_responses")
def two_responses(text: str) -> bool:
    """Two different responses separated by six asterisks; only outer parts may be empty."""
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    kept = [part for part in parts if part.strip()]
    return len(kept) == 2 and kept[0].strip() != kept[1].strip()


@_checker("combination:repeat_prompt")
def repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    """The text begins with the request, word for word."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_checker("startend:end_checker")
def end_checker(text: str, *, end_phrase: str) -> bool:
    """The text ends with a phrase, apart from a quotation mark after it."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_checker("startend:quotation")
def quotation(text: str) -> bool:
    """The whole text stands in double quotation marks."""
    body = text.strip()
    return len(body) > 1 and body[0] == '"' and body[-1] == '"'


# --- case and punctuation ------------------------------------------------------------------------


@_checker("change_case:capital_word_frequency")
def capital_word_frequency(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """Words in capitals: `capital_relation` (less than, at least) `capital_frequency` of them."""
    capitals = sum(word.isupper() for word in _tokens(text))
    return _holds(capitals, capital_relation, capital_frequency)


@_checker("change_case:english_capital")
def english_capital(text: str) -> bool:
    """English in capitals alone."""
    return text.isupper() and _language_is(text, "en")


@_checker("change_case:english_lowercase")
def english_lowercase(text: str) -> bool:
    """English in small letters alone."""
    return text.islower() and _language_is(text, "en")


@_checker("punctuation:no_comma")
def no_comma(text: str) -> bool:
    """The text has no comma."""
    return "," not in text
