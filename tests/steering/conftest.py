"""The tiny models that the tests of this room steer, each test's own."""

from collections.abc import Callable
from typing import Any

import pytest

from saesteer.sae.model.language_model import LanguageModel, wrap_model


@pytest.fixture
def lm(tiny_lm: Callable[..., tuple[Any, Any]]) -> LanguageModel:
    """A Llama of 4 blocks and width 32."""
    return wrap_model(*tiny_lm("llama"), "tiny")


@pytest.fixture
def endless(lm: LanguageModel) -> None:
    """`usefixtures("endless")`: `lm` writes as many tokens as it is asked for.

    Random models meet the end-of-text token by chance; it would only shorten a comparison.
    """
    lm.model.generation_config.eos_token_id = None


@pytest.fixture
def lm_of(tiny_lm: Callable[..., tuple[Any, Any]]) -> Callable[..., LanguageModel]:
    """`lm_of("gpt2")`: a model of any family; without its chat template, or endless as above."""

    def make(family: str = "llama", *, chat: bool = True, endless: bool = False) -> LanguageModel:
        model, tokenizer = tiny_lm(family)
        if not chat:
            tokenizer.chat_template = None
        if endless:
            model.generation_config.eos_token_id = None
        return wrap_model(model, tokenizer, f"tiny-{family}")

    return make
