"""What goes through the model, and what is kept of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import NonFiniteError, UserError
from saesteer.sae.activations.reader import ActivationStream, open_activations
from saesteer.sae.config import TextConfig
from saesteer.sae.model.forward_pass import ForwardPass
from saesteer.sae.model.hooks import resolve_site, run_to
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.contexts import open_contexts

Shared = Callable[..., LanguageModel]

TEXT = TextConfig(context=24, batch_size=4, seed=5)


def stream_of(lm: LanguageModel, text: TextConfig, layer: int = 2) -> ActivationStream:
    points = [resolve_site(lm, layer)]
    return ActivationStream(lm, points, open_contexts(lm, text), text)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_batch_size_changes_nothing(batch_size: int, shared_lm: Shared) -> None:
    lm = shared_lm()

    def read(size: int) -> tuple[Any, ...]:
        # A ratio at which the running median decides about many rows.
        stream = stream_of(lm, replace(TEXT, batch_size=size, max_norm_ratio=1.2))
        batches = [stream.next_batch() for _ in range(24 // size)]
        kept = [batch for batch in batches if batch is not None]
        return (
            torch.cat([batch.activations[2, "resid_post"] for batch in kept]),
            *(
                torch.cat([getattr(batch, name) for batch in kept])
                for name in ("token_ids", "positions", "contexts", "kept")
            ),
        )

    rows, *numbers = read(4)
    other_rows, *other_numbers = read(batch_size)
    assert all(torch.equal(*pair) for pair in zip(numbers, other_numbers, strict=True))
    # Products of other shapes may round differently.
    torch.testing.assert_close(rows, other_rows, rtol=1e-4, atol=1e-5)


def test_positions_and_contexts_tell_where_a_row_stood(shared_lm: Shared) -> None:
    lm = shared_lm()
    stream, contexts = stream_of(lm, TEXT), open_contexts(lm, TEXT)
    for number in range(3):
        batch, text = stream.next_batch(), contexts.next_batch(4)
        assert batch is not None and text is not None
        assert text.numbers.tolist() == list(range(4 * number, 4 * number + 4))
        at = text.token_ids[batch.contexts - 4 * number, batch.positions.long()]
        assert torch.equal(at.int(), batch.token_ids)
        assert torch.equal(batch.kept, torch.bincount(batch.contexts - 4 * number, minlength=4))


# --- documents that do not see each other


def corpus(folder: Path, count: int = 60) -> str:
    path = folder / "short.jsonl"
    lines = [{"text": f"document {n} is about {n * n} herons and no more"} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi", "olmo2", "mistral",
     "mixtral", "gemma3_multimodal"],
)  # fmt: skip
def test_isolated_documents_are_read_as_if_alone(
    family: str, shared_lm: Shared, tmp_path: Path
) -> None:
    lm = shared_lm(family)
    text = replace(TEXT, data=(corpus(tmp_path),), max_norm_ratio=1e9, context=64)
    isolated = stream_of(lm, replace(text, isolate_documents=True)).next_batch()
    crossing = stream_of(lm, text).next_batch()
    contexts = open_contexts(lm, text).next_batch(4)
    assert isolated is not None and crossing is not None and contexts is not None
    rows, others = (b.activations[2, "resid_post"] for b in (isolated, crossing))
    checked = 0
    for row in range(4):
        for owner in contexts.document_ids[row].unique().tolist():
            inside = contexts.document_ids[row] == owner
            alone = run_to(lm, [resolve_site(lm, 2)],
                           input_ids=contexts.token_ids[row, inside][None])  # fmt: skip
            here = (isolated.contexts == row) & inside[isolated.positions.long()]
            places = isolated.positions[here] - int(inside.nonzero()[0, 0])
            expected = alone[2, "resid_post"][0, places.long()]
            # A masked product adds its terms in another order.
            torch.testing.assert_close(rows[here], expected, rtol=1e-3, atol=1e-4)
            if inside.nonzero()[0, 0] > 0:
                assert (others[here] - expected).abs().max() > 1e-2, "else nothing was tested"
                checked += 1
    assert checked >= 8


def test_a_batch_of_whole_documents_needs_no_mask(
    shared_lm: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = shared_lm()
    path = tmp_path / "long.txt"
    path.write_text("one document without an end in sight " * 100)
    asked: list[set[str]] = []
    original = lm.text_model.forward

    def spy(**inputs: Any) -> Any:
        asked.append(set(inputs))
        return original(**inputs)

    monkeypatch.setattr(lm.text_model, "forward", spy)
    text = replace(TEXT, data=(str(path),), isolate_documents=True)
    assert stream_of(lm, text).next_batch() is not None
    assert "position_ids" not in asked[0]


# --- what is left out


def test_the_template_is_left_out_when_asked(shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm()
    path = tmp_path / "chat.jsonl"
    # Words of the template inside messages are the person's own.
    messages = [
        {"role": "user", "content": "user assistant helpful"},
        {"role": "assistant", "content": "  a heron stands  "},
    ]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    text = replace(TEXT, data=(str(path),), context=16, epochs=40, max_norm_ratio=1e9)

    def read(config: TextConfig) -> tuple[ActivationStream, str]:
        stream = stream_of(lm, config)
        pieces = [batch.token_ids for batch in stream]
        return stream, lm.tokenizer.decode(torch.cat(pieces).tolist())

    with_template, spelled = read(text)
    assert "You are" in spelled and with_template.excluded["template"] == 0
    without, spelled = read(replace(text, exclude_template=True))
    assert "You are" not in spelled
    assert "user assistant helpful" in spelled and "a heron stands" in spelled
    assert spelled.count("user") == spelled.count("helpful"), "the roles are gone"
    assert without.excluded["template"] > 100
    assert without.excluded["special"] == with_template.excluded["special"]


def test_a_template_that_rewrites_messages_cannot_be_told_apart(
    fresh_lm: Shared, tmp_path: Path
) -> None:
    lm = fresh_lm()
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "words " * 50}]}) + "\n")
    text = replace(TEXT, data=(str(path),), exclude_template=True)
    with pytest.raises(UserError, match="rewrites the messages .* leave `exclude_template` out"):
        stream_of(lm, text).next_batch()


# --- a pass that is begun before the last batch is sorted out


def test_passes_begun_ahead_change_nothing(shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm()
    text = replace(TEXT, data=(corpus(tmp_path),), max_norm_ratio=1.2)

    def read(ahead: bool, state: dict[str, Any] | None = None) -> tuple[list[Any], list[Any]]:
        stream = stream_of(lm, text)
        stream.reads_ahead = ahead
        if state is not None:
            stream.next_batch()  # what was begun after it must not come after the state
            stream.load_state_dict(state)
        batches, states = [], []
        while (batch := stream.next_batch()) is not None:
            batches.append((batch.activations[2, "resid_post"], batch.token_ids, batch.contexts))
            states.append(json.loads(json.dumps(stream.state_dict())))
        assert stream.next_batch() is None, "the end is not the end"
        return batches, states

    batches, states = read(False)
    assert len(batches) > 3
    for state, already in ((None, 0), (states[1], 2)):
        others, other_states = read(True, state)
        assert other_states == states[already:]
        for one, two in zip(batches[already:], others, strict=True):
            assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))


def test_a_pass_is_begun_before_the_last_one_is_asked_for(
    shared_lm: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, order = shared_lm(), []
    begin, norms = ForwardPass.begin, ForwardPass.norms

    def spied_begin(*args: Any) -> ForwardPass:
        order.append("begin")
        return begin(*args)

    def spied_norms(self: ForwardPass) -> torch.Tensor:
        order.append("norms")
        return norms(self)

    monkeypatch.setattr(ForwardPass, "begin", spied_begin)
    monkeypatch.setattr(ForwardPass, "norms", spied_norms)
    for ahead, expected in ((False, ["begin", "norms"] * 2),
                            (True, ["begin", "begin", "norms", "begin", "norms"])):  # fmt: skip
        stream = stream_of(lm, TEXT)
        stream.reads_ahead = ahead
        order.clear()
        stream.next_batch()
        stream.next_batch()
        assert order == expected


# --- errors do not lose a batch


@pytest.mark.parametrize("ahead", [False, True])
def test_a_batch_that_is_not_finite_is_read_again(fresh_lm: Shared, ahead: bool) -> None:
    lm = fresh_lm()
    contexts = open_contexts(lm, TEXT)
    seen = torch.cat([contexts.next_batch(4).token_ids for _ in range(2)])  # type: ignore[union-attr]
    third = contexts.next_batch(4)
    assert third is not None
    new = third.token_ids[~torch.isin(third.token_ids, seen)][0]
    weight = lm.model.get_input_embeddings().weight
    stream = stream_of(lm, TEXT)
    stream.next_batch()
    stream.next_batch()
    stream.reads_ahead = ahead
    before, good = stream.state_dict(), weight[new].clone()
    with torch.no_grad():
        weight[new] = torch.nan
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="at layer 2 in batch 2"):
            stream.next_batch()
    assert stream.state_dict() == before
    with torch.no_grad():
        weight[new] = good
    batch = stream.next_batch()
    assert batch is not None and int(batch.contexts.min()) == 8


@pytest.mark.parametrize("ahead", [False, True])
def test_an_error_of_text_read_ahead_belongs_to_the_next_batch(
    shared_lm: Shared, tmp_path: Path, ahead: bool
) -> None:
    lm = shared_lm()
    stream = open_activations(lm, [resolve_site(lm, 1)], TEXT, replies_folder=tmp_path)
    *whole, third = [stream.next_batch() for _ in range(3)]
    stream = open_activations(lm, [resolve_site(lm, 1)], TEXT, replies_folder=tmp_path)
    stream.reads_ahead = ahead
    original, calls = stream.contexts.next_batch, 0

    def breaks(rows: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise UserError("the network is gone")
        return original(rows)

    stream.contexts.next_batch = breaks  # type: ignore[method-assign]
    for expected in whole:
        batch = stream.next_batch()
        assert batch is not None and expected is not None
        assert torch.equal(batch.token_ids, expected.token_ids)
    state = stream.state_dict()
    with pytest.raises(UserError, match="the network is gone"):
        stream.next_batch()
    assert stream.state_dict() == state and state["batches"] == 2
    again, expected = stream.next_batch(), third
    assert again is not None and expected is not None
    assert torch.equal(again.token_ids, expected.token_ids), "the batch was skipped"


@pytest.mark.parametrize("ahead", [False, True])
def test_a_batch_whose_pass_failed_is_not_skipped(
    shared_lm: Shared, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    stream, begin, passes = stream_of(shared_lm(), TEXT), ForwardPass.begin, 0
    stream.reads_ahead = ahead

    def fails_once(*arguments: Any) -> ForwardPass:
        nonlocal passes
        passes += 1
        if passes == 2:
            raise torch.OutOfMemoryError("no room for this pass")
        return begin(*arguments)

    monkeypatch.setattr(ForwardPass, "begin", fails_once)
    assert stream.next_batch() is not None
    with pytest.raises(torch.OutOfMemoryError):
        stream.next_batch()
    batch = stream.next_batch()
    assert batch is not None and int(batch.contexts.min()) == 4


def test_a_batch_that_fails_late_counts_once(
    shared_lm: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its medians are in the running sums by then."""
    lm = shared_lm()
    undisturbed, stream, rows, calls = stream_of(lm, TEXT), stream_of(lm, TEXT), ForwardPass.rows, 0

    def fails_once(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("no room for the rows")
        return rows(*arguments)

    assert undisturbed.next_batch() is not None and undisturbed.next_batch() is not None
    monkeypatch.setattr(ForwardPass, "rows", fails_once)
    assert stream.next_batch() is not None
    with pytest.raises(torch.OutOfMemoryError):
        stream.next_batch()
    assert stream.next_batch() is not None
    assert stream.state_dict() == undisturbed.state_dict()
