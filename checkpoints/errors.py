"""Errors that the user can fix, each with the exit status of the command line.

Every message is one line: what was given, what is allowed and what to do. Arguments are named in
backticks; the command line shows them as flags.
"""


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
