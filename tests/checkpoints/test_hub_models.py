"""Models on the Hub: whether it answers, what is cached, and errors in one line."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from saesteer.checkpoints import model_files
from saesteer.checkpoints.errors import UserError

from .model_sources import put_in_hub_cache, refused, set_reachable

pytestmark = pytest.mark.usefixtures("fresh")


class Hub:
    """A server on this machine that answers every request with one status, once it may."""

    def __init__(self, status: int) -> None:
        self.requests: list[str] = []
        self.answering = threading.Event()
        self.answering.set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.requests.append(self.path)
                hub.answering.wait()
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_HEAD

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Hub]]:
    """Make a Hub and point `HF_ENDPOINT` at it, with nothing else asking to stay offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hubs: list[Hub] = []

    def make(status: int = 200) -> Hub:
        hubs.append(Hub(status))
        monkeypatch.setenv("HF_ENDPOINT", hubs[-1].url)
        return hubs[-1]

    yield make
    for hub in hubs:
        hub.answering.set()
        hub.server.shutdown()
        hub.server.server_close()


@pytest.mark.parametrize(
    ("status", "answer"), [(200, True), (404, True), (403, False), (407, False), (503, False)]
)
def test_reachable(online: Callable[..., Hub], status: int, answer: bool) -> None:
    hub = online(status)
    assert model_files.hub_reachable() is answer
    assert model_files.hub_reachable() is answer
    assert len(hub.requests) == 1  # one try, remembered


def test_a_probe_is_forgotten_after_a_minute(
    online: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = online()
    assert model_files.hub_reachable()
    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert model_files.hub_reachable()
    assert len(hub.requests) == 2


def test_a_hub_that_does_not_answer_is_not_waited_for(online: Callable[..., Hub]) -> None:
    hub = online()
    hub.answering.clear()
    assert not model_files.hub_reachable(timeout=0.2)
    assert not hub.answering.is_set(), "it gave up, although no answer will ever come"


def test_a_dead_port(online: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    assert not model_files.hub_reachable()


def test_a_name_that_hangs(online: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up a host name has no timeout of its own in the system's resolver."""
    monkeypatch.setenv("HF_ENDPOINT", "http://nowhere.invalid")
    done = threading.Event()

    def hang(*_: Any, **__: Any) -> Any:
        done.wait()
        raise OSError("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    assert not model_files.hub_reachable(timeout=0.2)
    assert not done.is_set(), "it gave up, although the look-up still hangs"
    done.set()


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_by_wish_asks_nobody(
    online: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    hub = online()
    monkeypatch.setenv(variable, "1")
    assert not model_files.hub_reachable()
    assert hub.requests == []


def test_a_hub_name_without_network(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_reachable(monkeypatch, False)
    text = refused("someone/some-model")
    assert text == (
        "`model` someone/some-model is not on this machine and the Hub cannot be reached: connect "
        "to the network, or give a folder, a .gguf file, or smollm2-135m-instruct-q4"
    )


def test_a_cached_model_needs_no_network(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_reachable(monkeypatch, False)
    repo = "someone/some-model"
    put_in_hub_cache(hub_cache, repo, {"config.json": "{}"})
    assert "is not on this machine" in refused(repo)  # the weights never came
    index = '{"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}'
    put_in_hub_cache(hub_cache, repo, {"model.safetensors.index.json": index})
    put_in_hub_cache(hub_cache, repo, {"part-1.safetensors": ""})
    assert "is not on this machine" in refused(repo)  # one part is missing
    put_in_hub_cache(hub_cache, repo, {"part-2.safetensors": ""})
    found = model_files.resolve_model(repo)
    assert found == model_files.ResolvedModel(repo, repo, "hub", local_files_only=True)


def test_a_repository_that_is_not_there(
    hub_cache: Path, online: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    online()

    def missing(*_: Any, **__: Any) -> Any:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", missing)
    text = refused("someone/some-modle")
    assert text.startswith("`model` someone/some-modle: the Hub has no such repository")
    assert "give a Hub name" in text


def test_a_repository_that_is_there(
    hub_cache: Path, online: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    online()
    asked: list[Any] = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *names: asked.append(names))
    found = model_files.resolve_model("someone/some-model")
    assert found.kind == "hub" and not found.local_files_only
    assert asked == [("someone/some-model", "config.json")]


def test_hub_calls_fail_soon_and_in_one_line(
    online: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch, hub_cache: Path
) -> None:
    from huggingface_hub import constants, hf_hub_download

    hub = online()
    set_reachable(monkeypatch, False)
    with pytest.raises(UserError) as error:
        model_files.hub_call(lambda: hf_hub_download("a/b", "c"), "`model` a/b", "give a folder")
    assert str(error.value) == (
        "`model` a/b: it is not on this machine and the Hub cannot be reached: connect to the "
        "network, or give a folder"
    )
    assert hub.requests == [], "nobody was asked, so nothing was waited for"
    assert constants.HF_HUB_OFFLINE is False  # as before

    set_reachable(monkeypatch, True)

    def fail() -> None:
        raise RuntimeError("first line.\nsecond line " + "x" * 500)

    with pytest.raises(UserError) as error:
        model_files.hub_call(fail, "`sae` r:i", "give a folder")
    assert str(error.value) == "`sae` r:i: first line: give a folder"
