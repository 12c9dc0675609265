"""Programs that grade a reply: does it follow the instruction, is it degenerate, is it on topic?

A check is a pure function ``check(output, source, **arguments) -> Verdict`` in `CHECKS`; it never
raises on any text and never runs any. `source` is the content the instruction was applied to. An
empty reply fails every check, and one that cannot be judged (too short, cut off by the token limit)
is undetermined, which counts as failed. The thresholds are this project's defaults.
"""

import ast
import functools
import json
import math
import random
import re
import statistics
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from difflib import SequenceMatcher
from enum import Enum
from typing import Any, Literal

from saesteer.checkpoints.errors import UsageError


class Verdict(Enum):
    """What a check says of one reply. Only PASS counts as success."""

    PASS = "pass"
    FAIL = "fail"
    UNDETERMINED = "undetermined"


class Grade(Enum):
    """A: follows the instruction and is on topic. B: follows it only. C: does not follow it."""

    A = "A"
    B = "B"
    C = "C"


Check = Callable[..., Verdict]
CHECKS: dict[str, Check] = {}
"""The checks by name, as task files name them."""

DEGENERATE_SHARE = 0.20
"""A reply is degenerate when its most repeated 4-gram covers more than this share of its tokens."""


def _check(name: str) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return register


def run_check(name: str, output: str, source: str, **arguments: Any) -> Verdict:
    """Run the check called `name`. Raises `UsageError` for a name or argument that cannot work."""
    if name not in CHECKS:
        raise UsageError(f"unknown check {name!r}: the checks are {', '.join(sorted(CHECKS))}")
    return CHECKS[name](output, source, **arguments)


def content_reference(check_name: str | None) -> Literal["source", "prompted"]:
    """What a reply's content is compared with: the source, or the prompted model's own answer.

    A reply in another language shares few words with its source, so there the prompted answer
    stands in for a reference translation.
    """
    return "prompted" if check_name in ("language", "translation") else "source"


# --- words, sentences, fences --------------------------------------------------------------------

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]")
_URL = re.compile(r"(?:https?://|www\.)\S+")
_INLINE_CODE = re.compile(r"`[^`\n]*`")
_ABBREVIATIONS = frozenset("dr mr mrs ms prof st vs etc e.g i.e a.m p.m no".split())


def words(text: str) -> list[str]:
    """The words of a text, case-folded; a word may hold an apostrophe."""
    return [match.group().casefold().replace("’", "'") for match in _WORD.finditer(text)]


def sentences(text: str) -> list[str]:
    """Split a text at . ! ? (and their CJK forms) where a new sentence begins.

    A stop after a known abbreviation or a single letter ends nothing unless the text ends there;
    a full stop before a lower-case word ends nothing either.
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


def _fences(text: str) -> list[tuple[str, str, bool]]:
    """(info word, body, closed) of each block fenced by three backticks."""
    parts = text.split("```")
    blocks = []
    for index in range(1, len(parts), 2):
        first, newline, rest = parts[index].partition("\n")
        info, body = (first.strip(), rest) if newline else ("", parts[index])
        blocks.append((info.casefold(), body, index + 1 < len(parts)))
    return blocks


def _prose(text: str) -> str:
    """The text without code blocks, inline code and URLs."""
    outside = " ".join(text.split("```")[::2])
    return _URL.sub(" ", _INLINE_CODE.sub(" ", outside))


def _letters(text: str) -> int:
    return sum(character.isalpha() for character in text)


def _at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} must be a whole number from {least}, got {value!r}")


# --- languages -----------------------------------------------------------------------------------

LANGUAGES = tuple(
    "ar cs da de el en es fi fr he hi hu it ja ko la nl pl pt ro ru sv th tr uk vi zh".split()
)
"""Languages that are told apart. A short list: with all of py3langid's 140, near relatives
(Occitan, Aragonese, Luxembourgish, Nigerian Pidgin) take the probability that short French,
Spanish, German and English texts deserve."""

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
"""Common words per language, split at apostrophes ("n" and "t" of contractions): the second opinion
of the language check, and the stop list of `content_words`."""


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(LANGUAGES)
    return identifier


def _function_words_agree(text: str, lang: str) -> bool | None:
    """Whether the common words belong to `lang`, not to another language; None: cannot tell.

    Catches half-translated text, which the identifier's letter statistics let pass.
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
    # one stray word proves nothing: a name, a quotation, a word missing in our own list
    return foreign < 2 or foreign <= _FOREIGN_WORD_SHARE * (own + foreign)


@_check("language")
def check_language(output: str, source: str, *, lang: str) -> Verdict:
    """The reply is written in `lang` (ISO 639-1), code blocks and URLs apart.

    Two opinions must agree: py3langid restricted to `LANGUAGES` (probability at least .5), and,
    for en, fr, de and es, the common words (one, or at most a quarter of them, another language's).
    Undetermined under 20 letters (10 for zh, ja, ko).
    """
    if lang not in LANGUAGES:
        raise UsageError(f"unknown language {lang!r}: the check knows {', '.join(LANGUAGES)}")
    if not output.strip():
        return Verdict.FAIL
    text = " ".join(_prose(output).split())
    fewest = _FEWEST_LETTERS_CJK if lang in ("zh", "ja", "ko") else _FEWEST_LETTERS
    if _letters(text) < fewest:
        return Verdict.UNDETERMINED
    best, probability = _identifier().rank(text)[0]
    if best != lang or _function_words_agree(text, lang) is False:
        return Verdict.FAIL
    return Verdict.PASS if probability >= _LANGUAGE_PROBABILITY else Verdict.UNDETERMINED


def _width(text: str) -> float:
    """Length in Latin letters; a CJK character says about as much as 2.5 of them."""
    cjk = len(_CJK.findall(text))
    return _letters(text) - cjk + 2.5 * cjk


def _four_grams(text: str) -> set[str]:
    plain = " ".join(words(text))
    return {plain[i : i + 4] for i in range(len(plain) - 3)}


@_check("translation")
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


# --- formats -------------------------------------------------------------------------------------


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _open_at_end(text: str) -> bool:
    """Whether brackets or a string are still open at the end, as in a reply that was cut off."""
    depth, in_string, escaped = 0, False, False
    for character in text:
        if escaped:
            escaped = False
        elif in_string:
            escaped = character == "\\"
            in_string = character != '"'
        elif character == '"':
            in_string = True
        else:
            depth += (character in "{[") - (character in "}]")
    return in_string or depth > 0


@_check("json")
def check_json(output: str, source: str, *, kind: str = "any") -> Verdict:
    """The whole reply, or its one fenced block, is a non-empty JSON object or array.

    `kind` is object, array or any. Undetermined when the JSON breaks off with brackets open.
    """
    if kind not in ("object", "array", "any"):
        raise UsageError(f"kind must be object, array or any for the json check, got {kind!r}")
    text = output.strip()
    if not text:
        return Verdict.FAIL
    blocks = _fences(text)
    cut_off = False
    # the whole first: backticks may stand inside a JSON string
    for body in (text, blocks[0][1].strip()) if len(blocks) == 1 else (text,):
        try:
            value = json.loads(body, parse_constant=_refuse_constant)
            break
        except (ValueError, RecursionError):
            cut_off = cut_off or (body[:1] in ("{", "[") and _open_at_end(body))
    else:
        return Verdict.UNDETERMINED if cut_off else Verdict.FAIL
    wanted = {"object": (dict,), "array": (list,), "any": (dict, list)}[kind]
    return Verdict.PASS if isinstance(value, wanted) and value else Verdict.FAIL


_PROGRAM_STATEMENTS = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AugAssign,
    ast.For,
    ast.While,
    ast.If,
    ast.With,
    ast.Try,
    ast.Match,
)
_LONGEST_PROGRAM = 20_000  # characters; a bound on the parser's work, far above any reply


def _is_program(text: str) -> bool | None:
    """Whether the text parses as Python and does something; None when it does not parse.

    English can parse: "soup", "salt, pepper", "note: bread" and "return home" are Python. So words
    alone, annotations without a value, imports and lone keywords do not make a program.
    """
    if len(text) > _LONGEST_PROGRAM:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape in a reply is not our warning
            body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    for statement in body:
        if isinstance(statement, _PROGRAM_STATEMENTS):
            return True
        if isinstance(statement, ast.AnnAssign) and statement.value is not None:
            return True
        if isinstance(statement, ast.Expr) and any(
            isinstance(node, ast.Call) for node in ast.walk(statement)
        ):
            return True
    return False


@_check("python")
def check_python(output: str, source: str) -> Verdict:
    """The reply is, or holds in a fenced block, a Python program. It is parsed, never run.

    Undetermined when the code parses only after dropping its last lines: a reply cut off.
    """
    text = output.strip()
    if not text:
        return Verdict.FAIL
    blocks = [
        (body, closed)
        for info, body, closed in _fences(text)
        if info in ("", "python", "py", "python3")
    ]
    candidates = blocks or [(text, False)]
    if any(_is_program(body.strip("\n")) for body, _ in candidates):
        return Verdict.PASS
    body, closed = candidates[-1]
    lines = body.strip("\n").split("\n")
    if not closed and _is_program("\n".join(lines)) is None:
        for dropped in range(1, min(len(lines), 4)):
            if _is_program("\n".join(lines[:-dropped])):
                return Verdict.UNDETERMINED
    return Verdict.FAIL


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


@_check("question")
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


@_check("keyword")
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
    _at_least("at_least", at_least, 1)
    pattern = re.compile(
        "|".join(rf"(?<!\w){re.escape(form.strip())}(?!\w)" for form in forms),
        re.IGNORECASE if ignore_case else 0,
    )
    if len(pattern.findall(output)) < at_least:
        return Verdict.FAIL
    copied = len(pattern.findall(source)) >= at_least
    return Verdict.UNDETERMINED if copied else Verdict.PASS


def _case_share(text: str, upper: bool) -> tuple[int, float]:
    """(cased letters, share of them in the case asked for)."""
    cased = [c for c in text if c.isalpha() and c.upper() != c.lower()]
    # not isupper(): a title-case digraph or a letter without a counterpart is neither
    right = sum((c == c.upper()) if upper else (c == c.lower()) for c in cased)
    return len(cased), right / len(cased) if cased else 0.0


def _check_case(output: str, upper: bool) -> Verdict:
    if not output.strip():
        return Verdict.FAIL
    cased, share = _case_share(output, upper)
    if cased < 10:
        return Verdict.UNDETERMINED
    return Verdict.PASS if share >= 0.99 else Verdict.FAIL


@_check("uppercase")
def check_uppercase(output: str, source: str) -> Verdict:
    """At least 99 % of the cased letters are capitals; undetermined under 10 cased letters."""
    return _check_case(output, upper=True)


@_check("lowercase")
def check_lowercase(output: str, source: str) -> Verdict:
    """At least 99 % of the cased letters are small; undetermined under 10 cased letters."""
    return _check_case(output, upper=False)


@_check("bullets")
def check_bullets(
    output: str,
    source: str,
    *,
    minimum: int = 2,
    maximum: int | None = None,
    numbers: bool = False,
) -> Verdict:
    """At least `minimum` (at most `maximum`) lines start with -, * or • and a blank, then text.

    With `numbers`, lines that start with a number and . or ) count too.
    """
    _at_least("minimum", minimum, 1)
    if maximum is not None:
        _at_least("maximum", maximum, minimum)
    marker = r"(?:[-*•]|\d{1,3}[.)])" if numbers else r"[-*•]"
    items = len(re.findall(rf"^[ \t]*{marker}[ \t]+\S", output, re.MULTILINE))
    enough = items >= minimum and (maximum is None or items <= maximum)
    return Verdict.PASS if enough else Verdict.FAIL


@_check("summary")
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


_QUOTES = {'"': '"', "“": "”", "„": "“", "«": "»"}


@_check("quotes")
def check_quotes(output: str, source: str) -> Verdict:
    """The whole reply stands in double quotation marks, with at least one word inside.

    Undetermined when a mark is opened and never closed, as in a reply cut off.
    """
    text = output.strip()
    closing = _QUOTES.get(text[:1])
    if closing is None or not words(text):
        return Verdict.FAIL
    if len(text) > 2 and text.endswith(closing):
        return Verdict.PASS
    return Verdict.FAIL if closing in text[1:] else Verdict.UNDETERMINED


@_check("length")
def check_length(
    output: str,
    source: str,
    *,
    unit: str = "words",
    minimum: int = 1,
    maximum: int | None = None,
) -> Verdict:
    """The reply has `minimum` to `maximum` words, sentences, paragraphs or characters."""
    counts: dict[str, Callable[[str], int]] = {
        "words": lambda text: len(words(text)),
        "sentences": lambda text: len(sentences(text)),
        "paragraphs": lambda text: sum(bool(p.strip()) for p in re.split(r"\n\s*\n", text)),
        "characters": len,
    }
    if unit not in counts:
        raise UsageError(f"unit must be one of {', '.join(counts)}, got {unit!r}")
    _at_least("minimum", minimum, 0)
    if maximum is not None:
        _at_least("maximum", maximum, minimum)
    text = output.strip()
    if not text:
        return Verdict.FAIL
    n = counts[unit](text)
    return Verdict.PASS if n >= minimum and (maximum is None or n <= maximum) else Verdict.FAIL


# --- repetition, content, grades -----------------------------------------------------------------


def repetition(tokens: Sequence[Hashable]) -> float:
    """Share of the tokens covered by the most repeated 4-gram; 0 if no 4-gram occurs twice.

    "Most repeated" is the repeated 4-gram that covers the most tokens; occurrences may overlap, and
    a token is counted once. Give it a reply's token ids (without padding), or its words.
    """
    starts: defaultdict[tuple[Hashable, ...], list[int]] = defaultdict(list)
    for index in range(len(tokens) - 3):
        starts[tuple(tokens[index : index + 4])].append(index)
    covered = 0
    for where in starts.values():
        if len(where) > 1:
            gaps = (b - a for a, b in zip(where, where[1:], strict=False))
            covered = max(covered, 4 + sum(min(4, gap) for gap in gaps))
    return covered / len(tokens) if covered else 0.0


def is_degenerate(token_ids: Sequence[Hashable]) -> bool:
    """Whether one 4-gram covers more than 20 % of the tokens (see `repetition`)."""
    return repetition(token_ids) > DEGENERATE_SHARE


def content_words(text: str) -> frozenset[str]:
    """The words that carry the content: case-folded, stop words (en, fr, de, es) left out.

    Kept are words of four letters or more, words with a digit, and shorter names (capitalised,
    not first in their sentence). Thousands separators are dropped, so 3,000 equals 3000. A run of
    CJK characters gives its character pairs.
    """
    text = unicodedata.normalize("NFC", text)
    text = re.sub(r"(?<=\d)[,.'\u00a0\u202f](?=\d{3}(?!\d))", "", text)
    kept: set[str] = set()
    for sentence in sentences(text):
        for index, match in enumerate(re.finditer(r"[^\W_]+", sentence)):
            word = match.group()
            folded = word.casefold()
            if _CJK.search(word):
                kept.update(word[i : i + 2] for i in range(max(1, len(word) - 1)))
            elif any(character.isdigit() for character in word):
                kept.add(folded)
            elif any(folded in stop for stop in FUNCTION_WORDS.values()):
                continue
            elif len(word) >= 4 or (index > 0 and len(word) > 1 and word.istitle()):
                kept.add(folded)
    return frozenset(kept)


def _f1(ours: frozenset[str], theirs: frozenset[str]) -> float:
    return 2 * len(ours & theirs) / (len(ours) + len(theirs)) if ours and theirs else 0.0


def content_overlap(output: str, reference: str) -> float:
    """F1 of the content words of a reply and a reference, in 0..1 (see `content_words`)."""
    return _f1(content_words(output), content_words(reference))


def mismatch_floor(
    outputs: Sequence[str],
    references: Sequence[str],
    *,
    percentile: float = 95.0,
    max_pairs: int = 4000,
) -> float:
    """The overlap that replies reach with references of *other* items: what chance explains.

    Nearest-rank percentile of `content_overlap(outputs[i], references[j])` over the pairs i != j
    whose references differ; above `max_pairs` pairs, a fixed random sample. With no such pair
    nothing can be told from chance, and the floor is 1.0, which no reply exceeds.
    """
    if len(outputs) != len(references):
        raise UsageError(f"{len(outputs)} outputs but {len(references)} references; pair them up")
    n = len(outputs)
    ours = [content_words(text) for text in outputs]
    theirs = [content_words(text) for text in references]
    total = n * (n - 1)
    picked = (
        range(total) if total <= max_pairs else random.Random(0).sample(range(total), max_pairs)
    )
    overlaps = []
    for pair in picked:
        i, j = divmod(pair, n - 1)
        j += j >= i  # skip the diagonal
        if references[i] != references[j]:
            overlaps.append(_f1(ours[i], theirs[j]))
    if not overlaps:
        return 1.0
    overlaps.sort()
    return overlaps[max(0, math.ceil(percentile / 100 * len(overlaps)) - 1)]


def grade(verdict: Verdict, degenerate: bool, overlap: float, floor: float) -> Grade:
    """C if the check does not pass or the reply is degenerate; else A above the floor, else B."""
    if verdict is not Verdict.PASS or degenerate:
        return Grade.C
    return Grade.A if overlap > floor else Grade.B


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a rate: (low, high). With no trials it is (0, 1).

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if not 0 <= successes <= n:
        raise UsageError(f"successes must be in 0..{n} (n), got {successes}")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must lie between 0 and 1, got {confidence}")
    if n == 0:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / n
    centre = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # the ends are exact at 0 and n successes; rounding must not push them past the rate
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == n else (centre + spread) / scale
    return low, high
