"""Reads frozen dataclasses from YAML or JSON, strictly: one reader for every settings file."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from saesteer.checkpoints.errors import UserError

T = TypeVar("T")

_EXACT_FLOATS = 2**53

_WORDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
    NoneType: "null",
}


def read_fields(cls: type[T], data: object, where: str, error: type[Exception] = UserError) -> T:
    """An instance of a dataclass from the plain values that a YAML or JSON file holds.

    A field's annotation says what is allowed: int, float (a whole number that a float can hold is
    converted), str, bool, None, Any, object, `Literal`, unions, `tuple`, `list`, `dict` or
    `Mapping`, and dataclasses, one in another. Lists become tuples where a tuple is asked for. A
    bool is not a number. Fields with a default may be left out.

    Args:
        data: the file's content, as `yaml.safe_load` or `json.load` gives it.
        where: begins every error, such as the file's path.
        error: what is raised.

    Raises:
        error: an unknown key, a missing key, a value of a wrong type, or one that `__post_init__`
            refuses with ValueError or TypeError. One line: `where: key 'latents[2].id' must be
            ...`; items of a list are counted from 1.
    """
    made: T = _Reader(where, error).dataclass(cls, data, "")
    return made


class _Reader:
    """Reads values by their type annotations; `refuse` and `wrong` raise the errors."""

    def __init__(self, where: str, error: type[Exception]) -> None:
        self.where, self.error = where, error

    def refuse(self, what: str, cause: Exception | None = None) -> NoReturn:
        raise self.error(f"{self.where}: {what}") from cause

    def wrong(self, hint: Any, data: object, key: str) -> NoReturn:
        named = f"key {key!r}" if key else "the content"
        self.refuse(f"{named} must be {_allowed(hint)}, got {_shown(data)}")

    def dataclass(self, cls: Any, data: object, key: str) -> Any:
        if not isinstance(data, Mapping):
            self.wrong(cls, data, key)
        prefix = f"{key}." if key else ""
        known = {field.name: field for field in fields(cls) if field.init}
        for name in data:
            if name not in known:
                shown = _shown(f"{prefix}{name}")
                self.refuse(f"unknown key {shown}; allowed: {', '.join(known)}")
        needed = [
            name
            for name, field in known.items()
            if field.default is MISSING and field.default_factory is MISSING
        ]
        for name in needed:
            if name not in data:
                self.refuse(f"key {prefix + name!r} is missing; needed: {', '.join(needed)}")
        hints = get_type_hints(cls)
        values = {name: self.value(hints[name], data[name], f"{prefix}{name}") for name in data}
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            self.refuse(f"key {key!r}: {reason}" if key else reason, error)

    def value(self, hint: Any, data: object, key: str) -> Any:
        """`data` as the type that `hint` names."""
        origin, arguments = get_origin(hint), get_args(hint)
        if hint is Any or hint is object:
            return data
        if is_dataclass(hint):
            return self.dataclass(hint, data, key)
        if origin in (Union, UnionType):
            return self.union(hint, data, key)
        if not _fits(hint, data):
            self.wrong(hint, data, key)
        kind = origin or hint
        if kind is float:
            assert isinstance(data, int | float)
            return float(data)
        if kind in (tuple, list) and arguments:
            assert isinstance(data, Sequence)
            repeated = kind is list or arguments[-1] is Ellipsis
            hints = [arguments[0]] * len(data) if repeated else arguments
            items = [
                self.value(one, item, f"{key}[{number}]")
                for number, (one, item) in enumerate(zip(hints, data, strict=True), 1)
            ]
            return kind(items)
        if kind is tuple:
            assert isinstance(data, Sequence)
            return tuple(data)
        if _is_mapping(kind) and arguments:
            assert isinstance(data, Mapping)
            return {
                self.value(arguments[0], name, f"{key}.{name}"): self.value(
                    arguments[1], item, f"{key}.{name}"
                )
                for name, item in data.items()
            }
        return data

    def union(self, hint: Any, data: object, key: str) -> Any:
        """The first option whose outermost type is right."""
        for option in get_args(hint):
            if _fits(option, data):
                return self.value(option, data, key)
        self.wrong(hint, data, key)


def _fits(hint: Any, data: object) -> bool:
    """Whether a value is of a type; the items of a list or mapping are not looked at."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (Any, object):
        return True
    if hint is None or hint is NoneType:
        return data is None
    if origin in (Union, UnionType):
        return any(_fits(option, data) for option in arguments)
    if origin is Literal:
        return any(type(data) is type(option) and data == option for option in arguments)
    if is_dataclass(hint):
        return isinstance(data, Mapping)
    kind = origin or hint
    if kind is float:
        whole = isinstance(data, int) and not isinstance(data, bool) and abs(data) < _EXACT_FLOATS
        return whole or isinstance(data, float)
    if kind is int:
        return isinstance(data, int) and not isinstance(data, bool)
    if kind is tuple:
        fixed = arguments and arguments[-1] is not Ellipsis
        return isinstance(data, list | tuple) and (not fixed or len(data) == len(arguments))
    return isinstance(data, kind)


def _is_mapping(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Mapping)


def _allowed(hint: Any) -> str:
    """A description of what a type allows, for errors."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_allowed(option) for option in arguments))
    if origin is Literal:
        names = [option if isinstance(option, str) else repr(option) for option in arguments]
        return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    if is_dataclass(hint):
        return f"a mapping with {', '.join(field.name for field in fields(hint) if field.init)}"
    kind = origin or hint
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}"
    if _is_mapping(kind):
        return _WORDS[dict]
    return _WORDS.get(kind, f"a {getattr(kind, '__name__', kind)}")


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100


def _shown(value: object) -> str:
    """A value in an error message, in one line and cut where it grows long."""
    try:
        return _short.repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        return "a whole number too long to show"
