"""The hand-built circuit is found exactly, from noise nothing is, and its file survives."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from saesteer.checkpoints.errors import UserError
from saesteer.mechanisms.circuits.circuit import (
    Circuit,
    find_circuit,
    load_circuit,
    save_circuit,
    score_heads,
)
from saesteer.mechanisms.circuits.groups import Group
from saesteer.mechanisms.config import CircuitConfig
from saesteer.mechanisms.data.encoding import encode_pairs
from saesteer.mechanisms.data.pairs import Pair
from saesteer.mechanisms.toys.hand_built import hand_built_model
from saesteer.sae.model.language_model import LanguageModel

Array = np.ndarray
GROUPS = (Group("fetcher", "last", "logits"), Group("mover", "object", "fetcher", "k"))


@pytest.fixture(scope="module")
def found(toy: LanguageModel, scenes: list[Pair]) -> Circuit:
    return find_circuit(toy, encode_pairs(toy, scenes)[0], GROUPS)


def test_the_hand_built_circuit(found: Circuit) -> None:
    assert [g.heads for g in found.groups] == [((1, 1),), ((0, 0),)]
    for group, own in zip(found.groups, ((1, 1), (0, 0)), strict=True):
        assert group.scores is not None and group.scores[own] == pytest.approx(-1, abs=1e-3)
        assert group.intervals is not None and (group.intervals[:, *own] < -0.99).all()
        assert (np.abs(np.delete(group.scores.ravel(), 3 * own[0] + own[1])) < 1e-6).all()
    assert repr(found) == "Circuit(hand-built: fetcher 1, mover 1 heads)"
    assert found.only(frozenset({("mover", (0, 0))})).members == {("mover", (0, 0))}


def test_a_path_that_is_not_there(toy: LanguageModel, scenes: list[Pair]) -> None:
    pairs, _ = encode_pairs(toy, scenes)
    by_value = (GROUPS[0], Group("mover", "object", "fetcher", "v"))
    with pytest.raises(UserError, match="no head lowers logit-diff on its way to fetcher from obj"):
        find_circuit(toy, pairs, by_value)
    with pytest.raises(UserError, match="`top` has 1 counts for 2 groups"):
        find_circuit(toy, pairs, GROUPS, CircuitConfig(top=(1,)))


def test_a_copy_shows_in_the_direct_paths(scenes: list[Pair]) -> None:
    lm = hand_built_model(redundant=True)
    config = CircuitConfig(top=(2,))
    circuit = find_circuit(lm, encode_pairs(lm, scenes)[0], GROUPS[:1], config)
    assert circuit.groups[0].heads == ((1, 1), (1, 2))


def chosen(changes: Array, config: CircuitConfig, top: int | None = None) -> list[int]:
    groups = [str(i) for i in range(len(changes))]
    return score_heads(changes, np.ones(len(changes)), groups, config).choose(top, config)


def test_noise_is_chosen_as_seldom_as_promised() -> None:
    drawn = np.random.default_rng(0)
    config = CircuitConfig(least=0.0)
    runs = [chosen(drawn.normal(0, 1, (40, 50)), config) for _ in range(200)]
    # With nothing to find, any choice is false: at most 5 % of runs, 3 standard errors over.
    assert sum(bool(one) for one in runs) <= 0.05 * 200 + 3 * (200 * 0.05 * 0.95) ** 0.5
    planted = drawn.normal(0, 1, (40, 50))
    planted[:, 7] -= 3
    found = chosen(planted, config)
    assert 7 in found and len(found) <= 2
    assert chosen(planted, config, top=2)[0] == 7
    assert chosen(np.full((40, 3), -1e-6), CircuitConfig()) == []


def test_a_pair_of_small_p_does_not_decide() -> None:
    """Where one pair's answer was unlikely, p' / p has no bound: its mean would hide the head."""
    p = np.full(40, 0.9)
    p[0] = 1e-4
    after = 0.7 * p
    after[0] = 0.05
    change = (after - p)[:, None]
    assert (change[:, 0] / p).mean() > 0
    groups = [str(i) for i in range(40)]
    scores = score_heads(change, p, groups, CircuitConfig(score="prob"))
    assert scores.choose(None, CircuitConfig()) == [0]
    assert scores.share[0] == pytest.approx(change.mean() / p.mean()) and scores.share[0] < -0.28
    assert scores.low[0] < scores.share[0] < scores.high[0] < -0.2


def test_a_head_that_often_helps_and_rarely_ruins() -> None:
    """The typical pair and the mean have to agree: an interval across 0 is not taken."""
    change = np.full((40, 1), -0.02)
    change[:2] = 0.6
    config = CircuitConfig(least=0.0)
    scores = score_heads(change, np.ones(40), [str(i) for i in range(40)], config)
    assert scores.p[0] < 0.001 and scores.high[0] > 0 and scores.choose(None, config) == []


def test_a_model_that_has_nothing_to_lose(toy: LanguageModel, scenes: list[Pair]) -> None:
    swapped = [replace(pair, answer=pair.wrong, wrong=pair.answer) for pair in scenes]
    with pytest.raises(UserError, match="nothing to explain: logit-diff of hand-built is -10 on"):
        find_circuit(toy, encode_pairs(toy, swapped)[0], GROUPS)


@pytest.mark.parametrize("score", ["logit-diff", "prob"])
def test_both_scores_find_it(toy: LanguageModel, scenes: list[Pair], score: str) -> None:
    circuit = find_circuit(toy, encode_pairs(toy, scenes)[0], GROUPS, CircuitConfig(score=score))
    assert [g.heads for g in circuit.groups] == [((1, 1),), ((0, 0),)] and circuit.metric == score


def test_the_file(found: Circuit, toy: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    save_circuit(path, found)
    again = load_circuit(path, toy)
    assert again.document() == found.document() and again.members == found.members
    document = json.loads(path.read_text())
    document["model"]["n_heads"] = 8
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="2 blocks of 8 heads, hand-built has 2 of 3"):
        load_circuit(path, toy)
    document["schema_version"] = 2
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="has schema_version 2, known is 1"):
        load_circuit(path)
    for text in ("{", "[]", "{}", '{"groups": 3}'):
        path.write_text(text)
        with pytest.raises(UserError, match="is no circuit.json"):
            load_circuit(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_circuit(tmp_path / "none.json")
