"""Library errors name arguments in backticks; the command line writes each as its flag."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from saesteer.cli.__main__ import VERBS, make_parser
from saesteer.cli.output import ARGUMENT_FLAGS, one_line

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("sae", "steering", "mechanisms", "checkpoints", "kernels")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
NAME = re.compile(r"`([a-z_][a-z0-9_]*(?:=False)?)`")

OTHER_PROGRAMS = {"checkpoints/model_files.py": "pip", "checkpoints/provenance.py": "git"}
"""Modules that name the flags of another program, and which."""

NO_ARGUMENT = {
    "all": "a value of `scope`",
    "describe_model": "the model of a Describer, told apart from the model that is read",
    "judge_model": "the model of a Judge, told apart from the model that answers",
}
"""Words in backticks that are no argument, and what they are."""


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the library's rooms, by its path."""
    paths = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}


def literals(tree: ast.AST) -> Iterator[ast.Constant]:
    """The string literals of a tree, parts of f-strings included, without docstrings."""
    strings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in strings:
                yield node


@cache
def arguments() -> set[str]:
    """Parameters of public callables and fields of public dataclasses of the library."""
    found: set[str] = set()
    for tree in modules().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                given = node.args
                found |= {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
                found |= {part.target.id for part in fields if isinstance(part.target, ast.Name)}
    return found


@cache
def named() -> dict[str, list[str]]:
    """Every name in backticks in the library's texts, with where it stands."""
    found: dict[str, list[str]] = {}
    for path, tree in modules().items():
        for text in literals(tree):
            for name in NAME.findall(text.value):
                found.setdefault(name, []).append(f"{path}:{text.lineno}")
    return found


def test_no_library_text_names_a_flag() -> None:
    found = [
        f"{path}:{text.lineno}: {flag}"
        for path, tree in modules().items()
        if path not in OTHER_PROGRAMS
        for text in literals(tree)
        for flag in FLAG.findall(text.value)
    ]
    assert found == []


def test_texts_name_arguments() -> None:
    unknown = {
        name: places
        for name, places in named().items()
        if name.removesuffix("=False") not in arguments() and name not in NO_ARGUMENT
    }
    assert unknown == {}
    assert [name for name in NO_ARGUMENT if name not in named()] == []


@cache
def flags() -> dict[str, set[str]]:
    """The flags of all verbs by the attribute that each sets."""
    found: dict[str, set[str]] = {}
    for verb in VERBS:
        for option, action in make_parser(verb).flags().items():
            if option.startswith("--") and not option.startswith("--no-"):
                found.setdefault(action.dest, set()).add(option)
    return found


def test_the_command_line_writes_them_as_flags() -> None:
    for name in named():
        expected = ARGUMENT_FLAGS.get(name) or "".join(flags().get(name, {f"`{name}`"}))
        assert one_line(f"what `{name}` is") == f"what {expected} is"


@pytest.mark.parametrize("name", sorted(ARGUMENT_FLAGS))
def test_arguments_with_another_name_than_their_flag_are_both_there(name: str) -> None:
    assert name.removesuffix("=False") in arguments()
    assert any(ARGUMENT_FLAGS[name] in make_parser(verb).flags() for verb in VERBS)
