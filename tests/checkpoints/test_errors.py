"""The exit status that the command line takes from each error."""

import pytest

from saesteer.checkpoints.errors import Interrupted, NonFiniteError, UsageError, UserError


@pytest.mark.parametrize(
    ("kind", "status"),
    [(UserError, 1), (UsageError, 2), (NonFiniteError, 1), (Interrupted, 130)],
)
def test_exit_status(kind: type[UserError], status: int) -> None:
    error = kind("one line")
    assert error.exit_status == status
    assert isinstance(error, UserError)


def test_a_usage_error_is_a_value_error_for_python_callers() -> None:
    with pytest.raises(ValueError, match="one line"):
        raise UsageError("one line")
