"""How long a grid will take, told from its first batches."""

import time

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.patching.engine import Batch

_TIMED_BATCHES = 3


class GridClock:
    """Predicts the time of a grid from its first batches, and refuses one over the budget."""

    def __init__(self, work: int, n_layers: int, budget_minutes: float) -> None:
        self.work, self.n_layers, self.budget = work, n_layers, budget_minutes
        self.batches = self.done = 0
        self.seconds = 0.0
        self._last = time.perf_counter()

    def start(self) -> None:
        """Count time from now on."""
        self._last = time.perf_counter()

    def tick(self, batch: Batch) -> None:
        """A batch has run. Raises UsageError when three of them predict more than the budget."""
        now = time.perf_counter()
        self.seconds += now - self._last
        self._last = now
        self.batches += 1
        self.done += batch.work(self.n_layers)
        if self.batches == _TIMED_BATCHES and self.minutes() > self.budget:
            raise UsageError(
                f"this grid takes about {self.minutes():.0f} minutes, over `budget_minutes` "
                f"{self.budget:g}: give fewer layers, positions or pairs, a `fast` shortcut, or a "
                "larger budget"
            )

    def minutes(self) -> float:
        """Predicted minutes of the whole grid."""
        return self.seconds / max(1, self.done) * self.work / 60

    def note(self) -> str:
        """What progress shows."""
        return f", about {self.minutes():.1f} min in all" if self.batches else ""
