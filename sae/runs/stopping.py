"""Ctrl-C as a question: long work asks after each step whether to stop, and saves first."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

GRACE_SECONDS = 60.0
"""How long the work may take to save and leave once it was asked to."""


@contextlib.contextmanager
def stop_requests(grace_seconds: float = GRACE_SECONDS) -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a question asked after each step; a second one kills at once.

    When the block has not been left `grace_seconds` after the first, the signal comes again by
    itself: what is on disk by then is whole, and a scheduler that would kill the process soon is
    not kept waiting. Outside the main thread, where Python delivers no signals, the answer is
    always no.
    """
    asked = False
    timer: threading.Timer | None = None

    def on_signal(number: int, frame: Any) -> None:
        nonlocal asked, timer
        asked = True
        signal.signal(number, previous[number])
        if timer is None:
            timer = threading.Timer(grace_seconds, _send_again, [number])
            timer.daemon = True
            timer.start()

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # None stands for a handler that was not installed from Python and cannot be put back.
            previous[number] = signal.signal(number, on_signal) or signal.SIG_DFL
    try:
        yield lambda: asked
    finally:
        if timer is not None:
            timer.cancel()
        for which, handler in previous.items():
            signal.signal(which, handler)


def _send_again(number: int) -> None:
    """To the main thread, so that a system call in which it hangs is interrupted too."""
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, number)
    else:
        signal.raise_signal(number)
