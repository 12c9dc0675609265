"""Probes find planted labels, and no label that only a wording tells."""

import sys

import numpy as np
import pytest

from saesteer.checkpoints.errors import UserError
from saesteer.mechanisms.data.states import StateRow, task_states
from saesteer.mechanisms.reading_config import ProbeConfig
from saesteer.mechanisms.readings.separability import probe, separability
from saesteer.mechanisms.reports.saving import render_reading

from ..families import Make, double

GROUPS = [f"g{i}" for i in range(20) for _ in range(6)]
LABELS = [f"l{i % 2}" for i in range(20) for _ in range(6)]


def states(label: float, group: float, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed)
    own = {name: drawn.normal(size=12) for name in dict.fromkeys(GROUPS)}
    signs = np.array([1.0 if one == "l0" else -1.0 for one in LABELS])
    found = drawn.normal(0, 0.3, (len(GROUPS), 12))
    found += group * np.stack([own[name] for name in GROUPS])
    found[:, 0] += label * signs
    return found


def test_a_planted_label_is_told() -> None:
    found = separability(states(2.0, 0.3), LABELS, GROUPS, ProbeConfig())
    assert found["accuracy"] > 0.95 and found["low"] > 0.9
    assert found["selectivity"] > 0.25


def test_groups_stay_on_one_side() -> None:
    """States that hold the group alone tell nothing of the label of another group."""
    found = separability(states(0.0, 3.0), LABELS, GROUPS, ProbeConfig())
    assert found["accuracy"] < 0.75 and abs(found["selectivity"]) < 0.3


def test_layers_positions_and_controls(tiny_lm: Make) -> None:
    lm = double(tiny_lm, "llama")
    rows = task_states(["french", "question"], 1, 0)
    found = probe(lm, rows, ProbeConfig(folds=2, shuffles=1), at=("last",))
    assert [row["layer"] for row in found.rows] == [0, 1, 2, 3, 4] and found.n_rows == len(rows)
    assert all(0 <= row["accuracy"] <= 1 for row in found.rows) and 0 <= found.bag_of_words <= 1
    assert "never on both sides" in render_reading(found) and len(found.to_frame()) == 5
    assert "2 labels" in repr(found)


def test_bad_states(tiny_lm: Make) -> None:
    lm = double(tiny_lm, "llama")
    rows = [StateRow(f"text {i}", "a", f"g{i}") for i in range(6)]
    with pytest.raises(UserError, match="1 label"):
        probe(lm, rows)
    with pytest.raises(UserError, match="label 'b' has 1 groups"):
        probe(lm, [*rows, StateRow("other", "b", "x")])


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(UserError, match=r"pip install 'saesteer\[mechanisms\]'"):
        separability(states(1.0, 1.0), LABELS, GROUPS, ProbeConfig())
