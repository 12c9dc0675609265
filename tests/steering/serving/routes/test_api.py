"""What stands around the answers: health, figures, keys, strangers, sizes, clients that go."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.model.language_model import wrap_model
from saesteer.steering.serving.config import ServeConfig, check_plan_name
from saesteer.steering.serving.routes.server import listen

from ..server_help import Served, serving

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Rain"}], "max_tokens": 3}
LONG = {**CHAT, "max_tokens": 900, "ignore_eos": True}


@contextlib.contextmanager
def held(served: Served) -> Iterator[None]:
    """Hold the engine between two passes."""
    go, reached = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        assert go.wait(60)

    served.app.engine.call(wait)
    assert reached.wait(60)
    try:
        yield
    finally:
        go.set()


def until_idle(served: Served) -> None:
    """Wait for the border at which rows whose client has gone leave."""
    while served.app.engine.running or served.app.engine.waiting:
        served.app.engine.call(lambda: None).result(60)


def test_health_figures_and_what_can_steer(http: httpx.Client) -> None:
    assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
    health = http.get("/health").json()
    assert (health["status"], health["model"], health["running"]) == ("ok", "tiny", 0)
    figures = http.get("/metrics").text
    assert 'saesteer_http_requests_total{path="/v1/chat/completions",status="200"}' in figures
    assert 'saesteer_generations_total{how="finished"}' in figures
    assert "saesteer_first_token_seconds_count" in figures
    assert "saesteer_running_rows 0.0" in figures
    there = http.get("/v1/steering").json()
    assert [plan["name"] for plan in there["plans"]] == ["one", "two"]
    assert [part["layer"] for part in there["plans"][1]["parts"]] == [1, 2]
    assert there["sae"] == {
        "name": "an-sae", "d_sae": 48, "architecture": "standard", "layer": 2,
        "site": "resid_post", "reads": True,
    }  # fmt: skip


def test_latents_are_found_by_their_tokens(http: httpx.Client) -> None:
    first = http.get("/v1/steering/latents", params={"ids": "7"}).json()["data"][0]
    token = next(token for token in first["tokens"] if token.strip().isalpha())
    found = http.get("/v1/steering/latents", params={"q": token, "limit": 100}).json()
    assert 7 in [one["id"] for one in found["data"]]
    assert found["from"] == "logit lens"
    assert all(token.strip().lower() in " ".join(one["tokens"]).lower() for one in found["data"])
    (seven,) = http.get("/v1/steering/latents", params={"q": "7"}).json()["data"]
    assert seven == first


def test_damage_on_neutral_questions(http: httpx.Client) -> None:
    weak, strong = (
        http.post("/v1/steering/damage", json={"steer": [{"plan": "one", "times": times}]}).json()
        for times in (0.1, 2)
    )
    assert 0 < weak["kl"] < strong["kl"]
    assert weak["relative_dose"] == pytest.approx(strong["relative_dose"] / 20, rel=1e-3)


def test_the_page_brings_its_own_script_and_asks_no_other_address(http: httpx.Client) -> None:
    page = http.get("/")
    assert (
        page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    )
    for name, kind in (("playground.js", "text/javascript"), ("playground.css", "text/css")):
        assert name in page.text
        asset = http.get(f"/{name}")
        assert asset.headers["content-type"].startswith(kind)
        assert "http://" not in asset.text and "https://" not in asset.text


def test_a_client_that_goes_frees_its_row(served: Served, http: httpx.Client) -> None:
    with http.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        while "content" not in next(lines):
            pass
    until_idle(served)
    # and one that did not ask for a stream, while its request runs
    body = json.dumps(LONG).encode()
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sock:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while not served.app.engine.running:
            served.app.engine.call(lambda: None).result(60)
    until_idle(served)
    figures = http.get("/metrics").text
    assert 'saesteer_generations_total{how="cancelled"} 2.0' in figures


def test_a_full_queue_says_when_to_come_again(tiny_lm: Callable[..., tuple[Any, Any]]) -> None:
    lm = wrap_model(*tiny_lm("llama"), "tiny")
    with (
        serving(lm, with_sae=False, max_batch=1, queue=0) as served,
        httpx.Client(base_url=served.url, timeout=60) as http,
    ):
        answers: list[int] = []

        def first() -> None:
            answers.append(
                httpx.post(f"{served.url}/v1/chat/completions", json=CHAT, timeout=60).status_code
            )

        with held(served):
            thread = threading.Thread(target=first)
            thread.start()
            while not served.app.engine.waiting:
                pass
            refused = http.post("/v1/chat/completions", json=CHAT)
        thread.join()
        assert answers == [200]
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        no_sae = http.post("/v1/chat/completions", json={**CHAT, "steer": {"latents": {"1": 1}}})
        assert "start it with `sae`" in no_sae.json()["error"]["message"]
        assert http.get("/v1/steering/latents").status_code == 404


def test_a_deadline_fails_with_504(tiny_lm: Callable[..., tuple[Any, Any]]) -> None:
    now = [0.0]
    lm = wrap_model(*tiny_lm("llama"), "tiny")
    with serving(lm, with_sae=False, clock=lambda: now[0]) as served:
        with (
            httpx.Client(base_url=served.url, timeout=60) as http,
            http.stream(
                "POST", "/v1/chat/completions", json={**LONG, "stream": True, "deadline": 5}
            ) as response,
        ):
            lines = response.iter_lines()
            while "content" not in next(lines):
                pass
            now[0] = 6.0
            said = [line for line in lines if line.startswith("data: ")]
        error = json.loads(said[-1].removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("timeout_error", "deadline")


def test_a_key_is_asked_for(tiny_lm: Callable[..., tuple[Any, Any]]) -> None:
    lm = wrap_model(*tiny_lm("llama"), "tiny")
    with (
        serving(lm, with_sae=False, api_key="s3cret", body_bytes=2000) as served,
        httpx.Client(base_url=served.url) as http,
    ):
        for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "Basic s3cret"}):
            for path in ("/v1/models", "/metrics", "/v1/steering"):
                refused = http.get(path, headers=headers)
                assert refused.status_code == 401
                assert refused.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/").status_code == http.get("/health").status_code == 200
        key = {"authorization": "Bearer s3cret"}
        assert http.get("/v1/models", headers=key).status_code == 200
        big = {**CHAT, "messages": [{"role": "user", "content": "x" * 2000}]}
        assert http.post("/v1/chat/completions", json=big, headers=key).status_code == 413


def test_pages_of_other_sites_are_refused(http: httpx.Client, served: Served) -> None:
    own = served.url.removeprefix("http://")
    for headers in (
        {"origin": "https://example.org"},
        {"origin": "null"},
        {"host": "example.org:80"},
    ):
        refused = http.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert refused.status_code == 403
        assert refused.json()["error"]["type"] == "permission_error"
    taken = http.post("/v1/chat/completions", json=CHAT, headers={"origin": f"http://{own}"})
    assert taken.status_code == 200


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"host": "0.0.0.0"}, "give `api_key` too"),
        ({"api_key": " "}, "`api_key` is empty"),
        ({"port": 70000}, "`port` must be in 0..65535"),
        ({"max_batch": 0}, "`max_batch` must be at least 1"),
        ({"queue": -1}, "`queue` must be at least 0"),
        ({"deadline": 0.0}, "above 0, got 0.0"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ServeConfig(**fields)


def test_addresses_and_names_that_cannot_be() -> None:
    with listen(ServeConfig(port=0)) as sock:
        sock.listen()
        with pytest.raises(UserError, match="choose another"):
            listen(ServeConfig(port=sock.getsockname()[1]))
    with pytest.raises(UsageError, match="letters, digits"):
        check_plan_name("two words")
