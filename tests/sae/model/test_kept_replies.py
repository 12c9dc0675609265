"""Replies that were given before are not sampled again, and only where they would be the same."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saesteer.sae.model import kept_replies
from saesteer.sae.model.generation import Completion, generate
from saesteer.sae.model.kept_replies import KeptReplies, keep_replies
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import encode_prompt

Fresh = Callable[..., LanguageModel]


def ask(lm: LanguageModel, **options: Any) -> list[Completion]:
    prompts = [encode_prompt(lm, f"question {'very ' * i}long", chat=True) for i in range(5)]
    settings = {"max_new_tokens": 6, "temperature": 0.8, "top_p": 0.9, "batch_size": 2, **options}
    return generate(lm, prompts, **settings)


@pytest.fixture
def calls(fresh_lm: Fresh, monkeypatch: pytest.MonkeyPatch) -> tuple[LanguageModel, list[int]]:
    """A model, and the rows of each batch that it is run on."""
    lm, found = fresh_lm(), []
    own = type(lm.model).generate

    def counted(self: Any, **options: Any) -> Any:
        found.append(len(options["input_ids"]))
        return own(self, **options)

    monkeypatch.setattr(type(lm.model), "generate", counted)
    return lm, found


Calls = tuple[LanguageModel, list[int]]


def test_the_same_again_runs_nothing(calls: Calls, tmp_path: Path) -> None:
    lm, ran = calls
    plain = ask(lm)
    with keep_replies(tmp_path / "replies"):
        first, second = ask(lm), ask(lm)
    assert plain == first == second and ran == [2, 2, 1] * 2
    # What a stop has left out is run, and nothing else.
    next((tmp_path / "replies").iterdir()).unlink()
    with keep_replies(tmp_path / "replies"):
        assert ask(lm) == plain
    assert len(ran) == 7


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"temperature": 0.9}, {"top_p": 0.5}, {"max_new_tokens": 7}, {"batch_size": 5}],
)
def test_other_settings_are_other_replies(
    change: dict[str, Any], calls: Calls, tmp_path: Path
) -> None:
    lm, ran = calls
    with keep_replies(tmp_path):
        ask(lm)
        before = len(ran)
        ask(lm, **change)
    assert len(ran) > before


def test_a_changed_model_keeps_nothing(calls: Calls, tmp_path: Path) -> None:
    lm, ran = calls
    with keep_replies(tmp_path):
        plain = ask(lm)
        handle = lm.blocks[1].register_forward_hook(lambda module, args, output: output * -3)
        try:
            assert ask(lm) != plain
        finally:
            handle.remove()
        assert ask(lm) == plain and len(list(tmp_path.iterdir())) == 3
        lm.fingerprint = "another"
        ask(lm)
    assert len(list(tmp_path.iterdir())) == 6


def test_a_damaged_file_is_made_anew(calls: Calls, tmp_path: Path) -> None:
    lm, _ = calls
    with keep_replies(tmp_path):
        plain = ask(lm)
        files = sorted(tmp_path.iterdir())
        files[0].write_text("[[1, 2")
        files[1].write_text("[]")
        files[2].write_text('{"a": 1}')
        assert ask(lm) == plain == ask(lm)


def test_the_oldest_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_replies, "_MOST_FILES", 16)
    kept = KeptReplies(tmp_path, {})
    for number in range(16):
        kept.put([[number]], 0, [[number]])
        os.utime(kept._file([[number]], 0), (number, number))
    assert kept.get([[0]], 0) == [[0]]  # used again, so it is not among the oldest
    kept.put([[16]], 0, [[16]])
    there = [number for number in range(17) if kept.get([[number]], 0) is not None]
    assert there == [0, *range(3, 17)]


def test_a_disk_that_takes_nothing_stops_nobody(calls: Calls, tmp_path: Path) -> None:
    lm, _ = calls
    (tmp_path / "file").write_text("")
    with keep_replies(tmp_path / "file" / "folder"):
        assert ask(lm) == ask(lm)
