"""What a reply says in words, without the form that an instruction asked for."""

import ast
import io
import json
import re
import tokenize
import warnings
from collections.abc import Iterator

from saesteer.steering.checks.words import fences, prose

_LONGEST = 20_000  # characters of a program; as in the check


def json_value(reply: str) -> object | None:
    """The JSON value that a reply is, or its one fenced block is; None where there is none."""
    text = reply.strip()
    blocks = fences(text)
    for body in (text, blocks[0][1].strip()) if len(blocks) == 1 else (text,):
        try:
            return json.loads(body)  # type: ignore[no-any-return]
        except (ValueError, RecursionError):
            continue
    return None


def json_texts(value: object) -> Iterator[str]:
    """The texts and numbers among the values of a JSON document, without its keys."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from json_texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from json_texts(inner)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield f"{value}"


def program(reply: str) -> tuple[str, ast.Module] | None:
    """The Python program that a reply is, or holds in a fenced block, and its tree. Never run."""
    blocks = [
        body.strip("\n")
        for info, body, _ in fences(reply)
        if info in ("", "python", "py", "python3")
    ]
    for body in blocks or [reply.strip()]:
        if len(body) > _LONGEST:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        if tree.body:
            return body, tree
    return None


def program_texts(source: str, tree: ast.Module) -> Iterator[str]:
    """The strings, numbers and comments of a program."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float):
            if not isinstance(node.value, bool):
                yield str(node.value)
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                yield token.string.lstrip("# ")
    except (tokenize.TokenError, SyntaxError, IndentationError):
        pass


_MARKERS = re.compile(r"^[ \t]*(?:[-*•]|\d{1,3}[.)])[ \t]+", re.MULTILINE)


def spoken(check_name: str | None, reply: str) -> str | None:
    """The words of a reply: JSON's values, a program's strings and comments, items without markers.

    None for a reply that is not of the form its check asks for, so that its words cannot be told
    from its signs.
    """
    if check_name == "json":
        value = json_value(reply)
        return None if value is None else ". ".join(json_texts(value))
    if check_name == "python":
        parsed = program(reply)
        return None if parsed is None else ". ".join(program_texts(*parsed))
    return _MARKERS.sub("", prose(reply)).replace("*", " ").strip()
