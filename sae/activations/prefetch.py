"""Batches made ahead, in a thread, so that the model and the trainer work at the same time."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.sae.activations.batches import BatchStream

# Batches that may wait for the trainer: one to take, and some to use during the model's next pass.
BATCHES_AHEAD = 4
# How long leaving the context waits for a pass in progress before it abandons the thread.
_LAST_PASS_SECONDS = 60.0


class Prefetch:
    """Makes batches ahead of the trainer, at most `BATCHES_AHEAD` of them.

    Timing does not affect what batches hold: the thread takes one after the other from the stream
    and hands them on in order. A state is taken between two batches, and includes those that wait.

    Use it as a context manager: the thread ends with the block, however the block ends. An error of
    the thread is raised by `next_batch` once the batches made before it are used up.
    """

    def __init__(
        self,
        batches: BatchStream,
        device: torch.device,
        furthest: Callable[[int], int] = lambda begun: begun,
        after_error_seconds: float = _LAST_PASS_SECONDS,
    ) -> None:
        """`device` is the trainer's; batches arrive there.

        Args:
            furthest: of the batches that each of several processes has begun, the most.
            after_error_seconds: how long an error waits for the pass in progress.
        """
        self._batches = batches
        self._device = device
        self._ahead: deque[Tensor] = deque()
        self._changed = threading.Condition()
        self._working = threading.Lock()
        self._stopping = self._ended = False
        self._pausing = self._begun = self._made = 0
        self._until = 0
        """While pausing, the thread goes on until it has made so many."""
        self._furthest = furthest
        self._after_error_seconds = after_error_seconds
        self._error: BaseException | None = None
        self._stalled = 0.0
        self._stalled_since: float | None = None
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)

    def __enter__(self) -> "Prefetch":
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        # A source that hangs (a network) must not hang the end of the run as well. After an error
        # other processes may wait for this one, and its thread for them.
        self._thread.join(_LAST_PASS_SECONDS if kind is None else self._after_error_seconds)

    def next_batch(self) -> Float[Tensor, "batch width"] | None:
        """The next batch, waiting for it; None after the last. Raises what stopped the thread."""
        with self._changed:
            while not self._ahead and not self._ended and self._error is None:
                self._changed.wait()
            if self._ahead:
                batch = self._ahead.popleft()
                self._changed.notify_all()
            elif self._error is not None:
                raise self._error
            else:
                return None
        if batch.is_cuda:
            # The thread's CUDA stream allocated it, and must not reuse the memory while we read it.
            batch.record_stream(torch.cuda.current_stream(batch.device))
        return batch

    @property
    def ahead(self) -> int:
        """Batches that wait for the trainer."""
        return len(self._ahead)

    def put_back(self, batch: Float[Tensor, "batch width"]) -> None:
        """Return a batch that was taken but not used; it becomes the next one again."""
        with self._changed:
            self._ahead.appendleft(batch)

    @contextlib.contextmanager
    def paused(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
        """Pause the thread between two batches and yield the state of the stream.

        The tensors share memory with the stream: use them before the block ends. Several processes
        pause after the same batch, because their threads make it together.
        """
        with self._changed:
            self._pausing += 1
            self._until = max(self._until, self._begun)
        try:
            until = self._furthest(self._until)
            with self._changed:
                self._until = max(self._until, until)
                self._changed.notify_all()
                while self._made < self._until and self._error is None and not self._ended:
                    self._changed.wait()
            with self._working:
                yield self._batches.state_dict([batch.cpu() for batch in self._ahead])
        finally:
            with self._changed:
                self._pausing -= 1
                self._changed.notify_all()

    def take_stall(self) -> float:
        """Seconds since the last call in which the thread waited for the trainer."""
        with self._changed:
            now = time.monotonic()
            stalled = self._stalled
            if self._stalled_since is not None:
                stalled += now - self._stalled_since
                self._stalled_since = now
            self._stalled = 0.0
            return stalled

    def _work(self) -> None:
        try:
            with self._own_stream():
                while self._wait_for_room():
                    with self._working:
                        if not self._make_one():
                            return
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        """Wait until a batch is wanted; False when the work is over."""
        with self._changed:
            while not self._stopping and self._must_wait():
                if self._stalled_since is None:
                    self._stalled_since = time.monotonic()
                self._changed.wait()
            if self._stalled_since is not None:
                self._stalled += time.monotonic() - self._stalled_since
                self._stalled_since = None
            self._begun += 1
            return not self._stopping

    def _must_wait(self) -> bool:
        if self._pausing:
            return self._begun >= self._until
        return len(self._ahead) >= BATCHES_AHEAD

    def _make_one(self) -> bool:
        batch = self._batches.next_batch()
        if batch is not None and self._device.type == "cuda":
            batch = batch.pin_memory().to(self._device, non_blocking=True)
            torch.cuda.current_stream(self._device).synchronize()
        with self._changed:
            if batch is None:
                self._ended = True
            else:
                self._ahead.append(batch)
            self._made += 1
            self._changed.notify_all()
        return batch is not None

    def _own_stream(self) -> contextlib.AbstractContextManager[Any]:
        if not torch.cuda.is_available():
            return contextlib.nullcontext()
        # On a stream of its own the model's work does not queue behind the trainer's.
        return torch.cuda.stream(torch.cuda.Stream())
