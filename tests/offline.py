"""Keep the fast tests off the network: sockets of this process reach this machine alone."""

import contextlib
import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

import pytest


def is_here(host: Any) -> bool:
    """Whether a host name or address means this machine."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


class Guard:
    """Refuses connections and look-ups that leave this machine, and remembers where they went."""

    def __init__(self) -> None:
        self.allow = False
        self.refused: list[str] = []

    def check(self, host: Any) -> None:
        """Raise OSError, as a machine without a network would, for a host that is not this one."""
        if not self.allow and not is_here(host):
            self.refused.append(str(host))
            raise OSError(f"the fast tests are offline, so they cannot reach {host}")

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        connect, connect_ex, look_up = (
            socket.socket.connect,
            socket.socket.connect_ex,
            socket.getaddrinfo,
        )

        def guarded_connect(sock: socket.socket, address: Any) -> None:
            self.check_address(address)
            connect(sock, address)

        def guarded_connect_ex(sock: socket.socket, address: Any) -> int:
            self.check_address(address)
            return connect_ex(sock, address)

        def guarded_look_up(host: Any, *args: Any, **options: Any) -> Any:
            self.check(host)
            return look_up(host, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket.socket, "connect", guarded_connect)
            patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
            patch.setattr(socket, "getaddrinfo", guarded_look_up)
            yield

    def check_address(self, address: Any) -> None:
        """Check an address as `socket.connect` takes it; a path is a socket of this machine."""
        if isinstance(address, tuple):
            self.check(address[0])
