"""The judge against a local HTTP server: what is sent, what is understood, what goes wrong."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.steering.evaluation.judge import KEY_VARIABLE, Judge, parse_grade
from saesteer.steering.evaluation.letters import Letter
from saesteer.steering.tasks.task import load_task


class Endpoint:
    """A chat endpoint that answers with whatever it is told to."""

    def __init__(self) -> None:
        self.status = 200
        self.then: int | None = None
        """The status from the second question on."""
        self.body: Any = {"choices": [{"message": {"content": "B"}}]}
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), sent))
                text = outer.body if isinstance(outer.body, str) else json.dumps(outer.body)
                self.send_response(outer.status)
                outer.status = outer.then or outer.status
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    found = Endpoint()
    thread = threading.Thread(target=found.server.serve_forever)
    thread.start()
    yield found
    found.server.shutdown()
    thread.join()
    found.server.server_close()


def test_a_reply_is_graded(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "a-key")
    task = load_task("french")
    assert Judge(endpoint.url + "/", "small")(task, "The soup.", "La soupe.") is Letter.B
    ((path, headers, sent),) = endpoint.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer a-key"
    assert (sent["model"], sent["temperature"]) == ("small", 0)
    (message,) = sent["messages"]
    for part in (task.instruction, "The soup.", "La soupe."):
        assert part in message["content"]


def test_no_key_is_sent_without_one(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    Judge(endpoint.url, "small")(load_task("json"), "a", "b")
    assert "Authorization" not in endpoint.requests[0][1]


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("A", Letter.A), ("Grade: C.", Letter.C), ("**B**", Letter.B), ("(A)", Letter.A),
        ("", None), ("Bad", None), ("I cannot say", None), ("b", Letter.B),
        ("A reply that ignores the text deserves C", Letter.C),
        ("A good reply.", None),
        ("A: it is right.", Letter.A),
        ("The answer is A", Letter.A),
        ("Grade: B. A better reply would name the bridge.", Letter.B),
        ("C) A list was asked for", Letter.C),
        ("Not A but B", Letter.B), ("B or C", None),
        ("<think>A or B? A.</think>B", Letter.B),
    ],
)  # fmt: skip
def test_grades_in_an_answer(text: str, grade: Letter | None) -> None:
    assert parse_grade(text) is grade


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, "{}", f"answered HTTP 401; set {KEY_VARIABLE}"),
        (500, "{}", "answered HTTP 500"),
        (400, {"error": {"message": "use max_completion_tokens"}}, r"400 \(use max_completion"),
        (404, "<html><b>no such page</b></html>", r"HTTP 404 \(no such page\)"),
        (200, "not json", "cannot be used"),
        (200, {"choices": []}, "sent no choices"),
    ],
)
def test_endpoints_that_fail(endpoint: Endpoint, status: int, body: Any, said: str) -> None:
    endpoint.status, endpoint.body = status, body
    with pytest.raises(UserError, match=said):
        Judge(endpoint.url, "small", waits=(0.0,))(load_task("json"), "a", "b")
    assert len(endpoint.requests) == (2 if status >= 500 else 1)


@pytest.mark.parametrize("status", [429, 503, 408])
def test_a_busy_endpoint_is_asked_again(endpoint: Endpoint, status: int) -> None:
    endpoint.status = status
    endpoint.then = 200
    judge = Judge(endpoint.url, "small", waits=(0.0, 0.0))
    assert judge(load_task("json"), "a", "b") is Letter.B
    assert len(endpoint.requests) == 2


def test_an_endpoint_that_is_not_there(endpoint: Endpoint) -> None:
    with pytest.raises(UserError, match="cannot be used"):
        Judge("http://127.0.0.1:9", "small", timeout=2.0)(load_task("json"), "a", "b")


@pytest.mark.parametrize(
    ("url", "model"), [("localhost", "m"), ("ftp://a/", "m"), ("http://a", "")]
)
def test_addresses_that_mean_nothing(url: str, model: str) -> None:
    with pytest.raises(UsageError, match="`url`|`judge_model`"):
        Judge(url, model)
