"""Errors of the server, in the form that OpenAI's clients read, and fields read with them."""

from collections.abc import Iterable, Mapping
from typing import Any

from saesteer.checkpoints.errors import meant

_SHOWN = 60


class ApiError(Exception):
    """An answer with an error status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The document that is sent."""
        # What came is quoted, and may hold half of a surrogate pair, which no UTF-8 can be made of.
        message = str(self).encode("utf-8", errors="backslashreplace").decode("utf-8")
        return {
            "error": {
                "message": message,
                "type": _type(self.status),
                "param": self.param and self.param.encode("utf-8", "backslashreplace").decode(),
                "code": self.code,
            }
        }


def _type(status: int) -> str:
    named = {
        401: "authentication_error",
        403: "permission_error",
        429: "rate_limit_error",
        504: "timeout_error",
    }
    return named.get(status, "invalid_request_error" if status < 500 else "server_error")


def shown(value: object) -> str:
    """A value in a message, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def wrong(param: str, allowed: str, got: object) -> ApiError:
    """The error for a field whose value cannot be."""
    return ApiError(400, f"'{param}' must be {allowed}, got {shown(got)}", param=param)


class Fields:
    """The fields of a JSON object, read one by one; null counts as not given.

    Every method raises ApiError 400, which names the field, what is allowed and what came.
    """

    def __init__(self, document: Mapping[str, Any], known: Iterable[str], where: str = "") -> None:
        self._document, self._where = document, where
        allowed = list(known)
        for name in document:
            if name not in allowed:
                field = f"{where}{name}"
                raise ApiError(
                    400,
                    f"unknown field '{field}'{meant(name, allowed)}: known are "
                    f"{', '.join(sorted(allowed))}",
                    param=field,
                )

    def name(self, field: str) -> str:
        """The field as messages name it."""
        return f"{self._where}{field}"

    def raw(self, field: str) -> Any:
        """The value as it came."""
        return self._document.get(field)

    def has(self, field: str) -> bool:
        """Whether it was given."""
        return self._document.get(field) is not None

    def boolean(self, field: str, default: bool = False) -> bool:
        """true or false."""
        value = self.raw(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong(self.name(field), "true or false", value)
        return value

    def whole(self, field: str, low: int, high: int, default: int | None = None) -> int | None:
        """An integer in low..high."""
        value = self.raw(field)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise wrong(self.name(field), f"an integer in {low}..{high}", value)
        return value

    def number(
        self, field: str, low: float, high: float, default: float | None = None
    ) -> float | None:
        """A number in [low, high]."""
        value = self.raw(field)
        if value is None:
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            raise wrong(self.name(field), f"a number in [{low:g}, {high:g}]", value)
        return float(value)

    def text(self, field: str, default: str | None = None) -> str | None:
        """A string."""
        value = self.raw(field)
        if value is None:
            return default
        if not isinstance(value, str):
            raise wrong(self.name(field), "a string", value)
        return value

    def mapping(self, field: str) -> Mapping[str, Any] | None:
        """An object."""
        value = self.raw(field)
        if value is not None and not isinstance(value, dict):
            raise wrong(self.name(field), "an object", value)
        return value
