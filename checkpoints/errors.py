"""Errors that the user can fix, each with the exit status of the command line.

Every message is one line: what was given, what is allowed and what to do. Arguments are named in
backticks; the command line shows them as flags.
"""

import difflib
from collections.abc import Iterable


def reason_of(error: BaseException, most: int = 200) -> str:
    """What a library's error says, as one line of at most `most` characters."""
    return " ".join(str(error).split())[:most] or type(error).__name__


class UserError(Exception):
    """Something that the user can fix. The command line prints it in one line."""

    exit_status = 1


class UsageError(UserError, ValueError):
    """A value that can never work: a number out of range, arguments that contradict each other."""

    exit_status = 2


class NonFiniteError(UserError):
    """A loss or an activation became NaN or infinite; nothing was updated with it."""


class Interrupted(UserError):
    """The user asked to stop, and the state was saved."""

    exit_status = 130


class LostProcess(UserError):
    """Another process of the run has ended, or does not answer."""


class SaidElsewhere(UserError):
    """The run has failed, and another process says why: there is nothing to print here."""


def meant(word: object, allowed: Iterable[str]) -> str:
    """` (did you mean X?)` for the nearest word of `allowed`; nothing where none is near."""
    near = difflib.get_close_matches(str(word).casefold(), list(allowed), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def none_of(name: str, allowed: Iterable[str], got: object) -> UsageError:
    """The error for a value that is none of the words that are allowed."""
    words = list(allowed)
    return UsageError(f"{name} must be one of {', '.join(words)}, got {got!r}{meant(got, words)}")
