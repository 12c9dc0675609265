"""How processes that run together end when one of them fails: all of them, and with one line.

A process that fails leaves its reason in the store that torchrun keeps, and ends. The others lose
their connection to it at once, find the reason and end without a word. Where there is none, because
the process was killed, one of those that are left says which ones are missing.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

from saesteer.checkpoints.errors import (
    Interrupted,
    LostProcess,
    SaidElsewhere,
    UserError,
    reason_of,
)
from saesteer.sae.runs.processes import Processes

# How long those that are left wait for the reason, and for each other's sign of life.
_GRACE_SECONDS = 1.5
_VOICE = "voice"


@contextlib.contextmanager
def one_voice(processes: Processes) -> Iterator[None]:
    """Run the block; of several processes that fail in it, one raises an error that names the
    process and the cause, and the others SaidElsewhere."""
    if processes.world == 1 or processes.store is None:
        yield
        return
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        _ignore_termination()
        raise _as_one(processes, error) from error


def _as_one(processes: Processes, error: BaseException) -> BaseException:
    """What this process raises in place of `error`."""
    if isinstance(error, SaidElsewhere):
        # Where that process was killed meanwhile, nobody would say anything.
        with contextlib.suppress(RuntimeError, OSError):
            return error if _wait_for_reason(processes) else _after_loss(processes)
        return error
    if isinstance(error, LostProcess):
        return _after_loss(processes)
    if not _claim(processes, reason_of(error)):
        return SaidElsewhere("another process says why")
    if isinstance(error, Interrupted) or not isinstance(error, UserError):
        return error
    return type(error)(f"process {processes.rank} of {processes.world}: {error}")


def _after_loss(processes: Processes) -> UserError:
    """The connection to another process is gone: does anybody say why?"""
    silent = SaidElsewhere("another process says why")
    try:
        processes.store.set(f"here-{processes.rank}", "yes")
        if _wait_for_reason(processes):
            return silent
        ranks = range(processes.world)
        missing = [r for r in ranks if not processes.store.check([f"here-{r}"])]
        if not _claim(processes, "lost"):
            return silent
    except (RuntimeError, OSError):
        # Without torchrun the first process holds the store, and took it along.
        if processes.rank != 1:
            return silent
        return LostProcess(
            f"process 0 of {processes.world} has ended; what it said, if anything, is above: what "
            "is in `out` stays good; run the same command with `resume`"
        )
    if not missing:
        return LostProcess(
            f"the {processes.world} processes lost each other for a while (longer than "
            f"{processes.timeout} s, or the network failed): run the same command with `resume`"
        )
    which = ", ".join(map(str, missing))
    return LostProcess(
        f"process {which} of {processes.world} ended without a word, or did not answer within "
        f"{processes.timeout} s (killed, out of memory, or its machine failed): what is in `out` "
        "stays good; run the same command with `resume`"
    )


def _claim(processes: Processes, reason: str) -> bool:
    """Whether this process is the one that speaks."""
    own = f"{processes.rank} {reason}"
    try:
        return bool(processes.store.compare_set(_VOICE, "", own).decode() == own)
    except (RuntimeError, OSError):
        return True


def _wait_for_reason(processes: Processes) -> bool:
    """Whether a process speaks, now or after a moment."""
    until = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < until:
        if processes.store.check([_VOICE]):
            return True
        time.sleep(0.05)
    return False


def _ignore_termination() -> None:
    """Let no SIGTERM end this process while it says why it ends: torchrun sends one to all as soon
    as the first has ended, and kills those that are left after 30 seconds."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
