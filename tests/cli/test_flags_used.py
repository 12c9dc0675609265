"""No flag is listed in a verb's help that the verb does not use."""

import argparse
import ast
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from saesteer.cli.__main__ import VERBS, make_parser

CLI = Path(__file__).resolve().parents[2] / "cli"
EVERYWHERE = {"help", "config", "verbose", "threads"}
"""Read by the parser and by `main`."""


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((CLI / f"{name}.py").read_text(encoding="utf-8"))


def read_by(node: ast.AST) -> set[str]:
    """Names of flags that code may read: `args.NAME`, names in strings, fields of a config."""
    found: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            if part.value.id == "args":
                found.add(part.attr)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            found.add(part.value.removeprefix("--").replace("-", "_"))
    return found


def configs_of(node: ast.AST) -> set[str]:
    """The classes in `given(args, CLASS)`."""
    return {
        part.args[1].id
        for part in ast.walk(node)
        if isinstance(part, ast.Call)
        and getattr(part.func, "id", None) == "given"
        and len(part.args) > 1
        and isinstance(part.args[1], ast.Name)
    }


def helpers_of(node: ast.AST) -> set[str]:
    """Functions of the other modules that are called with `args`."""
    return {
        part.func.id
        for part in ast.walk(node)
        if isinstance(part, ast.Call)
        and isinstance(part.func, ast.Name)
        and any(isinstance(one, ast.Name) and one.id == "args" for one in part.args)
    }


def code_of(verb: str) -> ast.Module:
    """A verb's module without `add_flags`, which only lists them."""
    kept = [n for n in tree(verb).body if getattr(n, "name", "") != "add_flags"]
    return ast.Module(body=kept, type_ignores=[])


def used(verb: str) -> set[str]:
    code = code_of(verb)
    found = read_by(code)
    module = import_module(f"saesteer.cli.{verb}")
    for name in configs_of(code):
        config = getattr(module, name, None) or _imported(code, name)
        assert is_dataclass(config)
        found |= {field.name for field in fields(config)}
    for name in helpers_of(code):
        for other in ("inputs", "progress", "rank_report", "steer_output", "output", "flags"):
            for node in tree(other).body:
                if getattr(node, "name", None) == name:
                    found |= read_by(node)
    return found


def _imported(code: ast.Module, name: str) -> object:
    """A class that is imported inside a function."""
    for part in ast.walk(code):
        if isinstance(part, ast.ImportFrom) and any(one.name == name for one in part.names):
            return getattr(import_module(str(part.module)), name)
    raise AssertionError(f"{name} is imported nowhere")


@pytest.mark.parametrize("verb", VERBS)
def test_every_listed_flag_is_used(verb: str) -> None:
    listed = {
        action.dest for action in make_parser(verb)._actions if action.help != argparse.SUPPRESS
    }
    assert listed - used(verb) <= EVERYWHERE


def test_flags_of_every_verb_are_taken_where_they_are_not_listed() -> None:
    for verb in ("push", "doctor", "grade", "toy", "reproduce"):
        make_parser(verb).read(["--seed", "3", "--device", "cpu", "--dtype", "float32"])
