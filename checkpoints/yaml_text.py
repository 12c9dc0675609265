"""Reading untrusted YAML: plain values in bounded time, or a `yaml.YAMLError`."""

from typing import Any

import yaml

from saesteer.checkpoints.errors import reason_of

_MOST_CHARACTERS = 16 << 20
_MOST_VALUES = 1_000_000


def parse_yaml(
    text: str, loader: type[yaml.SafeLoader] | type[yaml.BaseLoader] | None = None
) -> Any:
    """The plain values that a YAML text holds; `loader` is `yaml.SafeLoader` unless given.

    Also refuses values that contain themselves, and documents whose aliases expand to more than a
    million values: a few lines of aliases can expand to more than fits in memory.

    Raises:
        yaml.YAMLError: it is not valid YAML, or is refused as above.
    """
    if len(text) > _MOST_CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text)} characters, at most {_MOST_CHARACTERS} are read")
    try:
        value = yaml.load(text, Loader=loader or yaml.SafeLoader)
        count = _written_out(value, {}, set())
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except (ValueError, OverflowError, TypeError) as error:  # a date or a number that cannot be
        raise yaml.YAMLError(reason_of(error)) from error
    if count > _MOST_VALUES:
        raise yaml.YAMLError(f"its aliases stand for more than {_MOST_VALUES} values")
    return value


def _written_out(value: Any, known: dict[int, int], above: set[int]) -> int:
    """How many values there are when every alias is expanded."""
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
