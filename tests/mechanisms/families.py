"""Tiny models of every family in float64, where references are exact."""

from collections.abc import Callable
from typing import Any

import pytest

from saesteer.sae.model.language_model import LanguageModel, wrap_model

from ..conftest import FAMILIES

Make = Callable[..., tuple[Any, Any]]
QUICK = ("llama", "gemma2", "gpt2", "gpt_neox", "mixtral")
"""Gates, post-norms and soft-caps, biases and positions, parallel blocks, experts; the others are
slow tests."""
EVERY = [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES]


def double(tiny_lm: Make, family: str) -> LanguageModel:
    """The model; Mixtral stays float32, whose experts know no float64."""
    model, tokenizer = tiny_lm(family)
    return wrap_model(model if family == "mixtral" else model.double(), tokenizer, family)


def close(family: str) -> float:
    """Rounding that is allowed."""
    return 1e-5 if family == "mixtral" else 1e-12
