"""A person's text keeps its place inside the chat template."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.language_model import LanguageModel, wrap_model
from saesteer.sae.text.prompts import encode_prompt, pad_left, pad_right

Shared = Callable[..., LanguageModel]


def spelled(lm: LanguageModel, ids: list[int]) -> str:
    return str(lm.tokenizer.decode(ids))


def test_chat_prompt_is_what_the_template_gives(shared_lm: Shared) -> None:
    lm = shared_lm()
    prompt = encode_prompt(lm, "  Name three rivers.\n", chat=True)
    expected = lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "  Name three rivers.\n"}], add_generation_prompt=True
    )
    assert prompt.token_ids == list(expected["input_ids"])
    assert prompt.text == "  Name three rivers.\n" and len(prompt) == len(prompt.token_ids)
    first, end = prompt.user_span
    assert spelled(lm, prompt.token_ids[first:end]).startswith("  Name three rivers.")
    template = [i for i in range(len(prompt)) if not first <= i < end]
    assert prompt.template_mask.nonzero().squeeze(1).tolist() == template


@pytest.mark.parametrize("text", ["assistant", "user", "a", "<|im_start|>", "im", "system\nYou"])
def test_texts_that_the_template_holds_too(text: str, shared_lm: Shared) -> None:
    """The place is that of the person's text, not of the same letters around it."""
    lm = shared_lm()
    prompt = encode_prompt(lm, text, chat=True)
    around = encode_prompt(lm, "#", chat=True)
    assert prompt.text_start == around.text_start
    first, end = prompt.user_span
    # Letters of the text may share tokens with the template, never the other way round.
    assert first == around.user_span[0]
    assert text in spelled(lm, prompt.token_ids[first:end])


def test_plain_text_is_all_the_persons(shared_lm: Shared) -> None:
    lm = shared_lm(chat=False)
    prompt = encode_prompt(lm, " Name three rivers. ", chat=False)
    assert prompt.token_ids == lm.tokenizer(" Name three rivers. ")["input_ids"]
    assert prompt.text == " Name three rivers. "
    assert prompt.user_span == (0, len(prompt))
    assert not prompt.template_mask.any()


def test_what_a_template_trims_is_found_in_it(tiny_lm: Callable[..., Any]) -> None:
    lm = wrap_model(*tiny_lm())
    lm.tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] | trim }}>{% endfor %}"
    prompt = encode_prompt(lm, " Name three rivers.\n", chat=True)
    assert prompt.text == "Name three rivers." and prompt.rendered == "<Name three rivers.>"


def test_half_a_surrogate_pair_is_named(shared_lm: Shared) -> None:
    with pytest.raises(UserError, match=r"half of a surrogate pair \(U\+D83D after 'cut '\)"):
        encode_prompt(shared_lm(), "cut \ud83d emoji", chat=False)


def test_padding_is_a_token_that_the_embedding_has(tiny_lm: Callable[..., Any]) -> None:
    lm = wrap_model(*tiny_lm())
    rows = lm.model.get_input_embeddings().weight.shape[0]
    lm.tokenizer.add_tokens([f"<extra {i}>" for i in range(rows)])
    lm.tokenizer.pad_token = f"<extra {rows - 1}>"
    assert lm.tokenizer.pad_token_id >= rows > lm.pad_id
    ids, _ = pad_left(lm, [[3], [4, 5]])
    assert int(ids.max()) < rows


def test_a_tokenizer_that_begins_texts_with_a_token(tiny_lm: Callable[..., Any]) -> None:
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = tiny_lm()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    lm = wrap_model(model, tokenizer)
    plain = encode_prompt(lm, "Name three rivers.", chat=False)
    assert plain.token_ids[0] == 1 and plain.user_span == (1, len(plain))
    # The template writes its own.
    assert encode_prompt(lm, "Name", chat=True).token_ids[:2].count(1) == 1


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=40), data=st.data())
def test_token_span_covers_the_characters(shared_lm: Shared, text: str, data: Any) -> None:
    lm = shared_lm()
    if not text.strip():
        with pytest.raises(UserError, match="a prompt is empty"):
            encode_prompt(lm, text, chat=True)
        return
    prompt = encode_prompt(lm, text, chat=True)
    size = len(prompt.text)
    start = data.draw(st.integers(0, size - 1))
    end = data.draw(st.integers(start + 1, size))
    first, last = prompt.token_span(start, end)
    spans = prompt.offsets[first:last]
    covered = {position for low, high in spans for position in range(low, high)}
    wanted = set(range(prompt.text_start + start, prompt.text_start + end))
    assert wanted <= covered
    # Without its first or its last token something would be missing.
    for shorter in (spans[1:], spans[:-1]):
        rest = {position for low, high in shorter for position in range(low, high)}
        # Letters of several bytes are several tokens with one place.
        assert not wanted <= rest or spans.count(spans[0]) > 1 or spans.count(spans[-1]) > 1


def test_spans_outside_the_text(shared_lm: Shared) -> None:
    prompt = encode_prompt(shared_lm(), "Hello", chat=False)
    with pytest.raises(UserError, match="`scope` span:9-12 covers no token of a prompt of 5"):
        prompt.token_span(9, 12)


def test_templates_that_cannot_be_used(tiny_lm: Callable[..., Any], shared_lm: Shared) -> None:
    with pytest.raises(UserError, match="`chat` needs a chat template and .* use `chat=False`"):
        encode_prompt(shared_lm(chat=False), "Hello", chat=True)
    model, tokenizer = tiny_lm()
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    lm = wrap_model(model, tokenizer)
    with pytest.raises(UserError, match="rewrites the prompt: use `chat=False`"):
        encode_prompt(lm, "Hello", chat=True)
    tokenizer.chat_template = "before {{ messages[0]['content'] | trim }} after"
    assert encode_prompt(lm, "Hello", chat=True).text_start == len("before ")


def test_padding(shared_lm: Shared) -> None:
    lm = shared_lm()
    rows = [[5, 6, 7], [8]]
    ids, mask = pad_left(lm, rows)
    assert ids.tolist() == [[5, 6, 7], [2, 2, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = pad_right(lm, rows)
    assert ids.tolist() == [[5, 6, 7], [8, 2, 2]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64


def test_a_prompt_longer_than_the_positions_is_refused(shared_lm: Shared) -> None:
    lm = shared_lm("gpt2")
    assert lm.positions is not None
    words = "word " * lm.positions
    with pytest.raises(UserError, match=f"longer than the {lm.positions} positions of .*'word wor"):
        encode_prompt(lm, words, chat=False)


def test_a_tokenizer_that_keeps_no_places_is_refused(shared_lm: Shared) -> None:
    from transformers import ByT5Tokenizer

    lm = shared_lm()
    slow = LanguageModel(
        lm.model, ByT5Tokenizer(), "slow", lm.fingerprint, lm.blocks, lm.blocks_path
    )
    with pytest.raises(UserError, match=r"the tokenizer of slow \(ByT5Tokenizer, written in Pyth"):
        encode_prompt(slow, "Hello", chat=False)
