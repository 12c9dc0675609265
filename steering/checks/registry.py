"""The verdicts of checks, and the table of checks by the names that task files use."""

from collections.abc import Callable
from enum import Enum
from typing import Any

from saesteer.checkpoints.errors import UsageError, meant
from saesteer.steering.checks.words import without_thinking


class Verdict(Enum):
    """The verdict of a check on one reply. Only PASS counts as success."""

    PASS = "pass"
    FAIL = "fail"
    UNDETERMINED = "undetermined"


Check = Callable[..., Verdict]
CHECKS: dict[str, Check] = {}
"""The checks by name, as task files name them."""


def check(name: str) -> Callable[[Check], Check]:
    """Decorator that adds a check to `CHECKS` under a name."""

    def register(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return register


def run_check(name: str, output: str, source: str, **arguments: Any) -> Verdict:
    """Run the check called `name` on the answer; thoughts before it are no part of it.

    Raises `UsageError` for a name or argument that cannot work.
    """
    if name not in CHECKS:
        known = sorted(CHECKS)
        raise UsageError(
            f"unknown check {name!r}{meant(name, known)}: the checks are {', '.join(known)}"
        )
    return CHECKS[name](without_thinking(output), source, **arguments)


def need_whole(name: str, value: object, least: int) -> None:
    """Raise UsageError unless a check's argument is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} must be a whole number from {least}, got {value!r}")
