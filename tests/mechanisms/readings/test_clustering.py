"""Clusters that were planted are found, within inputs as well."""

import json

import numpy as np
import pytest

from saesteer.checkpoints.errors import UserError
from saesteer.mechanisms.data.states import StateRow
from saesteer.mechanisms.reading_config import ProbeConfig
from saesteer.mechanisms.readings.clustering import (
    centroids,
    cluster,
    cluster_states,
    held_out_distances,
)
from saesteer.mechanisms.reports.saving import render_reading

from ..families import Make, double

QUICK = ProbeConfig(n_init=2)
ROWS = [
    StateRow(f"{i}", f"task {k}", f"task {k} {i % 2}", f"x{x}", answers={f"task {k}": "y"})
    for k in range(3)
    for x in range(4)
    for i in range(8)
]


def planted(label: float, by_input: float, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed)
    labels = {f"task {k}": label * drawn.normal(size=16) for k in range(3)}
    inputs = {f"x{x}": by_input * drawn.normal(size=16) for x in range(4)}
    noise = drawn.normal(0, 0.1, (len(ROWS), 16))
    return noise + np.stack([labels[row.label] + inputs[row.input] for row in ROWS])


def test_planted_labels() -> None:
    found = cluster_states(planted(1.0, 0.0), ROWS, 3, QUICK)
    assert found["ari_label"] == found["purity"] == found["v"] == pytest.approx(1)
    assert abs(found["ari_input"]) < 0.1 and 0.2 < found["ari_group"] < 0.8


def test_labels_inside_inputs_are_seen_within() -> None:
    """Where inputs split the states more, the plain index sees little."""
    found = cluster_states(planted(0.7, 5.0), ROWS, 3, QUICK)
    assert found["within"] == pytest.approx(1) and found["ari_label"] < 0.2


def test_nothing_planted() -> None:
    found = cluster_states(planted(0.0, 0.0), ROWS, 3, QUICK)
    assert abs(found["ari_label"]) < 0.15 and abs(found["within"]) < 0.3
    same = cluster_states(np.ones((len(ROWS), 4)), ROWS, 3, QUICK)
    assert same["ari_label"] == 0 and same["within"] == 0


def test_distances_of_held_out_rows() -> None:
    base = planted(1.0, 0.0)
    drawn = np.random.default_rng(1)
    states = np.concatenate([base, base + drawn.normal(0, 1.2, base.shape)])
    held = [StateRow(r.text, r.label, r.group, r.input, "inputs") for r in ROWS]
    rows = [*ROWS, *held]
    centres = centroids(states, rows, [row.label for row in rows])
    names = list(centres)
    gaps = np.linalg.norm(states[:, None] - np.stack([*centres.values()])[None], axis=-1)
    nearest = np.array([names[i] for i in gaps.argmin(1)])
    right = nearest == np.array([row.label for row in rows])
    (found,) = held_out_distances(states, rows, right, 0)
    assert found["split"] == "inputs" and found["n"] == len(ROWS)
    assert found["accuracy"] == pytest.approx(found["nearest_centroid"])
    assert found["slope"] > found["low"] > 0
    (every,) = held_out_distances(states, rows, np.ones(len(rows), dtype=bool), 0)
    assert every["slope"] is None


def test_models_in_a_row(tiny_lm: Make) -> None:
    models = [double(lambda f, s=s: tiny_lm(f, seed=s), "llama") for s in (0, 1)]
    models[1].name = "steps/2"
    rows = [
        StateRow(f"{word} {x}", word, f"{word}{i}", x, split, {"a": " x", "b": " y"})
        for word in ("a", "b")
        for i, (x, split) in enumerate((("one", "train"), ("two", "train"), ("six", "inputs")))
    ]
    found = cluster(models, rows, QUICK, at=("last",))
    assert len(found.rows) == 2 * 5 and {row["model"] for row in found.rows} == {"llama", "2"}
    assert len(found.accuracy) == 2 and set(found.accuracy[0]) == {"model", "train", "inputs"}
    assert len(found.unseen) == 5 and "2 models" in repr(found)
    assert "Unseen instances" in render_reading(found)
    json.dumps(found.document())
    with pytest.raises(UserError, match="labels among"):
        cluster(models, rows[:1], QUICK)
