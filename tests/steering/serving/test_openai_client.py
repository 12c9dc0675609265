"""The official client works against the server, and what it gets is what `steer` answers."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.hooking.generation import SteeredText, generate_steered
from saesteer.steering.plans.from_sae import plan_from_latents

from .server_help import Served, plans_of, sae_of

TEXT = "The museum opens at nine."


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0, http_client=httpx.Client()
    ) as made:
        yield made


def chat(client: openai.OpenAI, text: str = TEXT, **fields: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(
        **{"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 12, **fields}
    )


def steered(twin: LanguageModel, plan: Any, **fields: Any) -> SteeredText:
    return generate_steered(twin, [TEXT], plan, **{"max_new_tokens": 12, **fields})[0]


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:one", "tiny:two"]
    assert client.models.retrieve("tiny:one").owned_by == "saesteer"
    with pytest.raises(openai.NotFoundError, match="there are tiny, tiny:one, tiny:two"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("model", "steer", "plan"),
    [
        ("tiny", None, None),
        ("tiny", [{"plan": "one"}], "one"),
        ("tiny:two", None, "two"),
    ],
)
def test_a_chat_is_answered_as_steer_answers(
    client: openai.OpenAI, twin: LanguageModel, model: str, steer: Any, plan: str | None
) -> None:
    expected = steered(twin, None if plan is None else plans_of(twin)[plan])
    answer = chat(client, model=model, extra_body={"steer": steer})
    choice = answer.choices[0]
    assert (answer.object, answer.model) == ("chat.completion", model)
    assert (choice.message.role, choice.message.content.strip()) == (
        "assistant",
        expected.completion,
    )
    assert choice.steering["token_ids"] == expected.token_ids
    assert choice.steering["tokens_touched"] == expected.tokens_touched
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert choice.finish_reason == ("length" if len(expected.token_ids) == 12 else "stop")
    assert choice.logprobs is None


def test_plans_and_latents_act_in_turn_with_settings_of_their_own(
    client: openai.OpenAI, twin: LanguageModel
) -> None:
    one = plans_of(twin)["one"].with_changes(scale=-0.6, scope="first:4")
    latents = plan_from_latents(
        twin, sae_of(twin), None, {4: 1.5, 7: -0.5}, method="min", schedule="linear:9"
    )
    expected = steered(twin, [one, latents])
    steer = [
        {"plan": "one", "scale": -0.6, "scope": "first:4"},
        {"latents": {"4": 1.5, "7": -0.5}, "method": "min", "schedule": "linear:9"},
    ]
    choice = chat(client, extra_body={"steer": steer}).choices[0]
    assert choice.steering["token_ids"] == expected.token_ids
    assert choice.steering["relative_dose"] == pytest.approx(expected.relative_dose, rel=1e-5)
    assert expected.token_ids != steered(twin, one).token_ids  # the second one does something


def test_a_plan_is_multiplied_or_switched_off(client: openai.OpenAI, twin: LanguageModel) -> None:
    two = plans_of(twin)["two"]
    parts = [dataclasses.replace(one, scale=one.scale * 2) for one in two.parts]
    expected = steered(twin, two.with_changes(parts=parts))
    answer = chat(client, extra_body={"steer": {"plan": "two", "times": 2}})
    assert answer.choices[0].steering["token_ids"] == expected.token_ids
    off = chat(client, extra_body={"steer": {"plan": "two", "scale": 0}}).choices[0]
    assert off.steering["token_ids"] == steered(twin, None).token_ids
    assert off.steering["tokens_touched"] == 0


def test_a_stream_holds_the_same_answer(client: openai.OpenAI) -> None:
    extra = {"steer": [{"plan": "one"}], "seed": 3}
    whole = chat(client, extra_body=extra, logprobs=True, top_logprobs=2)
    chunks = list(
        chat(
            client,
            extra_body=extra,
            logprobs=True,
            top_logprobs=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == whole.choices[0].message.content
    ends = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert ends == [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    logprobs = [
        one
        for c in chunks
        if c.choices and c.choices[0].logprobs
        for one in c.choices[0].logprobs.content
    ]
    assert logprobs == whole.choices[0].logprobs.content
    assert chunks[-2].choices[0].steering == whole.choices[0].steering


def test_logprobs_are_those_of_the_steered_model(
    client: openai.OpenAI, twin: LanguageModel
) -> None:
    import torch

    from saesteer.sae.text.prompts import encode_prompt
    from saesteer.steering.hooking.hook import steer

    found = chat(client, model="tiny:one", logprobs=True, top_logprobs=3).choices[0]
    ids = found.steering["token_ids"]
    prompt = encode_prompt(twin, TEXT, chat=True)
    row = torch.tensor([[*prompt.token_ids, *ids]])
    with steer(twin, plans_of(twin)["one"], prompts=[prompt]):
        logits = twin.model(input_ids=row, use_cache=False).logits[0]
    log_p = torch.log_softmax(logits[len(prompt) - 1 : -1].float(), dim=-1)
    # float32 of the report, and residuals that the hook rounds to float32.
    for line, token, said in zip(log_p, ids, found.logprobs.content, strict=True):
        assert said.logprob == pytest.approx(float(line[token]), abs=1e-5)
        best = line.topk(3)
        assert [one.logprob for one in said.top_logprobs] == pytest.approx(
            best.values.tolist(), abs=1e-5
        )
        assert bytes(said.bytes).decode(errors="replace") == said.token


def test_seeds_choose_what_generate_would_choose(
    client: openai.OpenAI, twin: LanguageModel
) -> None:
    sampled = {"temperature": 1.3, "top_p": 0.9, "seed": 7}
    expected = [
        steered(twin, plans_of(twin)["one"], temperature=1.3, top_p=0.9, seed=seed).token_ids
        for seed in (7, 8)
    ]
    answer = chat(client, model="tiny:one", n=2, **sampled)
    assert [c.steering["token_ids"] for c in answer.choices] == expected
    assert expected[0] != expected[1]
    assert [c.steering["seed"] for c in answer.choices] == [7, 8]


def test_completions_take_texts_and_token_ids(client: openai.OpenAI, twin: LanguageModel) -> None:
    expected = steered(twin, None, chat=False, max_new_tokens=6)
    ids = twin.tokenizer(TEXT)["input_ids"]
    for prompt in (TEXT, ids, [ids]):
        answer = client.completions.create(
            model="tiny", prompt=prompt, temperature=0, max_tokens=6, logprobs=2
        )
        assert answer.choices[0].steering["token_ids"] == expected.token_ids
        assert len(answer.choices[0].logprobs.tokens) == len(expected.token_ids)
    several = client.completions.create(
        model="tiny", prompt=[TEXT, "Rain"], temperature=0, max_tokens=6, echo=True
    )
    assert several.choices[0].text == TEXT + answer.choices[0].text
    assert several.choices[1].text.startswith("Rain")


def test_a_completion_streams_and_stops_at_a_string(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": "A list of rivers", "temperature": 0, "max_tokens": 40}
    text = client.completions.create(**asked).choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    first = text.index(stop)
    cut = client.completions.create(**asked, stop=[stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (text[:first], "stop")
    chunks = list(client.completions.create(**asked, stop=[stop], stream=True))
    assert "".join(c.choices[0].text for c in chunks) == text[:first]


def test_a_conversation_of_several_turns(client: openai.OpenAI) -> None:
    turns = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": TEXT},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [{"type": "text", "text": "And on Sunday?"}]},
    ]
    answer = client.chat.completions.create(
        model="tiny:one", messages=turns, temperature=0, max_tokens=5
    )
    assert answer.choices[0].steering["tokens_touched"] == 5
    assert answer.usage.prompt_tokens > 30


def test_activations_and_damage_are_told(client: openai.OpenAI, twin: LanguageModel) -> None:
    import torch

    from saesteer.sae.model.hooks import capture, resolve_site
    from saesteer.sae.text.prompts import encode_prompt
    from saesteer.steering.hooking.hook import steer

    extra = {"activations": [4, 9], "damage": True}
    answer = chat(client, model="tiny:two", extra_body=extra, max_tokens=6).choices[0]
    ids = answer.steering["token_ids"]
    prompt = encode_prompt(twin, TEXT, chat=True)
    row = torch.tensor([[*prompt.token_ids, *ids]])
    point = resolve_site(twin, 2)
    with steer(twin, plans_of(twin)["two"], prompts=[prompt]), capture([point]) as seen:
        twin.model(input_ids=row, use_cache=False)
    # Outside the hook's block the residual is read after the edits, as the server reads it.
    acts = sae_of(twin).encode(seen[point.key][0].float())[:, [4, 9]]
    said = [one["values"] for one in answer.prompt_activations]
    assert torch.allclose(torch.tensor(said), acts[: len(prompt)], atol=1e-4)
    told = {one["index"]: one["values"] for one in answer.activations}
    assert sorted(told) == list(range(len(ids) - 1))
    for index, values in told.items():
        expected = acts[len(prompt) + index].tolist()
        assert values == pytest.approx(expected, abs=1e-4)
    assert "".join(one["text"] for one in answer.tokens) == answer.message.content
    plain = torch.log_softmax(twin.model(input_ids=row).logits[0].float(), dim=-1)
    nats = -plain[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None]).mean()
    assert answer.steering["nats_per_token"]["unsteered"] == pytest.approx(float(nats), abs=1e-5)


def test_errors_reach_the_client_in_its_own_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="'steer.0..plan' 'three' is not a plan"):
        chat(client, extra_body={"steer": [{"plan": "three"}]})
    with pytest.raises(openai.NotFoundError, match="'model' 'gpt-4' is not served here"):
        chat(client, model="gpt-4")
    # The prompt has no such characters: only the engine can tell, and the stream has not begun.
    late = {"steer": [{"plan": "one", "scope": "span:900-901"}]}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="begins after the end of a prompt"):
            list(chat(client, extra_body=late, stream=stream))
