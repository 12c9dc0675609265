"""The model's own replies: sampled once, seeded, and never from contents kept for tests."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from saesteer.checkpoints.errors import UserError
from saesteer.sae.config import TextConfig
from saesteer.sae.model.generation import Completion, generate
from saesteer.sae.model.language_model import LanguageModel, wrap_model
from saesteer.sae.text import replies as replies_module
from saesteer.sae.text.contexts import open_contexts
from saesteer.sae.text.prompts import encode_prompt
from saesteer.sae.text.replies import ReplyConfig, sample_replies
from saesteer.steering.tasks.task import load_task, reply_prompts

Shared = Callable[..., LanguageModel]

CONFIG = ReplyConfig(max_new_tokens=8, batch_size=4)
PROMPTS = ["Name a river.", "Say hello to the old man in French", "One word: blue", "assistant"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_chat_model_answers_in_messages(shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm()
    path = sample_replies(lm, PROMPTS, tmp_path / "new", CONFIG)
    expected = generate(
        lm, [encode_prompt(lm, text, chat=True) for text in PROMPTS],
        max_new_tokens=8, temperature=0.8, top_p=0.95, seed=0, batch_size=4,
    )  # fmt: skip
    pairs = [(p, r.text) for p, r in zip(PROMPTS, expected, strict=True) if r.text]
    assert rows_of(path) == [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": r}]}
        for p, r in pairs
    ]
    assert path.parent == tmp_path / "new"


def test_a_base_model_goes_on_where_the_prompt_ends(shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm(chat=False)
    rows = rows_of(sample_replies(lm, PROMPTS, tmp_path, CONFIG))
    made = generate(
        lm, [encode_prompt(lm, text, chat=False) for text in PROMPTS],
        max_new_tokens=8, temperature=0.8, top_p=0.95, seed=0, batch_size=4,
    )  # fmt: skip
    expected = [
        lm.tokenizer.decode([*lm.tokenizer(p)["input_ids"], *r.token_ids])
        for p, r in zip(PROMPTS, made, strict=True)
        if r.text
    ]
    assert rows == [{"text": text} for text in expected]


def test_replies_are_sampled_once(
    shared_lm: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = shared_lm()
    first = sample_replies(lm, PROMPTS, tmp_path, CONFIG)
    content = first.read_bytes()

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("sampled again")

    with monkeypatch.context() as patch:
        patch.setattr(replies_module, "generate", never)
        assert sample_replies(lm, PROMPTS, tmp_path, CONFIG) == first
    first.unlink()
    assert sample_replies(lm, PROMPTS, tmp_path, CONFIG).read_bytes() == content


def test_another_model_prompt_setting_or_template_is_another_file(
    fresh_lm: Shared, tmp_path: Path
) -> None:
    lm, other = fresh_lm(), fresh_lm(seed=1)
    paths = [
        sample_replies(lm, PROMPTS, tmp_path, CONFIG),
        sample_replies(other, PROMPTS, tmp_path, CONFIG),
        sample_replies(lm, PROMPTS[:3], tmp_path, CONFIG),
        sample_replies(lm, PROMPTS, tmp_path, replace(CONFIG, seed=1)),
    ]
    lm.tokenizer.chat_template = None
    paths.append(sample_replies(lm, PROMPTS, tmp_path, CONFIG))
    assert len(set(paths)) == 5
    contents = [path.read_bytes() for path in paths]
    assert len(set(contents)) == 5


def test_nothing_asked_or_nothing_said(
    shared_lm: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="`replies` names tasks without a single prompt"):
        sample_replies(shared_lm(), [], tmp_path)
    silent = [Completion("", [2]), Completion("", [])]
    monkeypatch.setattr(replies_module, "generate", lambda *args, **options: silent)
    with pytest.raises(UserError, match="answered every `replies` prompt with nothing"):
        sample_replies(shared_lm(), PROMPTS[:2], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_progress_ends_where_it_said(shared_lm: Shared, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    sample_replies(
        shared_lm(), PROMPTS, tmp_path, replace(CONFIG, batch_size=2),
        lambda stage, done, total, note: seen.append((stage, done, total)),
    )  # fmt: skip
    assert seen[0] == ("replies", 0, 32) and seen[-1] == ("replies", 32, 32)
    assert sorted(seen) == seen and len(seen) == 4


@pytest.mark.parametrize("chat", [True, False])
def test_only_training_contents_are_answered(chat: bool, shared_lm: Shared, tmp_path: Path) -> None:
    """Neither a development nor a test content of the task is in the text that SAEs train on."""
    lm = shared_lm(chat=chat)
    prompts = [prompt.text for prompt in reply_prompts(["french"], contents=4, plain=1, seed=0)]
    path = sample_replies(lm, prompts, tmp_path, replace(CONFIG, batch_size=16))
    text = path.read_text()
    split = load_task("french").contents
    assert sum(content in text for content in split["train"]) >= 4
    held_out = [*split["dev"], *split["test"]]
    assert len(held_out) > 100 and not any(content in text for content in held_out)
    stream = open_contexts(lm, TextConfig(context=64, replies_share=0.5), path)
    batch = stream.next_batch(4)
    assert batch is not None
    is_reply = (batch.document_ids < -1).any(dim=1)
    assert is_reply.tolist() == [False, True, False, True]
    said = lm.tokenizer.decode(batch.token_ids[1].tolist())
    assert ("<|im_start|>user" in said) == chat


def test_replies_outlive_a_run_that_is_cut_short(
    tiny_lm: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = wrap_model(*tiny_lm(), "tiny")
    config = replace(CONFIG, batch_size=1)
    whole = sample_replies(lm, PROMPTS, tmp_path / "whole", config).read_text()
    generate_whole, batches = lm.model.generate, 0

    def interrupted(**words: Any) -> Any:
        nonlocal batches
        if batches == 2:
            raise KeyboardInterrupt
        batches += 1
        return generate_whole(**words)

    monkeypatch.setattr(lm.model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample_replies(lm, PROMPTS, tmp_path / "cut", config)
    (part,) = (tmp_path / "cut").iterdir()
    part.write_text(part.read_text() + '[3, "cut sh')  # the line that was being written
    batches = 0
    assert sample_replies(lm, PROMPTS, tmp_path / "cut", config).read_text() == whole
    assert batches == 2
    assert [file.suffix for file in (tmp_path / "cut").iterdir()] == [".jsonl"]
