"""What stands before every request: its size, the key, and whether a strange page sends it."""

import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.requests import Request

from saesteer.steering.serving.config import LOOPBACK, ServeConfig
from saesteer.steering.serving.routes.api_errors import ApiError, shown

OPEN_PATHS = ("/", "/health", "/playground.js", "/playground.css", "/favicon.ico")
"""Paths that need no key: they hold nothing of the model."""


def check_request(request: Request, config: ServeConfig) -> None:
    """Raise ApiError for a request that is not to be answered.

    A page of another site can make a browser send requests to this machine's own addresses. It
    cannot give the key; where there is none, its `Origin`, and the `Host` of a name that was
    pointed here, tell it apart.
    """
    headers = request.headers
    if config.is_loopback:
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if not (host in LOOPBACK or host.startswith("127.")):
            raise ApiError(
                403, f"this server answers on this machine alone, and the host was {shown(host)}"
            )
    if config.api_key is None:
        _check_origin(headers)
    elif request.url.path not in OPEN_PATHS:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        ours = config.api_key.encode()
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), ours):
            came = "none" if not key else "another one"
            raise ApiError(
                401,
                f"a request needs the server's key as `Authorization: Bearer KEY`, got {came}",
                code="invalid_api_key",
            )


def _check_origin(headers: Mapping[str, str]) -> None:
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        raise ApiError(
            403,
            f"a page of {shown(origin)} may not use this server: open its own page, or start the "
            "server with `api_key`",
        )


async def read_body(request: Request, most: int) -> bytes:
    """The body. Raises ApiError 413 for one of more than `most` bytes."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise ApiError(413, f"the body has more than {most} bytes: shorten the prompt")
        parts.append(part)
    return b"".join(parts)
