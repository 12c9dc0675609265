"""Checks of the form of a reply: JSON, code, lists, case, quotation marks, length."""

import ast
import json
import re
import warnings
from collections.abc import Callable

from saesteer.checkpoints.errors import UsageError
from saesteer.steering.checks.registry import Verdict, check, need_whole
from saesteer.steering.checks.words import CJK, fences, sentences, words


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


@check("json")
def check_json(output: str, source: str, *, kind: str = "any") -> Verdict:
    """The whole reply, or its one fenced block, is a non-empty JSON object or array.

    `kind` is object, array or any. Undetermined when the JSON breaks off with brackets open.
    """
    if kind not in ("object", "array", "any"):
        raise UsageError(f"kind must be object, array or any for the json check, got {kind!r}")
    text = output.strip()
    if not text:
        return Verdict.FAIL
    blocks = fences(text)
    cut_off = False
    # The whole reply first, because backticks may be part of a JSON string.
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
    """Whether the text is a Python program; None when it does not parse.

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


@check("python")
def check_python(output: str, source: str) -> Verdict:
    """The reply is, or holds in a fenced block, a Python program. It is parsed, never run.

    Undetermined when the code parses only after dropping its last lines: a reply cut off.
    """
    text = output.strip()
    if not text:
        return Verdict.FAIL
    blocks = [
        (body, closed)
        for info, body, closed in fences(text)
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


@check("uppercase")
def check_uppercase(output: str, source: str) -> Verdict:
    """At least 99 % of the cased letters are capitals; undetermined under 10 cased letters."""
    return _check_case(output, upper=True)


@check("lowercase")
def check_lowercase(output: str, source: str) -> Verdict:
    """At least 99 % of the cased letters are small; undetermined under 10 cased letters."""
    return _check_case(output, upper=False)


# CJK texts write the middle dot without a blank.
_BULLET = r"(?:[-*+•◦‣⁃∙●○◉■□▪▫◆◇►▸▶➢➤✓✔·–][ \t\u00a0\u3000]+|[・･][ \t\u3000]*)"
# 1. 1) (1) １． １、 a) (a) i. ①
_NUMBER = (
    r"(?:(?:[(（]?\d{1,3}[)）]|\d{1,3}[.．、]|[(（]?[A-Za-z][)）]|[ivx]{1,5}[.)])[ \t\u00a0\u3000]+"
    r"|\d{1,3}[．、）]|[①-⑳][ \t\u3000]*)"
)


@check("bullets")
def check_bullets(
    output: str,
    source: str,
    *,
    minimum: int = 2,
    maximum: int | None = None,
    numbers: bool = False,
) -> Verdict:
    """At least `minimum` (at most `maximum`) lines start with a bullet (-, *, •, ◦, – and others)
    and a blank, then text; the CJK dot ・ needs no blank.

    With `numbers`, lines that start with a number or letter such as 1. or (a) count too.
    """
    need_whole("minimum", minimum, 1)
    if maximum is not None:
        need_whole("maximum", maximum, minimum)
    marker = rf"(?:{_BULLET}|{_NUMBER})" if numbers else _BULLET
    items = len(re.findall(rf"^[ \t\u3000]*{marker}\S", output, re.MULTILINE))
    enough = items >= minimum and (maximum is None or items <= maximum)
    return Verdict.PASS if enough else Verdict.FAIL


# Each opening mark and those that close it, as languages differ.
_QUOTES = {
    '"': '"', "“": "”", "”": "”", "„": "“”", "‟": "”", "«": "»", "»": "«»", "「": "」",
    "『": "』", "＂": "＂",
}  # fmt: skip


@check("quotes")
def check_quotes(output: str, source: str) -> Verdict:
    """The whole reply stands in double quotation marks, with at least one word inside.

    Undetermined when a mark is opened and never closed, as in a reply cut off.
    """
    text = output.strip()
    closing = _QUOTES.get(text[:1])
    if closing is None or not words(text):
        return Verdict.FAIL
    if len(text) > 2 and text[-1] in closing:
        return Verdict.PASS
    closed = any(mark in text[1:] for mark in closing)
    return Verdict.FAIL if closed else Verdict.UNDETERMINED


@check("length")
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
    need_whole("minimum", minimum, 0)
    if maximum is not None:
        need_whole("maximum", maximum, minimum)
    text = output.strip()
    if not text:
        return Verdict.FAIL
    n = counts[unit](text)
    return Verdict.PASS if n >= minimum and (maximum is None or n <= maximum) else Verdict.FAIL


_FEWEST_WORDS_WITHOUT_COMMA = 8


@check("no_comma")
def check_no_comma(output: str, source: str) -> Verdict:
    """The reply has no comma of any script, and is not a copy of the source.

    Undetermined under 8 words, because nearly every short reply has none.
    """
    ours = words(output)
    if not ours or ours == words(source) or re.search("[,，、،﹐︐]", output):
        return Verdict.FAIL
    cjk = len(CJK.findall(output))
    enough = len(ours) + cjk // 2 >= _FEWEST_WORDS_WITHOUT_COMMA
    return Verdict.PASS if enough else Verdict.UNDETERMINED


@check("title")
def check_title(output: str, source: str) -> Verdict:
    """A line holds a title in double angular brackets, <<such as this>>."""
    titles = re.findall(r"<<([^<>\n]+)>>", output)
    return Verdict.PASS if any(words(title) for title in titles) else Verdict.FAIL
