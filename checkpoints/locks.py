"""One writer per folder: a lock that ends with its process.

The lock is filelock's, on a small file in the folder that says who holds it. A process that is
killed loses it at once, so no lock ever has to be removed by hand. Where the file system has no
locks, the file's content decides: the folder is locked while the process that it names still runs.
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
from typing import TYPE_CHECKING, Any

from saesteer.checkpoints.durable import make_folder
from saesteer.checkpoints.errors import UsageError, UserError

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCK_NAME = ".saesteer.lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def folder_lock(path: str | Path, flag: str = "`out`") -> Iterator[None]:
    """Be the only writer of a folder, which is made if missing, while the block runs.

    Processes and threads exclude each other, and none waits. `flag` is what errors call the folder.

    Raises:
        UserError: another process, or another run in this one, holds the folder; or it cannot be
            written to. UsageError when `path` is a file.
    """
    from filelock import FileLock

    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{flag} {folder} is a file; a folder is needed: choose another name")
    make_folder(folder)
    file = folder / LOCK_NAME
    # filelock's own soft lock would overwrite the text that says who holds the folder.
    lock = FileLock(file, blocking=False, thread_local=False, fallback_to_soft=False)
    _take(lock, file, flag)
    try:
        _sign(file)
        yield
    finally:
        # Deleted while it is still held: a process that opened it meanwhile sees that it is gone.
        with contextlib.suppress(OSError):
            file.unlink()
        lock.release()


def _take(lock: "BaseFileLock", file: Path, flag: str) -> None:
    """Acquire the lock. Raises UserError when another process or thread has it."""
    from filelock import Timeout

    while True:
        try:
            lock.acquire()
            return
        except Timeout:
            if file.exists():
                raise _in_use(file, flag) from None
            # The last holder has just deleted the file: try again with a new one.
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(
                    f"cannot write in {file.parent} ({error.strerror}): change its permissions or "
                    f"choose another {flag}"
                ) from error
            if _holder_runs(_holder(file)):
                raise _in_use(file, flag) from error
            return


def _sign(file: Path) -> None:
    """Write into the lock file who holds it; on a full disk the lock works without that."""
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(sys.argv)[:200],
    }
    with contextlib.suppress(OSError):
        file.write_text(json.dumps(holder), encoding="utf-8")


def _holder(path: Path) -> dict[str, Any]:
    """The holder that the lock file names; {} when its content cannot be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        with open(path, "rb") as file:
            content = json.loads(file.read(4096))
        if isinstance(content, dict):
            return content
    return {}


def _holder_runs(holder: dict[str, Any]) -> bool:
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
    """The error that another process or thread holds the folder."""
    holder = _holder(path)
    who = "another process"
    if "pid" in holder:
        who = f"process {holder['pid']} on {holder.get('host')} since {holder.get('since')}"
    return UserError(
        f"{flag} {path.parent} is being written by {who}: wait for it, stop it, or choose another "
        f"{flag}"
    )
