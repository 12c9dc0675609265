"""Progress of a call from Python: one tqdm bar a stage, in a notebook or on a terminal.

A stage shorter than two seconds shows nothing. `TQDM_DISABLE=1` switches the bars off, and so does
`progress=no_progress` (`saesteer.sae.config`) for one call.
"""

import threading
from typing import Any

DELAY = 2.0


class Bars:
    """A `Progress` that draws bars; the present one ends when another stage begins."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""
        self._lock = threading.Lock()

    def __repr__(self) -> str:  # as the default of a parameter, in documentation
        return "show_progress"

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        with self._lock:
            if self._bar is not None and (stage != self._stage or done < self._bar.n):
                self._end()
            if self._bar is None:
                if done >= total:
                    return
                self._begin(stage, done, total, note)
            self._bar.update(done - self._bar.n)
            extra = note.partition(", ")[2]
            if extra:
                self._bar.set_postfix_str(extra, refresh=False)
            if done >= total:
                self._end()

    def _begin(self, stage: str, done: int, total: int, note: str) -> None:
        from tqdm.auto import tqdm

        unit = note.partition(", ")[0]
        self._stage = stage
        self._bar = tqdm(
            total=total, initial=done, desc=stage, unit=f" {unit}", unit_scale=total >= 10_000,
            delay=DELAY, leave=False,
        )  # fmt: skip

    def _end(self) -> None:
        self._bar.close()
        self._bar = None


show_progress = Bars()
"""What the public calls report to unless they are given another `progress`."""
