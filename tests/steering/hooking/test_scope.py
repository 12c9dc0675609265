"""Scopes: what they parse from, and which positions of which rows they cover."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.model.language_model import wrap_model
from saesteer.sae.text.prompts import EncodedPrompt, encode_prompt
from saesteer.steering.hooking.scope import NO_END, RowInfo, Rows, parse_scope


@pytest.fixture
def prompt_of(tiny_lm: Callable[..., tuple[Any, Any]]) -> Callable[..., EncodedPrompt]:
    lm = wrap_model(*tiny_lm("llama"))
    return lambda text, chat=True: encode_prompt(lm, text, chat=chat)


@pytest.mark.parametrize(
    "text",
    [
        "generation", "generated", "prompt", "all", "last-prompt", "first:1", "first:20",
        "span:0-7", "after-instruction",
    ],
)  # fmt: skip
def test_a_scope_reads_back_as_it_was_written(text: str) -> None:
    assert str(parse_scope(f" {text} ")) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "everything",
            "`scope` must be one of generation, .*tail, replies, got 'everything'",
        ),
        ("", "`scope` must be one of"),
        ("first", "`scope` must be one of"),
        ("first:N", "`scope` must be one of"),
        ("first:-1", "`scope` must be one of"),
        ("first:0", "N must be at least 1"),
        ("span:A-B", "`scope` must be one of"),
        ("span:3", "`scope` must be one of"),
        ("span:5-5", "A must be less than B"),
        ("span:9-2", "A must be less than B"),
        ("generation:3", "`scope` must be one of"),
    ],
)
def test_a_bad_scope_is_a_usage_error(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_scope(text)


@pytest.mark.parametrize(
    ("text", "length", "positions"),
    [
        ("generation", 4, [3, 4, 5, 6, 7]),
        ("generated", 4, [4, 5, 6, 7]),
        ("prompt", 4, [1, 2, 3]),
        ("all", 4, [1, 2, 3, 4, 5, 6, 7]),
        ("last-prompt", 4, [3]),
        ("first:1", 4, [3]),
        ("first:3", 4, [3, 4, 5]),
        # A row that is all padding has no prompt to speak of.
        ("generation", 0, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("last-prompt", 0, []),
    ],
)
def test_each_scope_covers_the_positions_of_its_definition(
    text: str, length: int, positions: list[int]
) -> None:
    mask = Rows.stack([parse_scope(text).row(length)]).mask(torch.arange(8)[None])
    assert mask[0].nonzero().flatten().tolist() == positions


def test_rows_keep_their_own_positions_whatever_the_padding() -> None:
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    p = real.cumsum(dim=1) - 1
    rows = [parse_scope("last-prompt").row(length) for length in (2, 4, 2)]
    mask = Rows.stack(rows).mask(p, real)
    assert mask.nonzero().tolist() == [[0, 3], [1, 3], [2, 1]]


rows_of = st.builds(
    RowInfo,
    start=st.integers(0, 9),
    stop=st.one_of(st.integers(0, 12), st.just(NO_END)),
    excluded=st.sets(st.integers(0, 9), max_size=4).map(lambda s: tuple(sorted(s))),
)


@settings(deadline=None)  # building tensors is slow on a busy machine
@given(
    rows=st.lists(rows_of, min_size=1, max_size=4),
    factor=st.integers(1, 3),
    data=st.data(),
)
def test_the_mask_equals_its_definition_token_by_token(
    rows: list[RowInfo], factor: int, data: st.DataObject
) -> None:
    batch = len(rows) * factor
    p = torch.tensor(data.draw(st.lists(
        st.lists(st.integers(-2, 14), min_size=3, max_size=3), min_size=batch, max_size=batch
    )))  # fmt: skip
    real = torch.tensor(data.draw(st.lists(
        st.lists(st.booleans(), min_size=3, max_size=3), min_size=batch, max_size=batch
    )))  # fmt: skip
    mask = Rows.stack(rows).expand(factor).mask(p, real)
    for i in range(batch):
        row = rows[i // factor]
        for t in range(3):
            at = int(p[i, t])
            wanted = (
                bool(real[i, t])
                and at >= 0
                and row.start <= at < row.stop
                and at not in row.excluded
            )
            assert bool(mask[i, t]) == wanted


def test_prompt_and_all_leave_out_the_template_and_the_first_token(
    prompt_of: Callable[..., EncodedPrompt],
) -> None:
    prompt = prompt_of("names are bound")
    first, last = prompt.user_span
    p = torch.arange(len(prompt) + 2)[None]
    generated = [len(prompt), len(prompt) + 1]
    for text, after in (("prompt", []), ("all", generated)):
        mask = Rows.stack([parse_scope(text).row(len(prompt), prompt)]).mask(p)
        assert mask[0].nonzero().flatten().tolist() == [*range(first, last), *after]
    plain = prompt_of("names are bound", chat=False)
    mask = Rows.stack([parse_scope("prompt").row(len(plain), plain)]).mask(p)
    assert mask[0].nonzero().flatten().tolist() == list(range(1, len(plain)))
    kept = parse_scope("prompt", include_first=True).row(len(plain), plain)
    mask = Rows.stack([kept]).mask(p)
    assert mask[0].nonzero().flatten().tolist() == list(range(len(plain)))


def test_a_span_covers_the_tokens_of_its_characters(
    prompt_of: Callable[..., EncodedPrompt],
) -> None:
    text = "an object has a type"
    prompt = prompt_of(text)
    row = parse_scope("span:3-9").row(len(prompt), prompt)
    found = "".join(prompt.rendered[a:b] for a, b in prompt.offsets[row.start : row.stop])
    assert "object" in found
    assert len(found) <= len("n object h")
    # The template goes on after the text; it is no part of it.
    whole = parse_scope("span:0-999").row(len(prompt), prompt)
    assert (whole.start, whole.stop) == prompt.user_span
    with pytest.raises(UserError, match="`scope` span:20-22 begins after the end .*20 characters"):
        parse_scope("span:20-22").row(len(prompt), prompt)


@pytest.mark.parametrize(
    "text", ["a list. Say it in French", "Say it in French: a list", "Say it in French"]
)
@pytest.mark.parametrize("chat", [True, False])
def test_after_instruction_begins_where_the_instruction_ends(
    text: str, chat: bool, prompt_of: Callable[..., EncodedPrompt]
) -> None:
    prompt = prompt_of(text, chat)
    scope = parse_scope("after-instruction", instructions=["nothing", "Say it in French", " "])
    row = scope.row(len(prompt), prompt)
    assert row.stop == NO_END
    end = prompt.text_start + text.index("French") + len("French")
    rest = prompt.rendered[prompt.offsets[row.start][0] :]
    if end < len(prompt.rendered):
        assert prompt.rendered[end:].endswith(rest)
        assert len(prompt.rendered[end:]) - len(rest) <= 1  # a token may reach over the end
    else:  # nothing follows: the last token, which predicts the first new one
        assert row.start == len(prompt) - 1


def test_after_instruction_takes_the_wording_that_ends_last(
    prompt_of: Callable[..., EncodedPrompt],
) -> None:
    prompt = prompt_of("list it: a tuple. list it as JSON and so on")
    long = parse_scope("after-instruction", instructions=["list it", "list it as JSON"])
    only = parse_scope("after-instruction", instructions=["list it as JSON"])
    assert long.row(len(prompt), prompt) == only.row(len(prompt), prompt)


def test_a_prompt_without_the_instruction_is_an_error(
    prompt_of: Callable[..., EncodedPrompt],
) -> None:
    prompt = prompt_of("a tuple is a sequence")
    scope = parse_scope("after-instruction", instructions=["Say it in French"])
    with pytest.raises(UserError, match="holds none of the 1 wordings.*'Say it in French'"):
        scope.row(len(prompt), prompt)
    with pytest.raises(UsageError, match="needs the texts of the instruction"):
        parse_scope("after-instruction").row(len(prompt), prompt)
    with pytest.raises(UsageError, match="depends on the text of the prompts"):
        scope.row(5)
