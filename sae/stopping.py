"""Ctrl-C as a question: long work asks after each step whether to stop, and saves first."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a question asked after each step; a second one kills at once.

    Outside the main thread, where Python delivers no signals, the answer is always no.
    """
    asked = False

    def on_signal(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # None stands for a handler that was not installed from Python and cannot be put back.
            previous[number] = signal.signal(number, on_signal) or signal.SIG_DFL
    try:
        yield lambda: asked
    finally:
        for which, handler in previous.items():
            signal.signal(which, handler)
