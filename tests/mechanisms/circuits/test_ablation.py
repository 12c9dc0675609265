"""Figures of a circuit: exact on the hand-built model; ablation equals patches made one by one."""

import numpy as np
import pytest
import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.circuits.ablation import Ablation, _random, evaluate_circuit, prune
from saesteer.mechanisms.circuits.circuit import Circuit, FoundGroup
from saesteer.mechanisms.circuits.groups import Group
from saesteer.mechanisms.config import CircuitConfig
from saesteer.mechanisms.data.encoding import EncodedPair, encode_pairs
from saesteer.mechanisms.data.pairs import Pair
from saesteer.mechanisms.patching.reference import patched_logits
from saesteer.mechanisms.patching.sites import Patch, make_nodes, read_values
from saesteer.mechanisms.toys.hand_built import hand_built_model
from saesteer.sae.model.language_model import LanguageModel

FETCH, MOVE = Group("fetcher", "last", "logits"), Group("mover", "object", "fetcher", "k")
FACTS = {"name": "hand-built", "n_layers": 2, "n_heads": 3}


def circuit(*extra: tuple[int, int], fetchers: tuple[tuple[int, int], ...] = ((1, 1),)) -> Circuit:
    return Circuit(FACTS, (FoundGroup(FETCH, fetchers), FoundGroup(MOVE, ((0, 0), *extra))))


@pytest.fixture(scope="module")
def pairs(toy: LanguageModel, scenes: list[Pair]) -> list[EncodedPair]:
    return encode_pairs(toy, scenes)[0]


@pytest.mark.parametrize("how", ["mean-position", "resample"])
def test_the_circuit_does_what_the_model_does(
    toy: LanguageModel, pairs: list[EncodedPair], how: str
) -> None:
    known = circuit()
    report = evaluate_circuit(Ablation(toy, pairs, known, how), known, CircuitConfig(draws=6))
    assert report.ratio.value == pytest.approx(1, abs=1e-4)
    assert report.faithfulness.value == pytest.approx(1, abs=1e-4)
    assert report.accuracy["full"] == report.accuracy["alone"] == 1
    assert all(lost > 1 for _, _, lost in report.minimality)
    if how == "resample":
        # The corrupt scene shares no letter and no thing with the clean one: nothing leaks.
        assert report.nothing.value == pytest.approx(0, abs=1e-4)
        assert report.gap < 1e-4 and max(map(abs, report.random)) < 1e-4
    assert len(report.completeness) == 2 + 6 and len(report.random) == 10
    assert "faithfulness 1.00" in repr(report)


def test_half_a_circuit_is_not_faithful(toy: LanguageModel, pairs: list[EncodedPair]) -> None:
    half = circuit().only(frozenset({("fetcher", (1, 1))}))
    report = evaluate_circuit(Ablation(toy, pairs, half, "resample"), half)
    assert report.faithfulness.value == pytest.approx(0, abs=1e-4)


def test_a_missing_copy_shows_as_incompleteness(scenes: list[Pair]) -> None:
    lm = hand_built_model(redundant=True)
    pairs, _ = encode_pairs(lm, scenes)
    report = evaluate_circuit(Ablation(lm, pairs, circuit(), "resample"), circuit())
    by_name = {name: (alone, without) for name, alone, without in report.completeness}
    # Without the head that was found, its copy still answers; the circuit alone does not.
    alone, without = by_name["fetcher"]
    assert alone == pytest.approx(0, abs=1e-4) and without > 5 and report.gap > 5


def test_heads_that_do_nothing_are_pruned(toy: LanguageModel, pairs: list[EncodedPair]) -> None:
    large = circuit((0, 1), (1, 0), fetchers=((0, 2), (1, 1)))
    smaller = prune(Ablation(toy, pairs, large, "resample"), CircuitConfig())
    assert smaller.members == circuit().members
    assert {head for _, head in smaller.dropped} == {(0, 1), (1, 0), (0, 2)}
    whole = prune(Ablation(toy, pairs, large, "resample"), CircuitConfig(keep=1.0))
    assert whole.members == large.members


@pytest.mark.parametrize("how", ["mean-position", "resample"])
def test_ablation_is_many_patches(toy: LanguageModel, pairs: list[EncodedPair], how: str) -> None:
    known, pair = circuit(), pairs[3]
    found = Ablation(toy, pairs, known, how)
    every = [(node, t) for node in make_nodes(toy, ["z"]) for t in range(len(pair.clean))]
    runs = [pair.corrupt] if how == "resample" else [one.clean for one in pairs]
    read = [read_values(toy, ids, every)[0] for ids in runs]
    values = [torch.stack(column).mean(0) for column in zip(*read, strict=True)]
    kept = {(1, 1, pair.place("last")[0]), (0, 0, pair.place("object")[0])}
    for without in (False, True):
        patches = [
            Patch(node, t, value)
            for (node, t), value in zip(every, values, strict=True)
            if ((node.layer, node.head, t) in kept) == without
        ]
        logits = patched_logits(toy, pair.clean, patches)
        expected = float(logits[pair.answer] - logits[pair.wrong])
        got = found.differences(known.members, without=without)[3]
        assert got == pytest.approx(expected, abs=1e-4)


def test_random_circuits_have_the_size_of_each_position() -> None:
    large = circuit((0, 1), (1, 0), fetchers=((0, 2), (1, 1)))
    drawn = np.random.default_rng(0)
    seen = set()
    for _ in range(40):
        one = _random(large, drawn)
        assert len(one) == len(set(one)) == 5
        assert sum(name == "fetcher" for name, _ in one) == 2
        seen |= {head for _, head in one}
    assert len(seen) == 6


def test_prompts_of_another_form(toy: LanguageModel, pairs: list[EncodedPair]) -> None:
    texts = ["boxes A ball . A", "boxes A ball , B book . A"]
    other = [Pair(t, "boxes C cup . D", " ball", " cup", {"object": ((8, 12), (8, 11))})
             for t in texts]  # fmt: skip
    short = encode_pairs(toy, other)[0]
    with pytest.raises(UsageError, match="mean-position needs prompts of one structure, got 5 to"):
        Ablation(toy, short, circuit(), "mean-position")
    with pytest.raises(UsageError, match="`ablate` resample needs both runs"):
        Ablation(toy, short, circuit(), "resample")
    without = encode_pairs(toy, [Pair(texts[0], "boxes C cup . D", " ball")])[0]
    with pytest.raises(UsageError, match="`pairs` need wrong answers to test a circuit"):
        Ablation(toy, without, circuit(), "resample")
