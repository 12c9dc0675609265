"""Time since the last log line, and how long model and trainer waited for each other."""

import time

from saesteer.sae.activations.prefetch import Prefetch


class Stopwatch:
    """Times the loop over batches, in wall-clock seconds."""

    def __init__(self, prefetch: Prefetch) -> None:
        self._prefetch = prefetch
        self._start = self._mark = time.monotonic()
        self._waited = 0.0
        self._tokens = 0

    def got_batch(self) -> None:
        """A batch has arrived; the time since the last step was spent waiting."""
        self._waited += time.monotonic() - self._mark

    def stepped(self, tokens: int) -> None:
        """A step on `tokens` tokens has ended."""
        self._tokens += tokens
        self._mark = time.monotonic()

    def take(self) -> dict[str, float]:
        """Figures since the last call.

        `stall_trainer`: share of the time in which the trainer waited for a batch.
        `stall_model`: share in which the model (or the reading of shards) waited for the trainer,
        with as many batches ready as may wait.
        """
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        taken = {
            "tokens_per_second": self._tokens / seconds,
            "stall_model": min(1.0, self._prefetch.take_stall() / seconds),
            "stall_trainer": self._waited / seconds,
            "seconds": seconds,
        }
        self._start, self._waited, self._tokens = now, 0.0, 0
        return taken
