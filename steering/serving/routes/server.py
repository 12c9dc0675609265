"""A server: the application behind uvicorn, on a socket of its own."""

import contextlib
import importlib.util
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from saesteer.checkpoints.errors import UserError
from saesteer.steering.serving.config import ServeConfig

_NEEDS = ("starlette", "uvicorn", "prometheus_client")
_STOP_SECONDS = 15


def check_installed() -> None:
    """Raise UserError when a package that only the server needs is missing."""
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"a server needs {', '.join(missing)}, which is not installed: "
            "pip install 'saesteer[serve]'"
        )


def listen(config: ServeConfig) -> socket.socket:
    """A socket at the server's address. Raises UserError where it cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM
        )[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise UserError(
            f"`host` {config.host}, `port` {config.port}: {error.strerror or error}: choose "
            "another one (`port` 0 takes one that is free)"
        ) from error
    return sock


def url_of(sock: socket.socket) -> str:
    """The address of a listening socket, as a browser takes it."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: Any, sock: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until the process is told to end (SIGINT, SIGTERM); running answers are finished.

    `ready` is called when the first request can come.
    """
    server = _server(app, ready)
    server.run(sockets=[sock])
    if not server.started:
        raise UserError("the server could not be started: see the lines above")


@contextlib.contextmanager
def in_background(app: Any, config: ServeConfig) -> Iterator[str]:
    """Serve from a thread while the context is open; gives the server's address."""
    ready = threading.Event()
    with contextlib.closing(listen(config)) as sock:
        server = _server(app, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        try:
            while not ready.wait(0.1):
                if not thread.is_alive():
                    raise UserError("the server could not be started: see the lines above")
            yield url_of(sock)
        finally:
            server.should_exit = True
            thread.join()


def _server(app: Any, ready: Callable[[], None]) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        """Tells when it is ready, and ends quietly when it is told to."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            # The library raises the signal once more at the end, which would end the process
            # before anything else is put in order.
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            signals = (signal.SIGINT, signal.SIGTERM)
            before = {one: signal.signal(one, self.handle_exit) for one in signals}
            try:
                yield
            finally:
                for one, handler in before.items():
                    signal.signal(one, handler)

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=_STOP_SECONDS,
        server_header=False,
    )
    return Server(config)
