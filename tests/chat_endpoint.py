"""A chat model on this machine, which answers as a test tells it."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

Answer = Callable[[list[dict[str, str]]], str]


class Model:
    """A chat endpoint on this machine: `answer` gets the messages."""

    def __init__(self) -> None:
        self.answer: Answer = lambda messages: "1"
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(sent)
                outer.keys.append(self.headers.get("Authorization"))
                said = outer.answer(sent["messages"])
                body = {"choices": [{"message": {"content": said}}]}
                self.send_response(outer.status)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@contextlib.contextmanager
def serving() -> Iterator[Model]:
    """The endpoint, for as long as the context is open."""
    found = Model()
    thread = threading.Thread(target=found.server.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        found.server.shutdown()
        thread.join()
        found.server.server_close()
