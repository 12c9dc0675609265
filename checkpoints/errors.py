"""The errors a person can mend, told apart by what the command line should exit with.

Every message says what came, what is allowed and what to do, in one line, and names the flag.
"""


class UserError(Exception):
    """Something the person running the tool can mend. The command line prints it in one line."""

    exit_status = 1


class UsageError(UserError, ValueError):
    """A value that can never work: a wrong flag, a number out of range, flags that contradict."""

    exit_status = 2


class NonFiniteError(UserError):
    """A loss or an activation became NaN or infinite; nothing was updated with it."""


class Interrupted(UserError):
    """The person asked to stop and the state was saved."""

    exit_status = 130
