"""The hand-built model does what its construction says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.circuits.circuit import find_circuit
from saesteer.mechanisms.circuits.groups import Group
from saesteer.mechanisms.config import PatchConfig
from saesteer.mechanisms.data.encoding import encode_pairs
from saesteer.mechanisms.data.pairs import Pair, load_pairs
from saesteer.mechanisms.patching.engine import PatchEngine
from saesteer.mechanisms.patching.grid import patch
from saesteer.mechanisms.patching.sites import Node, Patch, read_values
from saesteer.mechanisms.toys.hand_built import (
    DECOY,
    FETCHER,
    MOVER,
    SPARE,
    hand_built,
    hand_built_model,
    hand_built_scenes,
)
from saesteer.sae.model.attention import head_tap
from saesteer.sae.model.language_model import LanguageModel, load_model


def test_it_answers_every_scene(toy: LanguageModel) -> None:
    pairs, dropped = encode_pairs(toy, hand_built_scenes(50, 1))
    assert dropped == []
    for pair in pairs:
        both = [toy.model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in
                (pair.clean, pair.corrupt)]  # fmt: skip
        assert int(both[0].argmax()) == pair.answer
        assert float(both[0][pair.answer]) == pytest.approx(10, abs=1e-3)
        assert float(both[1][pair.answer]) == 0


def test_its_heads_attend_as_meant(toy: LanguageModel, scenes: list[Pair]) -> None:
    (pair,), _ = encode_pairs(toy, scenes[:1])
    last, seen = len(pair.clean) - 1, {}
    with head_tap(toy) as tap:
        for layer in (0, 1):
            tap.edits[layer, "pattern"] = lambda p, layer=layer: seen.update({layer: p})
        toy.model(input_ids=torch.tensor([pair.clean]))
    before = seen[MOVER[0]][0, MOVER[1]]
    assert torch.equal(before.argmax(-1)[1:], torch.arange(last))
    assert (before.amax(-1) > 1 - 1e-6).all()
    fetched = seen[FETCHER[0]][0, FETCHER[1], last]
    assert int(fetched.argmax()) == pair.place("object")[0] and float(fetched.max()) > 1 - 1e-6


def test_a_redundant_head_hides_from_single_patches(scenes: list[Pair]) -> None:
    lm = hand_built_model(redundant=True)
    config = PatchConfig(sites=("z",), at=("last",), layers=(1,), metric="prob-ratio")
    result = patch(lm, scenes, config)
    single = np.array([row["effect"] for row in result.summary])
    assert (np.abs(single) < 0.05).all()
    (pair,), _ = encode_pairs(lm, scenes[:1])
    nodes = [Node("z", *FETCHER), Node("z", *SPARE)]
    at = [len(pair.clean) - 1, len(pair.corrupt) - 1]
    with head_tap(lm) as tap:
        values, _ = read_values(lm, pair.corrupt, [(node, at[1]) for node in nodes], tap)
        engine = PatchEngine(lm, pair.clean, tap)
        both = [[Patch(node, at[0], v) for node, v in zip(nodes, values, strict=True)]]
        ((_, logits),) = engine.run(both)
    before, after = (x.softmax(-1)[pair.answer] for x in (engine.logits, logits[0]))
    assert float(before) > 0.99 and float(after) < 0.1


def test_a_decoy_holds_the_label_and_does_nothing(scenes: list[Pair]) -> None:
    """Readable is not causal: its output tells the scenes apart, and no patch of it moves them."""
    lm = hand_built_model(decoy=True)
    pairs, _ = encode_pairs(lm, scenes)
    for pair in pairs[:2]:
        logits = lm.model(input_ids=torch.tensor([pair.clean])).logits[0, -1]
        assert float(logits[pair.answer]) == pytest.approx(10, abs=1e-3)
    both = [
        read_values(lm, ids, [(Node("z", *head), pairs[0].place("object")[0])
                              for head in (MOVER, DECOY)])[0]
        for ids in (pairs[0].clean, pairs[0].corrupt)
    ]  # fmt: skip
    for mover, decoy in both:
        torch.testing.assert_close(mover, decoy)
    assert not torch.equal(both[0][1], both[1][1])
    result = patch(lm, scenes, PatchConfig(sites=("z",), at=("object", "last")))
    found = {(row["layer"], row["head"], row["at"]): row["effect"] for row in result.summary}
    assert found[(*MOVER, "object")] == pytest.approx(-10, abs=1e-3)
    assert found[(*DECOY, "object")] == pytest.approx(0, abs=1e-5)
    groups = (Group("fetcher", "last", "logits"), Group("mover", "object", "fetcher", "k"))
    circuit = find_circuit(lm, pairs, groups)
    assert [g.heads for g in circuit.groups] == [(FETCHER,), (MOVER,)]


def test_its_folder_opens_as_any_other(tmp_path: Path) -> None:
    folder = hand_built(tmp_path, scenes=3, seed=5)
    lm = load_model(str(folder / "model"), dtype="float32")
    assert lm.n_layers == 2
    pairs = load_pairs(folder / "scenes.jsonl")
    assert pairs == hand_built_scenes(3, 5)
    result = patch(lm, pairs, PatchConfig(sites=("z",), check_chance=False))
    found = {(row["layer"], row["head"]): row["effect"] for row in result.summary}
    assert found[FETCHER] == pytest.approx(-10, abs=1e-3)
    with pytest.raises(UsageError, match="`scenes` must be at least 1, got 0"):
        hand_built(tmp_path, scenes=0)
