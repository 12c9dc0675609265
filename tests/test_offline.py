"""The guard that keeps the fast tests off the network."""

import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from .offline import Guard, is_here


@pytest.mark.parametrize("host", [None, "", "localhost", "127.0.0.1", "127.9.9.9", "::1", b"::1"])
def test_this_machine(host: str | bytes | None) -> None:
    assert is_here(host)


@pytest.mark.parametrize("host", ["huggingface.co", "10.0.0.1", "8.8.8.8", "fe80::1%eth0"])
def test_other_machines(host: str) -> None:
    assert not is_here(host)


def test_what_leaves_the_machine_is_refused_and_remembered() -> None:
    guard = Guard()
    with guard.installed():
        with pytest.raises(OSError, match="cannot reach 8.8.8.8"):
            socket.create_connection(("8.8.8.8", 53))
        with socket.socket() as sock, pytest.raises(OSError, match="cannot reach 10.0.0.1"):
            sock.connect_ex(("10.0.0.1", 80))
        with pytest.raises(urllib.error.URLError, match="the fast tests are offline"):
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            opener.open("http://huggingface.co")
    assert guard.refused == ["8.8.8.8", "10.0.0.1", "huggingface.co"]


def test_this_machine_answers(tmp_path: Path) -> None:
    guard = Guard()
    with socket.create_server(("127.0.0.1", 0)) as server:
        with guard.installed(), socket.create_connection(server.getsockname()[:2]) as sock:
            assert sock.getpeername() == server.getsockname()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        with guard.installed(), socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / "s"))
    assert guard.refused == []


def test_the_suite_is_guarded(offline_guard: Guard) -> None:
    """In a thread, with the error swallowed: the fixture would still fail the test."""

    def reach() -> None:
        try:
            socket.create_connection(("192.0.2.1", 9))
        except OSError:
            pass

    thread = threading.Thread(target=reach)
    thread.start()
    thread.join()
    assert offline_guard.refused == ["192.0.2.1"]
    offline_guard.refused.clear()
