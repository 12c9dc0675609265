"""Fixtures of the tests of `sae`: wrapped tiny models, shards, an interruption."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saesteer.sae.model.language_model import LanguageModel, wrap_model

from .training_runs import write_shards


@pytest.fixture(scope="session")
def shared_lm(tiny_lm: Callable[..., tuple[Any, Any]]) -> Callable[..., LanguageModel]:
    """`shared_lm("llama")`: one wrapped model a family for the session. Never change it."""
    made: dict[tuple[str, bool], LanguageModel] = {}

    def get(family: str = "llama", *, chat: bool = True) -> LanguageModel:
        if (family, chat) not in made:
            model, tokenizer = tiny_lm(family)
            if not chat:
                tokenizer.chat_template = None
            made[family, chat] = wrap_model(model, tokenizer, f"tiny-{family}")
        return made[family, chat]

    return get


@pytest.fixture
def fresh_lm(tiny_lm: Callable[..., tuple[Any, Any]]) -> Callable[..., LanguageModel]:
    """`fresh_lm("llama", seed=1)`: a wrapped model of its own, which the test may change."""

    def make(family: str = "llama", **options: Any) -> LanguageModel:
        return wrap_model(*tiny_lm(family, **options), f"tiny-{family}")

    return make


@pytest.fixture
def stop_at() -> Callable[..., Callable[[str, int, int, str], None]]:
    """`stop_at("train", 512)`: a progress that sends Ctrl-C once a stage has come that far."""
    import signal

    def make(stage: str, done: int) -> Callable[[str, int, int, str], None]:
        pressed = False

        def progress(name: str, now: int, total: int, note: str) -> None:
            nonlocal pressed
            if name == stage and now >= done and not pressed:
                pressed = True
                signal.raise_signal(signal.SIGINT)

        return progress

    return make


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))
