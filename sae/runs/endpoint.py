"""A chat model behind an OpenAI-compatible endpoint. Nothing is sent unless an address is given."""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saesteer.checkpoints.errors import UsageError, UserError


@dataclass(frozen=True)
class ChatEndpoint:
    """Where a chat model answers, and how long it is waited for."""

    url: str
    """Base address, such as http://127.0.0.1:8000/v1; `/chat/completions` is added."""
    model: str
    """Name of the model, as the endpoint knows it."""
    setting: str
    """The argument that the address was given as, for errors."""
    key_variable: str
    """Environment variable with the API key, for endpoints that need one."""
    timeout: float = 60.0
    """Seconds for one answer."""
    waits: tuple[float, ...] = (1.0, 4.0, 15.0)
    """Seconds before each further try, where the endpoint is busy or broke off; what it asks for
    itself (Retry-After) counts, up to a minute."""

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/\s]+", self.url):
            raise UsageError(
                f"`{self.setting}` must be the address of an OpenAI-compatible endpoint such as "
                f"http://127.0.0.1:8000/v1, got {self.url!r}"
            )

    def ask(self, messages: Sequence[Mapping[str, str]], max_tokens: int) -> str:
        """The answer to a chat, greedy; empty where the model said nothing.

        Raises UserError when the endpoint cannot be reached, answers with an error, or with
        something else than an answer.
        """
        body = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        document = self._ask(body)
        try:
            text = document["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise UserError(
                f"`{self.setting}` {self.url} sent no choices[0].message.content: is it an "
                "OpenAI-compatible endpoint?"
            ) from None
        return text if isinstance(text, str) else ""

    def _ask(self, body: dict[str, Any]) -> Any:
        for wait in self.waits:
            try:
                return self._post(body)
            except _BusyError as error:
                asked = error.retry_after
                time.sleep(wait if asked is None else min(asked, 60.0))
        return self._post(body)

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions",
            data=json.dumps(body).encode(),
            headers=headers,
        )
        what = f"`{self.setting}` {self.url}"
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            hint = f"; set {self.key_variable}" if error.code in (401, 403) else ""
            message = f"{what} answered HTTP {error.code}{_reason(error)}{hint}"
            if error.code in (408, 425, 429) or error.code >= 500:
                raise _BusyError(message, error.headers.get("Retry-After")) from error
            raise UserError(message) from error
        except (OSError, ValueError) as error:
            message = f"{what} cannot be used ({error}): check the address"
            cause = getattr(error, "reason", error)
            if isinstance(cause, TimeoutError | ConnectionResetError):
                raise _BusyError(message) from error
            raise UserError(message) from error


class _BusyError(UserError):
    """An endpoint that may answer a later try."""

    def __init__(self, message: str, retry_after: str | None = None) -> None:
        super().__init__(message)
        given = (retry_after or "").strip()
        self.retry_after = float(given) if given.isascii() and given.isdigit() else None


def _reason(error: urllib.error.HTTPError) -> str:
    """What the endpoint itself says of an error, in brackets; nothing where it says nothing."""
    try:
        text = error.read(4096).decode("utf-8", "replace")
    except OSError:
        return ""
    try:
        document = json.loads(text)
        found = document.get("error", document) if isinstance(document, dict) else document
        text = found.get("message", "") if isinstance(found, dict) else found
    except ValueError:
        text = re.sub(r"<[^>]*>", " ", text)  # a page of a server in between
    said = " ".join(str(text or "").split())[:300]
    return f" ({said})" if said else ""
