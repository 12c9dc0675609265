"""Traces: masses add up, routes are the whole of them, and the known circuit is one route."""

import json

import numpy as np
import pytest

from saesteer.checkpoints.errors import UserError
from saesteer.mechanisms.data.pairs import Pair
from saesteer.mechanisms.reading_config import TraceConfig
from saesteer.mechanisms.reports.saving import render_reading
from saesteer.mechanisms.routes.tracing import compare_traces, trace
from saesteer.sae.model.language_model import LanguageModel

from ..families import EVERY, Make, close, double


@pytest.mark.parametrize("family", EVERY)
def test_routes_add_up_to_every_token(tiny_lm: Make, family: str) -> None:
    """With nothing dropped; two tokens and four blocks of four heads are 6,561 routes, so the last
    two blocks are cut off."""
    lm = double(tiny_lm, family)
    _shorten(lm, 2)
    found = trace(lm, "ab", " c", TraceConfig(beam=10_000, tau=0.0), wrong=" d")
    size = np.abs(found.stream_mass[0]).sum() + 1
    by_token = np.zeros(len(found.tokens))
    for route in found.routes:
        by_token[route.token] += route.mass
    assert np.abs(by_token - found.stream_mass[0]).max() < close(family) * size
    assert abs(found.gap) < close(family) * size and found.explained == pytest.approx(1, abs=1e-4)
    # What a head writes is what it has read, at whichever token.
    assert np.allclose(found.head_mass.sum(-1), found.read_mass.sum(-1), atol=close(family) * size)


def _shorten(lm: LanguageModel, blocks: int) -> None:
    del lm.blocks[blocks:]
    tower = lm.text_model.config
    tower.num_hidden_layers = blocks
    for name in ("layer_types",):
        if getattr(tower, name, None):
            setattr(tower, name, getattr(tower, name)[:blocks])


def test_the_known_circuit_is_one_route(toy: LanguageModel, scenes: list[Pair]) -> None:
    for scene in scenes[:3]:
        found = trace(toy, scene.clean, scene.answer, wrong=scene.wrong)
        (route,) = found.routes
        words = scene.clean.split()
        asked = words.index(str(scene.answer).strip())
        last = len(words) - 1
        assert route.hops == ((1, 1, last, asked),) and route.token == asked
        assert route.mass == pytest.approx(found.logit, abs=1e-4)
        assert found.token_mass[asked] == pytest.approx(found.logit, abs=1e-4)
        assert np.delete(np.abs(found.token_mass), asked).max() < 1e-4
        page = render_reading(found)
        assert "<svg" in page and "not what would happen" in page
        json.dumps(found.document())
        assert "1 routes explain 1.00" in repr(found) and len(found.to_frame()) == 1


def test_a_small_beam_says_what_it_lost(tiny_lm: Make) -> None:
    lm = double(tiny_lm, "llama")
    few = trace(lm, "The cat sat", None, TraceConfig(beam=3, tau=0.0))
    assert len(few.routes) == 3 and few.lost > 0 and few.wrong is None
    assert abs(few.gap) < 1e-12
    none = trace(lm, "The cat sat", None, TraceConfig(tau=0.999999))
    assert len(none.routes) <= 1


def test_two_tasks_are_compared_by_head(toy: LanguageModel, scenes: list[Pair]) -> None:
    found = compare_traces(toy, scenes, at="object")
    best = max(found.summary, key=lambda row: row["difference"])
    # The corrupt scene asks for no box in it: the fetcher reads nothing there.
    assert (best["layer"], best["head"]) == (1, 1)
    assert best["clean"] == pytest.approx(10, abs=1e-3) and best["p_adjusted"] < 0.01
    assert sum(abs(row["difference"]) > 0.01 for row in found.summary) == 1
    assert "Patch the heads" in render_reading(found) and len(found.to_frame()) == 6
    with pytest.raises(UserError, match="no position 'instruction'"):
        compare_traces(toy, scenes)


def test_bad_input(toy: LanguageModel) -> None:
    with pytest.raises(UserError, match="same token"):
        trace(toy, "boxes F apple . F", " apple", wrong=" apple")
