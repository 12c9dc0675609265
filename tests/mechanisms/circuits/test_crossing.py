"""Heads of another model, put into this one, bring back exactly what was taken from it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.circuits.circuit import Circuit, FoundGroup
from saesteer.mechanisms.circuits.crossing import cross_patch
from saesteer.mechanisms.circuits.groups import Group
from saesteer.mechanisms.circuits.head_inputs import head_inputs, mixed_output
from saesteer.mechanisms.config import CircuitConfig
from saesteer.mechanisms.data.encoding import encode_pairs
from saesteer.mechanisms.data.pairs import Pair
from saesteer.mechanisms.patching.sites import Node, read_values
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
    # What it lacks is its value; what it looks for and where it looks are as they were.
    assert found["fetcher by v"] == found["circuit by v"] == pytest.approx(1, abs=1e-3)
    assert found["fetcher by q"] == found["fetcher by k"] == pytest.approx(0, abs=1e-6)
    assert 0 <= found["random"] < 1 and "fetcher 1.00 [1.00, 1.00]" in repr(report)
    broken = cross_patch(without("k", 0, 0), toy, CIRCUIT, pairs, CircuitConfig(random=0))
    # The head before it, at the object, is enough: the fetcher's keys come from there.
    assert broken.recovered["mover"].value > 0.9
    assert "random" not in broken.recovered


def test_a_head_that_looks_in_the_wrong_place_lacks_its_query(
    toy: LanguageModel, scenes: list[Pair]
) -> None:
    pairs, _ = encode_pairs(toy, scenes)
    report = cross_patch(without("q", 1, 1), toy, CIRCUIT, pairs, CircuitConfig(random=0))
    found = {name: figure.value for name, figure in report.recovered.items()}
    assert found["fetcher by q"] == pytest.approx(1, abs=1e-3)
    assert abs(found["fetcher by k"]) < 1e-6 and abs(found["fetcher by v"]) < 1e-6
    # An earlier group's inputs reach the answer too: its outputs are not frozen again.
    broken = cross_patch(without("q", 0, 0), toy, CIRCUIT, pairs, CircuitConfig(random=0))
    assert broken.recovered["mover by q"].value > 0.9


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_inputs_mixed_anew_are_the_models_own(tiny_lm: Make, family: str) -> None:
    """All three inputs of one model give its z exactly, windows and soft-caps included."""
    ids = [int(x) for x in torch.arange(21) * 17 % 390 + 3]
    one, other = (double(tiny_lm, family, scale) for scale in (1.0, 1.3))
    (own, tap), (theirs, _) = head_inputs(one, ids), head_inputs(other, ids)
    places = [(Node("z", layer, head), at) for layer in (0, 3) for head in (0, 3) for at in (0, 20)]
    z, _ = read_values(one, ids, places)
    their_z, _ = read_values(other, ids, places)
    for (node, at), mine, their in zip(places, z, their_z, strict=True):

        def mixed(taken: str, node: Node = node, at: int = at) -> torch.Tensor:
            return mixed_output(own, theirs, taken, node.layer, node.head or 0, at, tap)

        torch.testing.assert_close(mixed(""), mine, rtol=0, atol=1e-12)
        torch.testing.assert_close(mixed("qkv"), their, rtol=0, atol=1e-12)


def double(tiny_lm: Make, family: str, scale: float) -> LanguageModel:
    model, tokenizer = tiny_lm(family)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight.mul_(scale)
    return wrap_model(model.double(), tokenizer)


def test_models_of_another_form(toy: LanguageModel, scenes: list[Pair], tiny_lm: Make) -> None:
    pairs, _ = encode_pairs(toy, scenes)
    with pytest.raises(UsageError, match="`cross` needs models of one form, got 2 blocks of 3"):
        cross_patch(toy, wrap_model(*tiny_lm()), CIRCUIT, pairs)
    other = hand_built_model()
    foreign = wrap_model(other.model, wrap_model(*tiny_lm()).tokenizer, "foreign")
    with pytest.raises(UsageError, match="models of one tokenizer: .* other token ids in foreign"):
        cross_patch(toy, foreign, CIRCUIT, pairs)
