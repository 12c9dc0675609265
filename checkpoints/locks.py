"""One writer per folder: a lock that dies with its process.

The lock is the kernel's (`flock`) on a small file in the folder, which says who holds it. A process
that is killed loses it at once, so nothing is ever left to clear up by hand. Only where the file
system has no such locks does the file's content decide: whether that process still lives.
"""

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saesteer.checkpoints.durable import make_folder
from saesteer.checkpoints.errors import UsageError, UserError

LOCK_NAME = ".saesteer.lock"
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def folder_lock(path: str | Path, flag: str = "`out`") -> Iterator[None]:
    """Be the only writer of a folder, which is made if missing, while the block runs.

    Processes and threads exclude each other; nobody waits. `flag` is what errors call the folder.

    Raises:
        UserError: another process, or another run in this one, holds the folder; or it cannot be
            written to. UsageError when `path` is a file.
    """
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{flag} {folder} is a file; a folder is needed: choose another name")
    make_folder(folder)
    descriptor = _take(folder / LOCK_NAME, flag)
    try:
        _sign(descriptor)
        yield
    finally:
        # Deleted while it is still held; whoever opened it meanwhile finds that it has no name.
        with contextlib.suppress(OSError):
            os.unlink(folder / LOCK_NAME)
        os.close(descriptor)


def _take(path: Path, flag: str) -> int:
    """The descriptor of the lock file, locked. Raises UserError when somebody else has it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            raise UserError(
                f"cannot write in {path.parent} ({error.strerror}): change its permissions or "
                f"choose another {flag}"
            ) from error
        try:
            _lock(descriptor, path, flag)
            if _is_named(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder deleted it just now: take the next one


def _lock(descriptor: int, path: Path, flag: str) -> None:
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except ImportError:
        pass
    except OSError as error:
        if error.errno in _BUSY:
            raise _in_use(path, flag) from error
        if error.errno not in _NO_LOCKS:
            raise UserError(f"cannot lock {path} ({error.strerror}): choose another {flag}") from (
                error
            )
    if _holder_lives(_holder(path)):
        raise _in_use(path, flag)


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether `path` is still the name of the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _sign(descriptor: int) -> None:
    """Say in the lock file who holds it. A full disk is no reason to go without the lock."""
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(sys.argv)[:200],
    }
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(path: Path) -> dict[str, Any]:
    """What the lock file says; {} when it says nothing that can be understood."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        with open(path, "rb") as file:
            found = json.loads(file.read(4096))
        if isinstance(found, dict):
            return found
    return {}


def _holder_lives(holder: dict[str, Any]) -> bool:
    """Whether the process named in a lock file may still run; one on another host always may."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid < 1:
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _in_use(path: Path, flag: str) -> UserError:
    holder = _holder(path)
    who = "another process"
    if "pid" in holder:
        who = f"process {holder['pid']} on {holder.get('host')} since {holder.get('since')}"
    return UserError(
        f"{flag} {path.parent} is being written by {who}: wait for it, stop it, or choose another "
        f"{flag}"
    )
