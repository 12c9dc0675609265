"""The types of flag values: from the text on the command line, or in a config file, to a value."""

import argparse
import math
import re
from collections.abc import Iterable
from pathlib import Path

_DTYPES = {
    "auto": "auto",
    **{name: "float32" for name in ("float32", "fp32", "f32")},
    **{name: "bfloat16" for name in ("bfloat16", "bf16")},
    **{name: "float16" for name in ("float16", "fp16", "f16")},
}


_THOUSANDS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}


def count(text: str) -> int:
    """A whole number; `200k`, `1.5M`, `2e6` and `1_000_000` are understood."""
    if re.fullmatch(r"[+-]?\d[\d_]*", text.strip()):
        return int(text.replace("_", ""))
    found = re.fullmatch(r"([+-]?\d*\.?\d+(?:e[+]?\d+)?)([kKmMgG]?)", text.strip())
    if found:
        value = float(found[1]) * _THOUSANDS[found[2].lower()]
        if value == round(value):
            return round(value)
    raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")


def count_or_auto(text: str) -> int:
    """A whole number, or 0 for `auto`."""
    if text.strip().lower() == "auto":
        return 0
    value = count(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, or auto, got {text!r}")
    return value


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
    return value


def seed(text: str) -> int:
    """A whole number that is not negative."""
    value = count(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text!r}")
    return value


def counts(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them: `1024,4096`."""
    return _distinct(count(part) for part in _parts(text))


def numbers(text: str) -> tuple[float, ...]:
    """Finite numbers with commas between them: `0.3,0.6`."""
    return tuple(number(part) for part in _parts(text))


def one_layer(text: str) -> int:
    """A block index; negative counts from the end."""
    if not re.fullmatch(r"[+-]?\d+", text.strip()):
        raise argparse.ArgumentTypeError(f"must be one block index such as 20 or -1, got {text!r}")
    return int(text)


def layers(text: str) -> tuple[int, ...]:
    """Block indices: `10,20`, `8-12` (both ends included), `-1` (from the end), `-4--1`."""
    found: list[int] = []
    for part in _parts(text):
        match = re.fullmatch(r"(-?\d+)(?:-(-?\d+))?", part)
        if not match:
            raise argparse.ArgumentTypeError(
                f"must be block indices such as 20, 10,20, 8-12 or -1, got {text!r}"
            )
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if (first < 0) != (last < 0) or last < first:
            raise argparse.ArgumentTypeError(
                f"has a range {part!r} that does not go upwards: write 8-12 or -4--1"
            )
        found += range(first, last + 1)
    return _distinct(found)


def names(text: str) -> tuple[str, ...]:
    """Words with commas between them."""
    return tuple(_parts(text))


def folders(text: str) -> tuple[str, ...]:
    """Folders with commas between them; one whose name holds a comma is taken as it is."""
    return (text,) if Path(text).expanduser().exists() else tuple(_parts(text))


def latents(text: str) -> str:
    """`ID:VALUE,ID:VALUE`, kept as text: `steering.plans.plan.parse_latents` reads it."""
    return text.strip()


def dtype(text: str) -> str:
    """The name of a float type, `auto` included."""
    if text.lower() not in _DTYPES:
        raise argparse.ArgumentTypeError(
            f"must be auto, float32, bfloat16 or float16, got {text!r}"
        )
    return _DTYPES[text.lower()]


def stored_dtype(text: str) -> str:
    """The name of a float type to store."""
    if text.lower() == "auto" or text.lower() not in _DTYPES:
        raise argparse.ArgumentTypeError(f"must be float32, bfloat16 or float16, got {text!r}")
    return _DTYPES[text.lower()]


def grid(text: str) -> tuple[str, tuple[str, ...]]:
    """`AXIS=V,V` of a sweep; a value may be FROM:TO:STEP, both ends included."""
    axis, equals, values = text.partition("=")
    if not equals or not axis.strip():
        raise argparse.ArgumentTypeError(f"must be AXIS=VALUE,... such as k=1,5,15, got {text!r}")
    found: list[str] = []
    for part in _parts(values):
        ends = re.fullmatch(r"(-?[\d.]+):(-?[\d.]+):([\d.]+)", part)
        found += [part] if ends is None else _range(*ends.groups())
    return axis.strip(), tuple(dict.fromkeys(found))


def _range(first: str, last: str, step: str) -> list[str]:
    low, high, width = number(first), number(last), number(step)
    if width <= 0 or high < low or (high - low) / width > 1000:
        raise argparse.ArgumentTypeError(
            f"has a range {first}:{last}:{step} that does not go upwards in steps above 0"
        )
    return [f"{low + width * i:.10g}" for i in range(math.floor((high - low) / width + 1e-9) + 1)]


def rounds(text: str) -> tuple[tuple[int, int], ...]:
    """`CONTENTS:KEPT,...`: the rounds of a race."""
    found = []
    for part in _parts(text):
        match = re.fullmatch(r"(\d+):(\d+)", part)
        if not match or not int(match[1]) or not int(match[2]):
            raise argparse.ArgumentTypeError(
                f"must be CONTENTS:KEPT,... such as 12:4,40:1, got {text!r}"
            )
        found.append((int(match[1]), int(match[2])))
    return tuple(found)


def budget(text: str) -> tuple[str, float]:
    """`kl=0.5` or `ce=0.5`."""
    kind, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be kl=NATS or ce=NATS, got {text!r}")
    return kind.strip(), number(value)


LISTS = (counts, numbers, layers, names, latents, folders)
"""Types whose values may be written as a YAML list in a config file."""


def _parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"has an empty item in {text!r}")
    return parts


def _distinct(values: Iterable[int]) -> tuple[int, ...]:
    found = tuple(values)
    twice = sorted({value for value in found if found.count(value) > 1})
    if twice:
        raise argparse.ArgumentTypeError(f"names {twice[0]} twice")
    return found
