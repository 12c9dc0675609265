"""Settings of a server."""

import re
from dataclasses import dataclass

from saesteer.checkpoints.errors import UsageError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Where a server listens, and how much it takes on at a time."""

    host: str = "127.0.0.1"
    """Address to listen at. Anything but this machine's own needs `api_key`."""
    port: int = 8000
    """Port to listen at; 0 takes one that is free."""
    api_key: str | None = None
    """What requests have to bring as `Authorization: Bearer KEY`."""
    max_batch: int = 32
    """Answers that are generated at the same time."""
    queue: int = 256
    """Requests that may wait; further ones are refused with status 429."""
    cache_tokens: int = 131072
    """Tokens, padding included, that the caches of all rows may hold."""
    prefill_tokens: int = 8192
    """Prompt tokens, padding included, of one pass; a longer prompt has a pass of its own."""
    max_new_tokens: int = 1024
    """Longest answer; the length of a chat's answer where the request names none."""
    deadline: float = 300.0
    """Seconds after its arrival in which a request has to be answered."""
    body_bytes: int = 2**20
    """Largest body of a request."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "cache_tokens", "prefill_tokens", "max_new_tokens", "body_bytes"):
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.queue < 0:
            raise UsageError(f"`queue` must be at least 0, got {self.queue}")
        if not 0 <= self.port <= 65535:
            raise UsageError(f"`port` must be in 0..65535, got {self.port}")
        if not 0 < self.deadline < float("inf"):
            raise UsageError(f"`deadline` must be a number of seconds above 0, got {self.deadline}")
        if self.api_key is not None and not self.api_key.strip():
            raise UsageError("`api_key` is empty: give a key, or leave it out")
        if not self.is_loopback and self.api_key is None:
            raise UsageError(
                f"`host` {self.host} can be reached from other machines: give `api_key` too, or "
                f"listen at {LOOPBACK[0]}"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK or self.host.startswith("127.")


def check_plan_name(name: str) -> None:
    """Raise UsageError for a name that could not be a part of a model's name in a request."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(
            "the name of a plan is made of letters, digits, dots, dashes and underscores, got "
            f"{name!r}"
        )
