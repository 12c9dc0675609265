"""Heads of another model, put into this one, bring back exactly what was taken from it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.circuits.circuit import Circuit, FoundGroup
from saesteer.mechanisms.circuits.crossing import cross_patch
from saesteer.mechanisms.circuits.groups import Group
from saesteer.mechanisms.config import CircuitConfig
from saesteer.mechanisms.data.encoding import encode_pairs
from saesteer.mechanisms.data.pairs import Pair
from saesteer.mechanisms.toys.hand_built import hand_built_model
from saesteer.sae.model.language_model import LanguageModel, wrap_model

Make = Callable[..., tuple[Any, Any]]
FETCH, MOVE = Group("fetcher", "last", "logits"), Group("mover", "object", "fetcher", "k")
CIRCUIT = Circuit({"name": "hand-built", "n_layers": 2, "n_heads": 3},
                  (FoundGroup(FETCH, ((1, 1),)), FoundGroup(MOVE, ((0, 0),))))  # fmt: skip


def without(site: str, layer: int, head: int) -> LanguageModel:
    """The hand-built model with one head's weights of v or k set to 0."""
    lm = hand_built_model()
    weight = getattr(lm.model.model.layers[layer].self_attn, f"{site}_proj").weight
    dh = lm.model.config.head_dim
    with torch.no_grad():
        weight[head * dh : (head + 1) * dh] = 0
    return wrap_model(lm.model, lm.tokenizer, "maimed")


def test_what_a_head_lacks_comes_back_with_it(toy: LanguageModel, scenes: list[Pair]) -> None:
    pairs, _ = encode_pairs(toy, scenes)
    base = without("v", 1, 1)
    report = cross_patch(base, toy, CIRCUIT, pairs, CircuitConfig(random=4))
    assert report.base == 0 and report.tuned == pytest.approx(10, abs=1e-3)
    assert report.accuracy["tuned"] == report.accuracy["circuit"] == 1
    found = {name: figure.value for name, figure in report.recovered.items()}
    assert found["fetcher"] == found["circuit"] == pytest.approx(1, abs=1e-3)
    assert found["every head"] == pytest.approx(1, abs=1e-3) and found["mover"] == 0
    assert 0 <= found["random"] < 1 and "fetcher 1.00 [1.00, 1.00]" in repr(report)
    broken = cross_patch(without("k", 0, 0), toy, CIRCUIT, pairs, CircuitConfig(random=0))
    # The head before it, at the object, is enough: the fetcher's keys come from there.
    assert broken.recovered["mover"].value > 0.9
    assert "random" not in broken.recovered


def test_models_of_another_form(toy: LanguageModel, scenes: list[Pair], tiny_lm: Make) -> None:
    pairs, _ = encode_pairs(toy, scenes)
    with pytest.raises(UsageError, match="`cross` needs models of one form, got 2 blocks of 3"):
        cross_patch(toy, wrap_model(*tiny_lm()), CIRCUIT, pairs)
    other = hand_built_model()
    foreign = wrap_model(other.model, wrap_model(*tiny_lm()).tokenizer, "foreign")
    with pytest.raises(UsageError, match="models of one tokenizer: .* other token ids in foreign"):
        cross_patch(toy, foreign, CIRCUIT, pairs)
