"""A disk that fails at a chosen system call, and one whose power is cut after it.

Our writers call the system through `os` only, so a test that replaces these functions can count
every call, fail it, look at the disk before and after it, and compute what a power cut leaves.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CALLS = ("open", "write", "fsync", "close", "replace", "unlink", "mkdir")
"""Every call with which a durable writer changes a disk."""


class Disk:
    """Replaces the functions of `os` while `watched` runs.

    Args:
        before, after: called with the number (from 1) and the name of each call.
    """

    def __init__(
        self,
        before: Callable[[int, str], None] = lambda number, name: None,
        after: Callable[[int, str], None] = lambda number, name: None,
    ) -> None:
        self.before = before
        self.after = after
        self.calls: list[str] = []
        self._looking = False

    def _seen(self, name: str, result: Any, *arguments: Any) -> None:
        """Called after each call with its result; for subclasses."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, self._spy(name, getattr(os, name)))
            yield

    @contextmanager
    def _look(self) -> Iterator[None]:
        self._looking = True
        try:
            yield
        finally:
            self._looking = False

    def _spy(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*arguments: Any, **options: Any) -> Any:
            if self._looking:  # the test's own calls
                return original(*arguments, **options)
            self.calls.append(name)
            number = len(self.calls)
            with self._look():
                self.before(number, name)
            result = original(*arguments, **options)
            with self._look():
                self._seen(name, result, *arguments)
                self.after(number, name)
            return result

        return spy


class UnsafeDisk(Disk):
    """Tracks what a power cut would leave of a folder.

    The content of a file is what the last fsync of it saw, nothing before the first. Names change
    on the disk when their folder is synced; until then any number of the changes, in their order,
    may have reached it.
    """

    def __init__(self, folder: Path, after: Callable[[int, str], None]) -> None:
        super().__init__(after=after)
        self.folder = folder
        self._open: dict[int, tuple[str, int]] = {}
        self._content: dict[int, bytes] = {}
        self._names: dict[str, int] = {}
        self._pending: list[tuple[str, ...]] = []
        self._inode: dict[str, int] = {}
        for path in folder.rglob("*"):
            if path.is_file():
                inode = path.stat().st_ino
                self._content[inode] = path.read_bytes()
                self._names[str(path)] = self._inode[str(path)] = inode

    def _seen(self, name: str, result: Any, *arguments: Any) -> None:
        if name == "open":
            path = str(arguments[0])
            inode = os.fstat(result).st_ino
            self._open[result] = (path, inode)
            if arguments[1] & os.O_CREAT and path not in self._inode:
                # A number may have been another file's: names on the disk keep that content.
                assert inode not in self._names.values(), "the test would mix up two files"
                self._content[inode] = b""
                self._inode[path] = inode
                self._pending.append(("add", path, str(inode)))
        elif name == "fsync" and arguments[0] in self._open:
            path, inode = self._open[arguments[0]]
            if Path(path).is_dir():
                self._apply(self._names, self._pending)
                self._pending.clear()
            else:
                self._content[inode] = Path(path).read_bytes()
        elif name == "replace":
            old, new = map(str, arguments)
            self._inode[new] = self._inode.pop(old)
            self._pending.append(("move", old, new))
        elif name == "unlink":
            self._inode.pop(str(arguments[0]), None)
            self._pending.append(("remove", str(arguments[0])))

    @staticmethod
    def _apply(names: dict[str, int], changes: list[tuple[str, ...]]) -> None:
        for kind, path, *rest in changes:
            if kind == "add":
                names[path] = int(rest[0])
            elif kind == "move":
                names[rest[0]] = names.pop(path)
            else:
                names.pop(path, None)

    def after_power_cut(self, target: Path) -> Iterator[Path]:
        """Every content that the folder may have after a power cut, written below `target`."""
        for count in range(len(self._pending) + 1):
            names = dict(self._names)
            self._apply(names, self._pending[:count])
            place = target / str(count)
            place.mkdir(parents=True)
            for name, inode in names.items():
                copy = place / Path(name).relative_to(self.folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(self._content[inode])
            yield place
