"""Batched generation equals one prompt at a time, token by token, without a cache."""

from collections.abc import Callable

import pytest
import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.model.generation import Completion, generate, stop_ids
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import EncodedPrompt, encode_prompt

Shared = Callable[..., LanguageModel]

TEXTS = ["The bridge over the river was closed.", "Snow", "A list of five old words, please: one"]


def prompts_for(lm: LanguageModel, chat: bool = True) -> list[EncodedPrompt]:
    return [encode_prompt(lm, text, chat=chat) for text in TEXTS]


def greedy_by_hand(lm: LanguageModel, prompt: EncodedPrompt, count: int) -> list[int]:
    ids = list(prompt.token_ids)
    for _ in range(count):
        with torch.inference_mode():
            logits = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] in stop_ids(lm):
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "gemma3_multimodal"])
def test_greedy_equals_a_slow_reference(family: str, shared_lm: Shared) -> None:
    lm = shared_lm(family)
    prompts = prompts_for(lm)
    made = generate(lm, prompts, max_new_tokens=6, batch_size=2)
    expected = [greedy_by_hand(lm, prompt, 6) for prompt in prompts]
    assert [completion.token_ids for completion in made] == expected
    decode = lm.tokenizer.decode
    assert [c.text for c in made] == [
        decode(ids, skip_special_tokens=True).strip() for ids in expected
    ]


def test_end_of_text_and_what_follows_are_cut(fresh_lm: Shared) -> None:
    lm = fresh_lm()
    prompts = prompts_for(lm)
    free = generate(lm, prompts, max_new_tokens=6)
    stop = free[0].token_ids[3]
    lm.model.generation_config.eos_token_id = [stop, 399]
    assert stop_ids(lm) == {stop, 399}
    stopped = generate(lm, prompts, max_new_tokens=6)
    for with_stop, without in zip(stopped, free, strict=True):
        ids = without.token_ids
        assert with_stop.token_ids == (ids[: ids.index(stop)] if stop in ids else ids)
    lm.model.generation_config.eos_token_id = None
    assert stop_ids(lm) == {2}
    lm.tokenizer.eos_token = None
    assert stop_ids(lm) == set()


def test_sampling_is_seeded_and_keeps_the_global_state(shared_lm: Shared) -> None:
    lm = shared_lm()
    prompts = prompts_for(lm)

    def sample(seed: int, **options: float) -> list[Completion]:
        return generate(
            lm, prompts, max_new_tokens=8, temperature=1.0, seed=seed, batch_size=2, **options
        )

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = sample(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert sample(1) == first
    assert sample(2) != first
    # Almost nothing is left to choose from: the greedy answer.
    assert sample(1, top_p=1e-6) == generate(lm, prompts, max_new_tokens=8, batch_size=2)


def test_order_and_reports(shared_lm: Shared) -> None:
    lm = shared_lm()
    prompts = prompts_for(lm)
    batches: list[list[int]] = []
    counts: list[int] = []
    made = generate(
        lm, prompts, max_new_tokens=3, batch_size=2,
        before_batch=lambda rows: batches.append(list(rows)), progress=counts.append,
    )  # fmt: skip
    assert batches == [[1, 0], [2]], "short prompts first, so that little is padded"
    assert sum(counts) == sum(len(c.token_ids) for c in made) and len(counts) == 2
    assert generate(lm, [], max_new_tokens=3) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ({"temperature": -0.1}, r"`temperature` must be 0 \(greedy\) or more, got -0.1"),
        ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\], got 0.0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(options: dict[str, float], message: str, shared_lm: Shared) -> None:
    with pytest.raises(UsageError, match=message):
        generate(shared_lm(), [], **{"max_new_tokens": 1, **options})  # type: ignore[arg-type]


def test_more_tokens_than_the_model_has_positions_is_refused(shared_lm: Shared) -> None:
    lm = shared_lm("gpt2")
    limit = lm.model.config.max_position_embeddings
    prompt = encode_prompt(lm, "A short text.", chat=False)
    room = limit - len(prompt)
    with pytest.raises(UsageError, match=f"`max_new_tokens` {room + 1} .* at most {room} fit"):
        generate(lm, [prompt], max_new_tokens=room + 1)
