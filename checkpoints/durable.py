"""Durable, atomic writing: a file appears complete or not at all.

A draft is written next to its target, made durable (fsync) and renamed over it; then the folder is
made durable, so that the new name survives a power cut too. However the writer ends, a reader finds
either the old file or the new one.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from saesteer.checkpoints.errors import UserError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OS_ERROR_NUMBER = re.compile(r"os error (\d+)")
# Bytes per write: between two a write can be cancelled, and other Python threads can run.
_PIECE_BYTES = 4 << 20


class Cancelled(Exception):
    """A write was cancelled; its draft is deleted."""


class Draft:
    """A new file that gets its name when the `with` block succeeds, and is deleted otherwise.

    Args:
        path: the name it gets; an existing file of that name is replaced.
        cancelled: asked before every piece of 4 MiB; once true, `write` raises `Cancelled`.
        cached: whether the system may keep the bytes in its file cache. Long streams of data should
            not be cached: they would push out the files of other programs, and on a virtual
            machine growing the cache by a page may cost more than the write itself.
    """

    def __init__(
        self,
        path: Path,
        cancelled: Callable[[], bool] = lambda: False,
        *,
        cached: bool = True,
    ) -> None:
        self.path = path
        self._cached = cached
        self.bytes = 0
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        self._cancelled = cancelled
        self._digest = hashlib.sha256()
        self._descriptor = -1

    @property
    def sha256(self) -> str:
        """The SHA-256 of what was written so far, as 64 hexadecimal digits."""
        return self._digest.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        """Add bytes to the end. Raises OSError, or `Cancelled`."""
        rest = memoryview(data).cast("B")
        while len(rest):
            if self._cancelled():
                raise Cancelled
            written = os.write(self._descriptor, rest[:_PIECE_BYTES])
            self._digest.update(rest[:written])
            self.bytes += written
            rest = rest[written:]

    def __enter__(self) -> "Draft":
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        self._descriptor = os.open(self._temporary, flags, 0o666)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            try:
                if kind is None:
                    os.fsync(self._descriptor)
                    if not self._cached:
                        _leave_cache(self._descriptor)
            finally:
                os.close(self._descriptor)
            if kind is None:
                os.replace(self._temporary, self.path)
        except BaseException:  # also after Ctrl-C no draft may be left
            self._discard()
            raise
        if kind is None:
            sync_folder(self.path.parent)
        else:
            self._discard()

    def _discard(self) -> None:
        with contextlib.suppress(OSError):  # the error being raised says more
            os.unlink(self._temporary)


def write_by(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` write a temporary file next to `path`, make it durable and rename it to `path`.

    For other libraries' writers, which take a file name. A failed write raises a one-line
    `UserError` and leaves nothing behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with writing(path):
            write(temporary)
            sync_file(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException:  # also after Ctrl-C no draft may be left
        with contextlib.suppress(OSError):  # the error being raised says more
            os.unlink(temporary)
        raise


def sync_file(path: Path) -> None:
    """Make the content of a file durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _leave_cache(descriptor: int) -> None:
    """Ask the system to drop a written file from its cache, where it has such a call."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is not None:
        with contextlib.suppress(OSError):  # advice only
            advise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, where the file system can.

    Some network file systems cannot and raise various errors, although the names are there; these
    are ignored. Only a failing disk (EIO) raises OSError.
    """
    try:
        sync_file(path)
    except OSError as error:
        if error.errno == errno.EIO:
            raise


def make_folder(path: Path) -> None:
    """Make a folder and those above it, durably. Raises a one-line `UserError`."""
    missing = []
    for place in (path, *path.parents):
        if place.exists():
            break
        missing.append(place)
    try:
        path.mkdir(parents=True, exist_ok=True)
        for place in missing:
            sync_folder(place.parent)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {path} ({error.strerror}): check the path and its permissions"
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write of `path` inside the block into a one-line `UserError`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        match = _OS_ERROR_NUMBER.search(str(error))
        if number is None and match:  # safetensors reports the number in its text only
            number = int(match.group(1))
        if number in _NO_SPACE:
            raise UserError(
                f"no space left while writing {path}: free some space, then run the same command "
                "again (with `resume` to continue what was saved)"
            ) from error
        reason = os.strerror(number) if number else str(error).splitlines()[0]
        raise UserError(
            f"cannot write {path} ({reason}): check the folder and its permissions"
        ) from error
