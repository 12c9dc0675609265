"""Writing shards in a background thread."""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from saesteer.checkpoints.places import Place
from saesteer.checkpoints.shard_writer import ShardWriter


class BackgroundWriter:
    """Runs a `ShardWriter` in a thread of its own, so that `add` returns at once.

    Calls are made in order. At most `pending_tokens` tokens wait (one call may exceed that), so
    memory is bounded: a disk slower than the model slows the model down. An error of the thread is
    raised by the next call here, and nothing is written after it.

    Use it as a context manager. Leaving it by an exception drops calls that still wait; the shards
    and the manifest already written stay valid.
    """

    def __init__(self, writer: ShardWriter, pending_tokens: int) -> None:
        self.writer = writer
        self._limit = pending_tokens
        self._calls: deque[tuple[int, Callable[[], None]]] = deque()
        self._waiting = 0
        self._busy = False
        self._stopping = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="shard writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._changed:
            if error is not None:
                self._calls.clear()
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        if error is None:
            self._raise()

    def add(
        self,
        acts: Mapping[Place, Float[Tensor, "tokens d_model"]],
        token_ids: Int[Tensor, " tokens"],
        cursor: Mapping[str, Any] | None = None,
        extra: Mapping[str, Int[Tensor, " tokens"]] | None = None,
    ) -> None:
        """Hand over tokens; the tensors may not change afterwards.

        They are checked in the calling thread, so that the background thread does not compete with
        the model for the cores. Raises NonFiniteError for NaN or infinity.
        """
        rows = self.writer.rows(acts, token_ids, extra, copy=False)
        self._call(rows.tokens, lambda: self.writer.append(rows, cursor))

    def flush(self, cursor: Mapping[str, Any]) -> None:
        """Start to write the tokens handed over as a shard with this cursor; does not wait."""
        self._call(0, lambda: self.writer.checkpoint(cursor))

    def checkpoint(self, cursor: Mapping[str, Any] | None = None) -> None:
        """Write the tokens handed over, and return when they are on the disk."""
        self._call(0, lambda: self.writer.checkpoint(cursor))
        self._drain()

    def close(self, extra: Mapping[str, Any] | None = None) -> None:
        """Write the rest, complete the manifest, and return when it is on the disk."""
        self._call(0, lambda: self.writer.close(extra))
        self._drain()

    def _call(self, tokens: int, call: Callable[[], None]) -> None:
        with self._changed:
            while self._waiting and self._waiting + tokens > self._limit and self._error is None:
                self._changed.wait()
            self._raise()
            self._calls.append((tokens, call))
            self._waiting += tokens
            self._changed.notify_all()

    def _drain(self) -> None:
        with self._changed:
            while (self._calls or self._busy) and self._error is None:
                self._changed.wait()
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                while not self._calls and not self._stopping:
                    self._changed.wait()
                if not self._calls:
                    return
                tokens, call = self._calls.popleft()
                self._busy = True
            try:
                call()
            except BaseException as error:
                with self._changed:
                    self._error, self._busy = error, False
                    self._calls.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                self._waiting -= tokens
