"""One server for all tests of a module."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from saesteer.sae.model.language_model import LanguageModel, wrap_model

from .engine_help import in_float64
from .server_help import Served, serving


@pytest.fixture(scope="module")
def served(tiny_lm: Callable[..., tuple[Any, Any]]) -> Iterator[Served]:
    """A tiny Llama in float64 with plans `one` and `two` and an SAE."""
    with serving(in_float64(wrap_model(*tiny_lm("llama"), "tiny"))) as running:
        yield running


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    """A plain client of that server."""
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def twin(tiny_lm: Callable[..., tuple[Any, Any]]) -> LanguageModel:
    """The model of `served` once more: what `steer` answers is asked of this one."""
    return in_float64(wrap_model(*tiny_lm("llama"), "tiny"))
