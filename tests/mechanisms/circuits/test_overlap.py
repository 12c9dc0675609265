"""Two circuits compared: equal, apart, and by chance as often as counting says."""

import pytest

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.circuits.circuit import Circuit, FoundGroup
from saesteer.mechanisms.circuits.groups import Group
from saesteer.mechanisms.circuits.overlap import circuit_overlap

FETCH, MOVE = Group("fetcher", "last", "logits"), Group("mover", "object", "fetcher", "k")


def circuit(*groups: tuple[tuple[int, int], ...], n_heads: int = 3) -> Circuit:
    found = [FoundGroup(g, heads) for g, heads in zip((FETCH, MOVE), groups, strict=True)]
    return Circuit({"name": "m", "n_layers": 2, "n_heads": n_heads}, tuple(found))


def test_overlap() -> None:
    one = circuit(((1, 1),), ((0, 0), (0, 1)))
    same = circuit_overlap(one, one)
    assert same.jaccard == same.kept == 1
    part = circuit_overlap(one, circuit(((1, 1), (1, 0)), ((0, 2),)))
    assert part.jaccard == pytest.approx(1 / 5) and part.kept == pytest.approx(1 / 3)
    assert part.tuned == (("fetcher", ((1, 1), (1, 0))), ("mover", ((0, 2),)))
    # The same head at another position is another place.
    moved = circuit_overlap(circuit(((0, 0),), ()), circuit((), ((0, 0),)))
    assert moved.jaccard == moved.kept == 0
    with pytest.raises(UsageError, match="circuits need models of one form"):
        circuit_overlap(one, circuit(((1, 1),), (), n_heads=4))


def test_chance() -> None:
    """One head of six in either circuit is the same one in six draws: 4 standard errors."""
    found = circuit_overlap(circuit(((1, 1),), ()), circuit(((0, 0),), ()))
    assert found.random == pytest.approx(1 / 6, abs=4 * (5 / 36 / 1000) ** 0.5)
