"""The trained pair: rows ask for what their scene says; the folder opens; training works (slow)."""

import random
from pathlib import Path

import pytest

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.circuits.groups import read_groups
from saesteer.mechanisms.circuits.study import study_circuit
from saesteer.mechanisms.config import CircuitConfig, ToyConfig
from saesteer.mechanisms.data.pairs import load_pairs
from saesteer.mechanisms.toys.boxes_model import _rows, train_boxes
from saesteer.mechanisms.toys.hand_built import WORDS
from saesteer.sae.model.language_model import load_model


def test_rows_ask_for_what_their_scene_says() -> None:
    ids, labels = _rows((3,), 5, 2, random.Random(0))
    assert ids.shape == labels.shape == (5, 1 + 3 * 3 - 1 + 2 * 3)
    for row, marks in zip(ids.tolist(), labels.tolist(), strict=True):
        words = [WORDS[i] for i in row]
        scene = dict(zip(words[1:9:3], words[2:9:3], strict=True))
        for place, mark in enumerate(marks):
            assert (mark >= 0) == (place in (11, 14))
            if mark >= 0:
                assert row[place] == mark and scene[words[place - 1]] == words[place]


def test_the_folder(tmp_path: Path) -> None:
    config = ToyConfig(steps=2, tuning_steps=1, batch=4, queries=1)
    found = train_boxes(tmp_path, config, scenes=3)
    assert set(found["accuracy"]) == {"base", "tuned"}
    assert set(found["accuracy"]["base"]) == {2, 3, 4, 5, 6, 7}
    base, tuned = (load_model(str(tmp_path / name), dtype="float32") for name in ("base", "tuned"))
    assert base.fingerprint != tuned.fingerprint and base.n_layers == 2
    pairs = load_pairs(tmp_path / "scenes.jsonl")
    assert len(pairs) == 3 and pairs[0].chance == pytest.approx(1 / 7)
    assert read_groups(tmp_path / "groups.yaml")[1].at == "object"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"lr": 0.0}, "`lr` must be above 0"),
        ({"heads": 3}, "`heads` must be even and divide `d_model` 64, got 3"),
    ],
)
def test_bad_settings(settings: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ToyConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.slow
def test_tuning_strengthens_what_the_base_does(tmp_path: Path) -> None:
    found = train_boxes(tmp_path)["accuracy"]
    assert found["base"][4] > 0.9 and found["tuned"][7] > 0.95
    assert found["tuned"][7] > found["base"][7]
    study = study_circuit(
        str(tmp_path / "base"), load_pairs(tmp_path / "scenes.jsonl", n=60),
        read_groups(tmp_path / "groups.yaml"), CircuitConfig(draws=4, random=4),
        cross=str(tmp_path / "tuned"),
    )  # fmt: skip
    assert study.cross is not None and study.cross.tuned > study.cross.base
    assert {"circuit", "random", "every head"} <= set(study.cross.recovered)
