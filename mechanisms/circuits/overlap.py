"""How far two models' circuits are the same heads at the same positions."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.circuits.circuit import Circuit, Head

DRAWS = 1_000


@dataclass(frozen=True)
class CircuitOverlap:
    """A base model's circuit against a tuned one's, found on the same pairs."""

    tuned: tuple[tuple[str, tuple[Head, ...]], ...]
    """(group, heads) of the tuned model."""
    jaccard: float
    """Heads at positions that are in both, over those in either."""
    kept: float
    """Share of the base's heads that are in the tuned circuit."""
    random: float
    """Mean Jaccard of random circuits with as many heads at each position in either model."""

    def document(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def circuit_overlap(base: Circuit, tuned: Circuit, *, seed: int = 0) -> CircuitOverlap:
    """Compare two circuits of models of one form. Raises UsageError for others."""
    sizes = [(c.model["n_layers"], c.model["n_heads"]) for c in (base, tuned)]
    if sizes[0] != sizes[1]:
        raise UsageError(f"circuits need models of one form, got {sizes[0]} and {sizes[1]}")
    ours, theirs = _places(base), _places(tuned)
    drawn = np.random.default_rng(seed)
    count = sizes[0][0] * sizes[0][1]
    ats = sorted({at for at, _ in ours | theirs})
    by_chance = []
    for _ in range(DRAWS):
        both = [
            {
                (at, int(i))
                for at in ats
                for i in drawn.choice(count, sum(at == a for a, _ in own), replace=False)
            }
            for own in (ours, theirs)
        ]
        by_chance.append(_jaccard(*both))
    return CircuitOverlap(
        tuple((g.group.name, g.heads) for g in tuned.groups),
        _jaccard(ours, theirs),
        len(ours & theirs) / len(ours) if ours else 1.0,
        float(np.mean(by_chance)),
    )


def _places(circuit: Circuit) -> set[tuple[str, Any]]:
    return {(g.group.at, head) for g in circuit.groups for head in g.heads}


def _jaccard(a: set[Any], b: set[Any]) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0
