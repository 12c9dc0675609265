"""`saesteer serve`: its flags, what it refuses, and a server that answers and ends."""

import importlib.util
import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import Cli


@pytest.mark.parametrize(
    ("line", "status", "says"),
    [
        ("--plan french", 2, "--plan must be NAME=PATH, such as french=runs/plan, got 'french'"),
        ("--plan a=PLAN --plan a=PLAN", 2, "--plan names two plans a"),
        ("--plan a:b=PLAN", 2, "letters, digits, dots"),
        ("--plan a=nowhere", 1, "--plan nowhere: there is no nowhere"),
        ("--latents somewhere", 2, "--latents describes the latents of --sae: give both"),
        ("--host 0.0.0.0", 2, "--host 0.0.0.0 can be reached from other machines: give --api-key"),
        ("--port 99999", 2, "--port must be in 0..65535, got 99999"),
        ("--deadline 0", 2, "--deadline must be a number of seconds above 0"),
        ("--max-batch 0", 2, "--max-batch must be at least 1"),
        ("--sae nowhere", 1, "nowhere"),
    ],
)
def test_what_it_refuses(cli: Cli, plan: Path, line: str, status: int, says: str) -> None:
    words = line.replace("PLAN", str(plan)).split()
    said = cli("serve", "--port", 0, "-q", *words).error(status)
    assert says in said


def test_a_missing_package_is_named_with_its_extra(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "uvicorn" else find(name, *rest),
    )
    said = cli("serve").error(1)
    assert said.endswith(
        "a server needs uvicorn, which is not installed: pip install 'saesteer[serve]'"
    )


@pytest.mark.usefixtures("server_ends")
def test_it_prints_where_it_is(cli: Cli, plan: Path, sae: Path) -> None:
    outcome = cli("serve", "--plan", f"late={plan}", "--sae", sae, "--port", 0, "--json", "-q")
    said = json.loads(outcome.out)
    assert outcome.status == 0 and said["plans"] == ["late"]
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", said["url"])
    assert "/" not in said["model"]  # no folder of this machine


def test_it_answers_until_it_is_told_to_end(
    cli: Cli, plan: Path, sae: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from saesteer.steering.serving.routes import server

    cards = tmp_path / "latents.jsonl"
    cards.write_text(
        json.dumps({"id": 3, "description": "rain and wet streets", "lens_up": [" rain"]})
    )
    found: dict[str, Any] = {}
    run = server.run

    def client(url: str) -> None:
        try:
            with httpx.Client(base_url=url, timeout=60) as http:
                key = {"authorization": "Bearer of-the-environment"}
                chat = {"model": "it:late", "messages": [{"role": "user", "content": "Rain"}]}
                body = {**chat, "temperature": 0, "max_tokens": 4}
                answer = http.post("/v1/chat/completions", json=body, headers=key)
                found["answer"] = answer.json()
                found["latents"] = http.get("/v1/steering/latents?q=wet", headers=key).json()
                found["refused"] = http.get("/v1/models").status_code
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def with_client(app: Any, sock: Any, ready: Any) -> None:
        url = server.url_of(sock)
        thread = threading.Thread(target=client, args=(url,))
        run(app, sock, lambda: (ready(), thread.start()))
        thread.join()

    monkeypatch.setattr(server, "run", with_client)
    monkeypatch.setenv("SAESTEER_API_KEY", "of-the-environment")
    outcome = cli(
        "serve", "--plan", f"late={plan}", "--sae", sae, "--latents", tmp_path, "--name", "it",
        "--port", 0,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert "serving it at http://127.0.0.1:" in outcome.out
    assert found["answer"]["choices"][0]["steering"]["tokens_touched"] > 0
    assert [one["id"] for one in found["latents"]["data"]] == [3]
    assert found["latents"]["from"] == "latents.jsonl"
    assert found["refused"] == 401
