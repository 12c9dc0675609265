"""Ctrl-C sets a flag: long work checks it after each step, saves its state and stops."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

GRACE_SECONDS = 60.0
"""How long the work may take to save and stop after the first signal."""


@contextlib.contextmanager
def stop_requests(grace_seconds: float = GRACE_SECONDS) -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a flag, which the yielded function reads; a second signal kills.

    If the block is still running `grace_seconds` after the first signal, the signal is sent again
    and ends the process: files on disk are whole at any moment, and a scheduler that would kill the
    process soon is not kept waiting. Outside the main thread, where Python delivers no signals, the
    flag is never set.
    """
    requested = False
    timer: threading.Timer | None = None

    def on_signal(number: int, frame: Any) -> None:
        nonlocal requested, timer
        requested = True
        signal.signal(number, previous[number])
        if timer is None:
            timer = threading.Timer(grace_seconds, _send_again, [number])
            timer.daemon = True
            timer.start()

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # None means a handler that was not installed from Python and cannot be restored.
            previous[number] = signal.signal(number, on_signal) or signal.SIG_DFL
    try:
        yield lambda: requested
    finally:
        if timer is not None:
            timer.cancel()
        for which, handler in previous.items():
            signal.signal(which, handler)


def _send_again(number: int) -> None:
    """Send a signal to the main thread, which also interrupts a system call that hangs."""
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, number)
    else:
        signal.raise_signal(number)
