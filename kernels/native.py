"""Loops compiled for the CPU, where numba is installed, and the threads that run them.

A TopK step is a few short loops over gathered rows. Written with PyTorch's operations each of them
reads or writes whole matrices more often than the arithmetic needs; compiled as loops they keep a
row in the cache from its first use to its last. The loops are in the ``*_cpu.py`` files next to
their ops, which import numba and are imported on first use. Their PyTorch twins are used in
float64, under ``SAESTEER_KERNELS=torch``, and where numba is not installed.

The loops release Python's lock. `run_parts` gives every thread a range of rows or latents; each row
is computed by one thread alone and in one order, so results do not depend on how many there are.
"""

import ctypes
import functools
import logging
import math
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saesteer.kernels.dispatch import kernel_choice

_log = logging.getLogger(__name__)

_TORCH = Path(torch.__file__).parent.parent

_workers: ThreadPoolExecutor | None = None


@functools.cache
def numba_installed() -> bool:
    """Whether numba is installed. Does not import it."""
    try:
        return find_spec("numba") is not None
    except (ImportError, ValueError):
        return False


@functools.cache
def _log_missing_numba() -> None:
    _log.warning("numba is not installed: training on the CPU uses slower PyTorch operations")


def use_native(*tensors: Tensor) -> bool:
    """Whether an op on these tensors runs its compiled CPU loop: all float32 and on the CPU.

    Raises:
        ValueError: ``SAESTEER_KERNELS`` holds an unknown value.
    """
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors):
        return False
    if kernel_choice() != "auto":
        return False
    if not numba_installed():
        _log_missing_numba()
        return False
    return True


def loop(*, reorder: bool = False, cache: bool = False) -> Callable[[Any], Any]:
    """Compile a function of numpy arrays, on its first call.

    ``reorder`` lets sums be taken in vector lanes; it never assumes that values are finite.
    ``cache`` is for functions that Python calls: their compiled code is stored on disk, so that a
    machine compiles them once. All others are helpers, which are always inlined into their callers:
    if the compiler could call a helper instead, the code in memory and the code read from the disk
    could use different versions of it, whose sums are rounded differently.
    """
    import numba

    fastmath: Any = {"reassoc", "contract", "nsz"} if reorder else False

    def decorate(function: Any) -> Any:
        options = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
        if not cache:
            return numba.njit(forceinline=True, **options)(function)
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder to store the compiled code in
            return numba.njit(**options)(function)

    return decorate


def _forget_workers() -> None:
    global _workers
    _workers = None  # a forked child has none of its parent's threads


if hasattr(os, "register_at_fork"):  # there is no fork on Windows
    os.register_at_fork(after_in_child=_forget_workers)


def even_bounds(count: int, parts: int) -> list[int]:
    """``parts + 1`` bounds that cut ``range(count)`` into ranges of nearly equal size."""
    return [count * part // parts for part in range(parts + 1)]


def parts_of(work: int, least: int) -> int:
    """How many parts to cut ``work`` items into: several per thread, of at least ``least`` items.

    Several, so that a thread that starts late (PyTorch's own threads keep a core busy for a moment
    after a product) does not hold up the others with its share.
    """
    n_threads = torch.get_num_threads()
    return max(1, min(4 * n_threads if n_threads > 1 else 1, work // max(1, least)))


@functools.cache
def _openmp_team() -> Callable[[Any, int], None] | None:
    """A call that runs a function once on every thread of PyTorch's own OpenMP team, if it has one.

    After a product PyTorch's threads busy-wait for the next one for ten milliseconds or so, which
    keeps their cores occupied. Loops on other threads would share those cores with them. The team
    is reached through the OpenMP library that PyTorch has loaded.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
        libraries = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line}
        own = [path for path in libraries if Path(path).parent.is_relative_to(_TORCH)]
        if len(own) != 1:
            return None
        parallel = ctypes.CDLL(own[0]).GOMP_parallel
    except (OSError, AttributeError):
        return None
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    parallel.argtypes = (callback, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None

    def run(function: Callable[[], None], n_threads: int) -> None:
        parallel(callback(lambda _: function()), None, n_threads, 0)

    return run


def run_parts(function: Callable[..., Any], bounds: Sequence[int], *args: Any) -> None:
    """Call ``function(*args, first, last)`` for every range between neighbouring bounds.

    The ranges are taken one after the other by as many threads as PyTorch uses, the caller's among
    them. An exception in one of them is raised here once all threads have stopped.
    """
    global _workers
    ranges = iter([(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b > a])
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for first, last in ranges:  # handing out the next is atomic: Python's lock is held
                function(*args, first, last)
        except BaseException as error:
            failed.append(error)

    if not getattr(function, "signatures", True):
        # The first call compiles, which needs the large stack of the calling thread.
        for first, last in ranges:
            function(*args, first, last)
            break
    n_threads = min(torch.get_num_threads(), len(bounds) - 1)
    team = _openmp_team()
    if n_threads <= 1:
        work()
    elif team is not None:
        team(work, n_threads)
    else:
        if _workers is None:
            _workers = ThreadPoolExecutor(os.cpu_count() or 1, "saesteer-loop")
        others = [_workers.submit(work) for _ in range(n_threads - 1)]
        work()
        for other in others:
            other.result()
    if failed:
        raise failed[0]


_kept = threading.local()

_MOST_SCRATCH_BYTES = 64 * 2**20


def scratch(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory that this thread's next call may get again.

    When a block of tens of megabytes is freed after every call, the next call gets new pages from
    the system, and mapping them takes longer than the loop that fills them. A thread keeps a block
    of up to 64 MiB; larger ones are allocated at each call.

    Args:
        shape: of the tensor, which is contiguous and on the CPU.
    """
    size = dtype.itemsize
    for length in shape:
        size *= length
    block: Tensor | None = getattr(_kept, "block", None)
    if block is None or block.numel() < size:
        block = torch.empty(size, dtype=torch.uint8)
        if size <= _MOST_SCRATCH_BYTES:
            _kept.block = block
    return block[:size].view(dtype).view(shape)


_LEAST_BLOCK_BYTES = 16 * 2**20
_MOST_BLOCK_BYTES = 256 * 2**20
# Of the pass before, which is let go only after the next is made, and of the next.
_MOST_BLOCKS = 2


def result_memory(shape: tuple[int, ...]) -> Tensor:
    """Uninitialised float32 memory for a result: that of an earlier result which nobody has any
    more, for the reason that `scratch` gives.

    A thread keeps two blocks of 16 to 256 MiB; anything else is allocated at each call.

    Args:
        shape: of the tensor, which is contiguous and on the CPU.
    """
    import numpy as np

    count = math.prod(shape)
    if not _LEAST_BLOCK_BYTES <= 4 * count <= _MOST_BLOCK_BYTES:
        return torch.empty(shape)
    blocks: list[tuple[Any, Any]] = getattr(_kept, "blocks", [])
    # A tensor made from an array keeps that array alive, and so do all its views.
    free = [block for block, user in blocks if user() is None and block.size >= count]
    block = free[0] if free else np.empty(count, np.float32)
    user = block[:count].reshape(shape)
    others = [(b, u) for b, u in blocks if b is not block]
    others.sort(key=lambda kept: kept[1]() is None)  # of those let go, the last go first
    _kept.blocks = [(block, weakref.ref(user)), *others[: _MOST_BLOCKS - 1]]
    return torch.from_numpy(user)
