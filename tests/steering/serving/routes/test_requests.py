"""Every wrong field of a request gets a 4xx in OpenAI's form that says what is allowed."""

import json
from typing import Any

import httpx
import pytest

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Rain"}], "max_tokens": 2}
COMPLETION = {"model": "tiny", "prompt": "Rain", "max_tokens": 2}

WRONG_CHAT = [
    ({"model": None}, 400, "'model' is missing", "model"),
    ({"model": "gpt-4"}, 404, "'model' 'gpt-4' is not served here", "model"),
    ({"model": "tiny:on"}, 404, "did you mean tiny:one?", "model"),
    ({"model": 3}, 400, "'model' must be a string, got 3", "model"),
    ({"messages": None}, 400, "a list of at least one message", "messages"),
    ({"messages": []}, 400, "a list of at least one message", "messages"),
    ({"messages": "Rain"}, 400, "got 'Rain'", "messages"),
    ({"messages": [7]}, 400, "'messages[0]' must be an object", "messages[0]"),
    ({"messages": [{"role": "bard", "content": "x"}]}, 400, "one of system,", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, 400, "a text, or a list of parts", "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "parts of type text",
        "messages[0].content",
    ),
    ({"messages": [{"role": "user", "content": " "}]}, 400, "a prompt is empty", "messages"),
    (
        {"messages": [{"role": "user", "content": "\ud83d"}]},
        400,
        "surrogate",
        "messages[0].content",
    ),
    ({"\ud83d": 1}, 400, r"unknown field '\ud83d'", r"\ud83d"),
    (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        400,
        "ended by a message of the role user",
        "messages",
    ),
    (
        {"temprature": 1},
        400,
        "unknown field 'temprature' (did you mean temperature?)",
        "temprature",
    ),
    ({"temperature": 3}, 400, "a number in [0, 2], got 3", "temperature"),
    ({"temperature": "hot"}, 400, "a number in [0, 2], got 'hot'", "temperature"),
    ({"temperature": True}, 400, "got True", "temperature"),
    ({"top_p": 0}, 400, "(0, 1], got 0", "top_p"),
    ({"n": 0}, 400, "an integer in 1..128", "n"),
    ({"n": 1.5}, 400, "an integer in 1..128, got 1.5", "n"),
    ({"max_tokens": 0}, 400, "an integer in 1..1024, got 0", "max_tokens"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, 400, "differ: give one", "max_tokens"),
    ({"max_tokens": 1020}, 400, "leaves room for", "max_tokens"),
    ({"stop": ["a"] * 17}, 400, "at most 16", "stop"),
    ({"stop": [""]}, 400, "none empty", "stop"),
    ({"stop": 5}, 400, "got 5", "stop"),
    ({"seed": -1}, 400, "an integer in 0..9007199254740992", "seed"),
    ({"stream": "yes"}, 400, "true or false, got 'yes'", "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "needs 'stream' true", "stream_options"),
    (
        {"stream": True, "stream_options": {"usage": True}},
        400,
        "unknown field 'stream_options.usage'",
        "stream_options.usage",
    ),
    ({"top_logprobs": 2}, 400, "needs 'logprobs' true", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "0..20", "top_logprobs"),
    ({"logprobs": 2}, 400, "true or false", "logprobs"),
    ({"logit_bias": {"400": 1}}, 400, "token ids in 0..399, got '400'", "logit_bias"),
    ({"logit_bias": {"4": 101}}, 400, "[-100, 100], got 101", "logit_bias.4"),
    ({"presence_penalty": 2.5}, 400, "[-2, 2]", "presence_penalty"),
    ({"tools": [{"type": "function"}]}, 400, "plain text", "tools"),
    ({"response_format": {"type": "json_object"}}, 400, "plain text", "response_format"),
    ({"deadline": 0}, 400, "a number in [0.001, 300]", "deadline"),
    ({"damage": 1}, 400, "true or false", "damage"),
    ({"activations": [48]}, 400, "latents in 0..47, got [48]", "activations"),
    ({"activations": [1, 1]}, 400, "different", "activations"),
    ({"activations": []}, 400, "1 to 16", "activations"),
    ({"steer": "one"}, 400, "an object, or a list of at most 16, got 'one'", "steer"),
    ({"steer": [[]]}, 400, "'steer[0]' must be an object", "steer[0]"),
    ({"steer": [{}]}, 400, "either 'plan' or 'latents', got the fields none", "steer[0]"),
    ({"steer": [{"plan": "one", "latents": {"1": 1}}]}, 400, "either 'plan'", "steer[0]"),
    ({"steer": [{"plan": "three"}]}, 400, "there are one, two", "steer[0].plan"),
    (
        {"steer": [{"plan": "one", "size": 1}]},
        400,
        "unknown field 'steer[0].size'",
        "steer[0].size",
    ),
    ({"steer": [{"plan": "one", "scale": "1"}]}, 400, "[-1e+06, 1e+06]", "steer[0].scale"),
    ({"steer": [{"plan": "one", "scope": "tokens"}]}, 400, "generation, generated", "steer[0]"),
    ({"steer": [{"plan": "one", "schedule": "slow"}]}, 400, "constant", "steer[0]"),
    ({"steer": [{"plan": "one", "method": "push"}]}, 400, "add, add-keep-norm", "steer[0].method"),
    ({"steer": [{"plan": "one", "gate": "3 >"}]}, 400, "conditions ID > VALUE", "steer[0]"),
    ({"steer": [{"plan": "two", "scope": "all"}]}, 400, "not the same in all parts", "steer[0]"),
    ({"steer": [{"latents": {"48": 1}}]}, 400, "numbers in 0..47, got '48'", "steer[0].latents"),
    ({"steer": [{"latents": {"x": 1}}]}, 400, "got 'x'", "steer[0].latents"),
    ({"steer": [{"latents": {"4": "1"}}]}, 400, "a number in", "steer[0].latents.4"),
    ({"steer": [{"latents": {"4": None}}]}, 400, "needs one", "steer[0]"),
    ({"steer": [{"latents": {"4": 1, "04": 1}}]}, 400, "once each", "steer[0].latents"),
    ({"steer": [{"latents": [4]}]}, 400, "an object, got [4]", "steer[0].latents"),
]

WRONG_COMPLETION = [
    ({"prompt": None}, 400, "a text, a list of texts, or token ids", "prompt"),
    ({"prompt": []}, 400, "got []", "prompt"),
    ({"prompt": ""}, 400, "a prompt is empty", "prompt"),
    ({"prompt": [1, 400]}, 400, "ids are in 0..399, got 400", "prompt"),
    ({"prompt": {"text": "x"}}, 400, "got {'text': 'x'}", "prompt"),
    ({"prompt": ["x"] * 129}, 400, "at most 128 prompts", "prompt"),
    ({"prompt": ["x"] * 100, "n": 2}, 400, "at most 128 answers", "n"),
    ({"logprobs": True}, 400, "0..20, got True", "logprobs"),
    ({"echo": True, "logprobs": 1}, 400, "cannot be joined", "echo"),
    ({"suffix": "end"}, 400, "only written forwards", "suffix"),
    ({"best_of": 2}, 400, "equal to 'n'", "best_of"),
    ({"messages": []}, 400, "unknown field 'messages'", "messages"),
]


def check(response: httpx.Response, status: int, says: str, param: str | None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"]
    assert "\n" not in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def ids(value: Any) -> str:
    return str(value)[:40]


@pytest.mark.parametrize(("fields", "status", "says", "param"), WRONG_CHAT, ids=ids)
def test_a_chat_with_a_wrong_field(
    http: httpx.Client, fields: dict[str, Any], status: int, says: str, param: str
) -> None:
    body = json.dumps({**CHAT, **fields})
    check(http.post("/v1/chat/completions", content=body), status, says, param)


@pytest.mark.parametrize(("fields", "status", "says", "param"), WRONG_COMPLETION, ids=ids)
def test_a_completion_with_a_wrong_field(
    http: httpx.Client, fields: dict[str, Any], status: int, says: str, param: str
) -> None:
    check(http.post("/v1/completions", json={**COMPLETION, **fields}), status, says, param)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[]", "must be a JSON object, got []"),
        (b'{"temperature": NaN}', "NaN is no JSON number"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_body_that_is_no_object(http: httpx.Client, body: bytes, says: str) -> None:
    check(http.post("/v1/chat/completions", content=body), 400, says, None)


def test_what_is_not_there(http: httpx.Client) -> None:
    check(http.get("/v1/chats"), 404, "there is no /v1/chats here", None)
    check(http.get("/v1/chat/completions"), 405, "does not take GET", None)
    check(http.post("/v1/steering/damage", json={"steer": []}), 400, "do something", "steer")
    check(http.get("/v1/steering/latents?limit=0"), 400, "1..100, got '0'", "limit")
    check(http.get("/v1/steering/latents?ids=4,x"), 400, "latents in 0..47", "ids")
    check(http.get("/v1/steering/latents?text=a"), 400, "known are q, ids, limit", "text")


def test_fields_that_other_clients_send_are_taken(http: httpx.Client) -> None:
    harmless = {
        "user": "me", "store": False, "metadata": {"a": "b"}, "tools": [], "tool_choice": "none",
        "response_format": {"type": "text"}, "logit_bias": {}, "stop": None, "n": None,
        "stream": None, "parallel_tool_calls": True, "steer": None, "seed": 3.0,
    }  # fmt: skip
    response = http.post("/v1/chat/completions", json={**CHAT, **harmless})
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["steering"]["seed"] == 3


def test_biases_and_penalties_change_the_choice(http: httpx.Client) -> None:
    asked = {**COMPLETION, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    plain = http.post("/v1/completions", json=asked).json()["choices"][0]["steering"]["token_ids"]
    biased = http.post("/v1/completions", json={**asked, "logit_bias": {"77": 100}}).json()
    assert biased["choices"][0]["steering"]["token_ids"] == [77] * 8
    banned = http.post(
        "/v1/completions", json={**asked, "logit_bias": {str(plain[0]): -100}}
    ).json()
    assert banned["choices"][0]["steering"]["token_ids"][0] != plain[0]
    both = {"logit_bias": {"77": 100}, "presence_penalty": 2, "frequency_penalty": 2}
    said = http.post("/v1/completions", json={**asked, **both}).json()
    assert said["choices"][0]["steering"]["token_ids"] == [77] * 8  # 100 - 2 - 8 * 2 is still most
