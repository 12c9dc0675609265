"""YAML that strangers wrote: plain values in bounded time, or one kind of error."""

from typing import Any

import yaml

_MOST_CHARACTERS = 16 << 20
_MOST_VALUES = 1_000_000


def parse_yaml(
    text: str, loader: type[yaml.SafeLoader] | type[yaml.BaseLoader] | None = None
) -> Any:
    """The plain values that a YAML text holds; `loader` is `yaml.SafeLoader` unless given.

    Besides what is no YAML, refuses values that contain themselves or, written out in full, would
    be more than a million: a few lines of aliases can stand for more than a memory holds.

    Raises:
        yaml.YAMLError: whatever is wrong with it.
    """
    if len(text) > _MOST_CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text)} characters, at most {_MOST_CHARACTERS} are read")
    try:
        value = yaml.load(text, Loader=loader or yaml.SafeLoader)
        count = _written_out(value, {}, set())
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except (ValueError, OverflowError, TypeError) as error:  # a date or a number that cannot be
        raise yaml.YAMLError(" ".join(str(error).split())[:200]) from error
    if count > _MOST_VALUES:
        raise yaml.YAMLError(f"its aliases stand for more than {_MOST_VALUES} values")
    return value


def _written_out(value: Any, known: dict[int, int], above: set[int]) -> int:
    """How many values there are when every alias is replaced by what it stands for."""
    if not isinstance(value, dict | list | set | tuple):
        return 1
    if id(value) in above:
        raise yaml.YAMLError("a value contains itself")
    if id(value) not in known:
        above.add(id(value))
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_written_out(item, known, above) for item in inner)
        above.remove(id(value))
    return known[id(value)]
