"""One writer per folder, and no lock that outlives its process."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from saesteer.checkpoints import locks
from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.files import claim_output
from saesteer.checkpoints.locks import LOCK_NAME, folder_lock

HOLD = """
import sys
from saesteer.checkpoints.locks import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def start_holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_folder_is_made_and_the_lock_goes(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with folder_lock(folder):
        assert os.listdir(folder) == [LOCK_NAME]
        assert json.loads((folder / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert os.listdir(folder) == []
    with folder_lock(folder):
        pass


def test_two_processes_cannot_write_one_folder(tmp_path: Path) -> None:
    process = start_holder(tmp_path)
    try:
        with pytest.raises(UserError) as error, folder_lock(tmp_path):
            pass
        text = str(error.value)
        assert f"`out` {tmp_path} is being written by process {process.pid}" in text
        assert socket.gethostname() in text and "\n" not in text and "another `out`" in text
        process.communicate("")
        with folder_lock(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    process = start_holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / LOCK_NAME).exists()
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_NAME).exists()


def test_two_runs_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()}"), folder_lock(tmp_path):
            pass
        assert (tmp_path / LOCK_NAME).exists()


def test_many_that_want_it_at_once_get_it_in_turn(tmp_path: Path) -> None:
    """Taking and giving back races with others that open the same file; two never hold it."""
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        taken = 0
        while taken < 20:
            try:
                with folder_lock(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                    taken += 1
            except UserError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 80 and set(most) == {1}


def test_without_locks_of_the_kernel_the_file_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")  # as some network file systems do

    monkeypatch.setattr(fcntl, "flock", refuse)
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True)  # fmt: skip
    dead, host = int(done.stdout), socket.gethostname()
    for holder, free in [
        ({"pid": dead, "host": host}, True),
        ({"pid": os.getppid(), "host": host}, False),
        ({"pid": dead, "host": "elsewhere"}, False),
        ({"pid": "x"}, True),
        ([], True),
    ]:
        (tmp_path / LOCK_NAME).write_text(json.dumps(holder))
        if free:
            with folder_lock(tmp_path):
                pass
        else:
            with pytest.raises(UserError, match="is being written by"), folder_lock(tmp_path):
                pass


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(UsageError, match="is a file"), folder_lock(tmp_path / "a"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write in"), folder_lock(tmp_path):
        pass


def test_a_locked_folder_counts_as_empty_and_keeps_its_lock(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        claim_output(tmp_path)
        (tmp_path / "run.json").write_text("{}")
        with pytest.raises(UsageError, match="not empty"):
            claim_output(tmp_path)
        claim_output(tmp_path, force=True)
        assert os.listdir(tmp_path) == [locks.LOCK_NAME]
