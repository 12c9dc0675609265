"""Sixty-four clients at once: nothing is lost, wrong or mixed up, and memory stays flat."""

import dataclasses
import gc
import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from saesteer.sae.model.language_model import LanguageModel, wrap_model
from saesteer.steering.hooking.generation import generate_steered

from .engine_help import in_float64
from .server_help import plans_of, serving

pytestmark = pytest.mark.slow

CLIENTS = 64
ROUNDS = 4
REQUESTS = 4
"""Of each client in each round."""
WORDS = "the museum opens at nine and rain closed a road while Peter bought oranges".split()


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def cases(lm: LanguageModel) -> list[tuple[dict[str, Any], list[int]]]:
    """Bodies, each with the tokens that `steer` answers it alone."""
    draw = random.Random(0)
    plans = plans_of(lm)
    made = []
    for _ in range(48):
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 14)))
        name, times = draw.choice([None, "one", "two"]), draw.choice([0.5, 1.0, -1.0])
        length, seed = draw.randint(1, 24), draw.randint(0, 99)
        temperature = draw.choice([0.0, 1.2])
        plan, steer = None, None
        if name is not None:
            parts = [dataclasses.replace(one, scale=one.scale * times) for one in plans[name].parts]
            plan, steer = plans[name].with_changes(parts=parts), {"plan": name, "times": times}
        expected = generate_steered(
            lm, [text], plan, max_new_tokens=length, temperature=temperature, seed=seed
        )[0]
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": length,
            "temperature": temperature,
            "seed": seed,
            "steer": steer,
        }
        made.append((body, expected.token_ids))
    return made


def token_ids(http: httpx.Client, body: dict[str, Any], stream: bool) -> list[int]:
    """The tokens of one answer, streamed or not."""
    if not stream:
        response = http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["steering"]["token_ids"]  # type: ignore[no-any-return]
    said, whole = "", {}
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                whole = json.loads(line.removeprefix("data: "))["choices"][0]
                said += whole["delta"].get("content") or ""
    assert line or whole  # the stream has ended with its facts
    return whole["steering"]["token_ids"]  # type: ignore[no-any-return]


def test_sixty_four_clients(tiny_lm: Callable[..., tuple[Any, Any]]) -> None:
    known = cases(in_float64(wrap_model(*tiny_lm("llama"), "tiny")))
    wrong: list[str] = []
    answered = [0] * CLIENTS
    sizes = []

    def client(number: int, turn: int, url: str) -> None:
        draw = random.Random(f"{turn} {number}")
        try:
            with httpx.Client(base_url=url, timeout=300) as http:
                for _ in range(REQUESTS):
                    body, expected = draw.choice(known)
                    if draw.random() < 0.15:  # some go before their answer is there
                        gone = {**body, "stream": True, "max_tokens": 400, "ignore_eos": True}
                        with http.stream("POST", "/v1/chat/completions", json=gone) as response:
                            next(response.iter_lines())
                    found = token_ids(http, body, draw.random() < 0.5)
                    if found != expected:
                        wrong.append(f"{body}: {found}, not {expected}")
                    answered[number] += 1
        except Exception as error:
            wrong.append(f"client {number}: {error!r}")

    lm = in_float64(wrap_model(*tiny_lm("llama"), "tiny"))
    with serving(lm, with_sae=False, max_batch=24) as served:
        engine = served.app.engine
        for turn in range(ROUNDS):
            threads = [
                threading.Thread(target=client, args=(number, turn, served.url))
                for number in range(CLIENTS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            while engine.running or engine.waiting:
                engine.call(lambda: None).result(60)
            gc.collect()
            sizes.append(resident())
        figures = httpx.get(f"{served.url}/metrics").text
    assert not wrong, wrong[:3]
    assert answered == [ROUNDS * REQUESTS] * CLIENTS
    finished = f'saesteer_generations_total{{how="finished"}} {CLIENTS * ROUNDS * REQUESTS}.0'
    assert finished in figures
    # Rows were answered together, or nothing was tested.
    assert 'saesteer_pass_rows_bucket{le="16.0"}' in figures
    # The first round warms up; a cache that stayed behind would add megabytes a round.
    assert sizes[-1] - sizes[1] < 24 * 2**20, sizes
