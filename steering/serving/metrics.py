"""Figures of a running server, in the form that Prometheus reads."""

from typing import TYPE_CHECKING, Any

from saesteer.steering.serving.engine import Observer

if TYPE_CHECKING:
    from saesteer.steering.serving.engine import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Figures(Observer):
    """Counters and histograms of one server, in a registry of its own."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "saesteer"}
        self.requests = Counter(
            "http_requests", "Requests, by path and status.", ["path", "status"], **own
        )
        self.refused = Counter("refused_requests", "Requests that the full queue refused.", **own)
        self._ended = Counter(
            "generations", "Requests of the engine, by how they ended.", ["how"], **own
        )
        self._prompt_tokens = Counter("prompt_tokens", "Tokens of prompts that were run.", **own)
        self._new_tokens = Counter("new_tokens", "Tokens that were generated.", **own)
        self._rows = Histogram("pass_rows", "Rows of a pass over new tokens.", buckets=_ROWS, **own)
        self._seconds = Histogram(
            "pass_seconds", "Time of a pass, by kind.", ["kind"], buckets=_SECONDS, **own
        )
        self._waits = Histogram("wait_seconds", "Time in the queue.", buckets=_SECONDS, **own)
        self.first_tokens = Histogram(
            "first_token_seconds",
            "Time from a request to its first token.",
            buckets=_SECONDS,
            **own,
        )
        self.answers = Histogram(
            "answer_seconds", "Time from a request to its end.", buckets=_SECONDS, **own
        )

    def watch(self, engine: "Engine") -> None:
        """Show how much an engine has to do."""
        from prometheus_client import Gauge

        own: dict[str, Any] = {"registry": self.registry, "namespace": "saesteer"}
        Gauge("running_rows", "Answers being generated.", **own).set_function(
            lambda: engine.running
        )
        Gauge("waiting_rows", "Answers that wait.", **own).set_function(lambda: engine.waiting)

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)

    def pass_done(self, rows: int, tokens: int, seconds: float, prompts: bool) -> None:
        """See `Observer`."""
        self._seconds.labels("prompts" if prompts else "tokens").observe(seconds)
        self._new_tokens.inc(rows)
        if prompts:
            self._prompt_tokens.inc(tokens)
        else:
            self._rows.observe(rows)

    def request_begun(self, waited: float) -> None:
        """See `Observer`."""
        self._waits.observe(waited)

    def request_ended(self, how: str) -> None:
        """See `Observer`."""
        self._ended.labels(how).inc()
