"""Saves states in the background: the run waits while they are copied, not while they are written.

One thread writes at a time. `ready` says whether a periodic save may start: not while another is
being written, nor so soon that copying would take more than a hundredth of the run's time.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from saesteer.checkpoints import files
from saesteer.checkpoints.durable import Cancelled
from saesteer.checkpoints.run_state import save_state

if TYPE_CHECKING:
    from torch import Tensor
else:  # importing torch takes seconds, and callers that pass tensors have done so
    Tensor = Any

_MOST_SHARE = 0.01


class StateSaver:
    """Saves the states of one run in `folder/state`, as `run_state.save_state` does.

    A context manager: leaving it waits for the last write, except when the block was interrupted
    (Ctrl-C twice, exit): then the write is cancelled and the state before it stays. Call all
    methods from one thread.

    Args:
        folder: of the run.
        keep: how many of the newest states are kept; the best one is kept as well.
    """

    def __init__(self, folder: str | Path, *, keep: int = 1) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self.saved = 0
        """States on disk since the start."""
        self.blocked_seconds = 0.0
        """How long the run waited in `save`, `save_now` and `wait`."""
        self._cost = 0.0
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._give_up = threading.Event()

    def ready(self) -> bool:
        """Whether a periodic save may start now. Raises what the last one failed with."""
        if self._thread is not None and self._thread.is_alive():
            return False
        self._join()
        return self._cost <= _MOST_SHARE * (time.monotonic() - self._last)

    def save(
        self,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        *,
        score: float | None = None,
        first: Sequence[Path] = (),
    ) -> None:
        """Copy a state to the host's memory and start to write it; returns before it is written.

        The arguments are those of `save_state`; tensors may change as soon as this returns. First
        waits for the previous write, and raises the error that it failed with.
        """
        started = time.monotonic()
        try:
            self._join()
            copies = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
            options = {"meta": files.plain(meta), "score": score, "first": list(first)}
            self._thread = threading.Thread(
                target=self._write, args=(copies,), kwargs=options, name="save-state", daemon=True
            )
            self._thread.start()
        finally:
            self._last = time.monotonic()
            self._cost = self._last - started
            self.blocked_seconds += self._cost

    def save_now(
        self,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        *,
        score: float | None = None,
        first: Sequence[Path] = (),
    ) -> None:
        """Write a state and return when it is durable; cancels an older one that is being written.

        For a run that ends here: nothing is copied.
        """
        started = time.monotonic()
        try:
            self._stop_writing()
            save_state(self.folder, tensors, meta, keep=self.keep, score=score, first=first)
            self.saved += 1
        finally:
            self.blocked_seconds += time.monotonic() - started

    def wait(self) -> None:
        """Return when the last state is durable. Raises what its write failed with."""
        started = time.monotonic()
        try:
            self._join()
        finally:
            self.blocked_seconds += time.monotonic() - started

    def __enter__(self) -> "StateSaver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):
            if self._thread is not None:  # the error being raised is the one to report
                self._thread.join()
        else:
            self._stop_writing()

    def _write(self, tensors: dict[str, Tensor], **options: Any) -> None:
        try:
            save_state(
                self.folder, tensors, keep=self.keep, cancelled=self._give_up.is_set, **options
            )
            self.saved += 1
        except Cancelled:
            pass
        except BaseException as error:  # raised again where the run asks
            self._failure = error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _stop_writing(self) -> None:
        """Cancel a write in progress and forget its error: a newer state follows, or none."""
        if self._thread is not None:
            self._give_up.set()
            self._thread.join()
            self._thread = None
            self._give_up.clear()
        self._failure = None
