"""How many cores a verb computes on, and what its threads do while they have nothing to do.

All of it is decided before torch is loaded: OpenMP reads its settings once, when it is loaded.
"""

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

from saesteer.checkpoints.errors import UsageError

# What the loops of PyTorch, of its linear algebra, of numba and of tokenizers go by.
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS")
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def use_threads(count: int | None, environment: MutableMapping[str, str] = os.environ) -> None:
    """Compute on `count` threads; None leaves it to the libraries, which take every core.

    Threads of OpenMP wait for work by spinning. That is fastest on cores of their own; where other
    programs run, the spinning takes the cores from the thread that is waited for, and everything
    becomes several times slower. So they sleep instead when other work is seen on the cores.
    Settings of the user's own stay.

    Raises UsageError for a count below 1.
    """
    if count is not None:
        if count < 1:
            raise UsageError(f"`threads` must be at least 1, got {count}")
        for name in _COUNTS:
            environment[name] = str(count)
        torch = sys.modules.get("torch")
        if torch is not None:  # called from a program that has loaded it
            torch.set_num_threads(count)
    if not any(name in environment for name in _WAITING) and others_compute():
        environment["OMP_WAIT_POLICY"] = "passive"


def others_compute(load: Path = Path("/proc/loadavg")) -> bool:
    """Whether other programs compute on this machine's cores, now and in the last minute.

    Only the mean would count our own last command, only the moment any short-lived one. False
    where the system does not say.
    """
    try:
        words = load.read_text().split()
        mean, running = float(words[0]), int(words[3].split("/")[0])
    except (OSError, ValueError, IndexError):
        return False
    return running > 1 and mean > 0.5 * (os.cpu_count() or 1)  # the one running is this process
