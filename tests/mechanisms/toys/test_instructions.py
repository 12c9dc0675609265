"""Symbolic instructions: what is held out stays out, and the model learns what the page says."""

import random
from pathlib import Path

import pytest

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.data.states import read_state_rows
from saesteer.mechanisms.reading_config import ProbeConfig, SymbolsConfig
from saesteer.mechanisms.readings.clustering import cluster
from saesteer.mechanisms.readings.moving import move_centroids
from saesteer.mechanisms.toys.instructions import (
    INPUTS,
    WORDS,
    _batch,
    _cells,
    instruction,
    make_symbols,
    symbol_states,
    train_instructions,
)


def test_what_is_held_out_is_never_trained_on() -> None:
    config = SymbolsConfig()
    symbols = make_symbols(config)
    pool = [cell for cell in _cells(symbols) if cell[3] == "train"]
    held = [cell for cell in _cells(symbols) if cell[3] != "train"]
    # Of each of 8 tasks: 4 templates without one input, and one with one input.
    assert len(pool) == 8 * (4 * 4 + 1) and len(held) == 8 * (4 + 4)
    drawn = random.Random(0)
    anchors = {(k, m): set(t) for k, own in enumerate(symbols.templates) for m, t in enumerate(own)}
    shown = {
        (tuple(w for w in map(WORDS.__getitem__, row) if w[0] == "a"), WORDS[row[-2]])
        for _ in range(6) for row in _batch(symbols, pool, config, drawn)
    }  # fmt: skip
    for task, template, given, _ in held:
        words = tuple(f"a{i}" for i in symbols.templates[task][template])
        assert (words, INPUTS[given]) not in shown
    assert len(anchors) == 40
    # Every input of a task is known from other templates.
    for task in range(8):
        assert {given for k, _, given, _ in pool if k == task} == set(range(5))


def test_fillers_are_split() -> None:
    drawn = random.Random(0)
    kept = {" ".join(instruction(drawn, (1, 2, 3), held_out=False)) for _ in range(400)}
    held = {" ".join(instruction(drawn, (1, 2, 3), held_out=True)) for _ in range(400)}
    assert not kept & held and len(kept) > 100 and len(held) > 50


def test_states_have_every_split_and_answer() -> None:
    symbols = make_symbols(SymbolsConfig())
    rows = symbol_states(symbols, 20, 0)
    assert [sum(row.split == s for row in rows) for s in ("train", "fillers", "inputs",
            "templates")] == [20] * 4  # fmt: skip
    for row in rows:
        assert len(row.answers) == 8 and row.text.endswith(row.input)
        start, end = row.positions["instruction"]
        assert row.text[start:end] + " " + row.input == row.text
    assert make_symbols(SymbolsConfig()) == symbols != make_symbols(SymbolsConfig(seed=1))


def test_a_short_training_writes_what_probe_reads(tmp_path: Path) -> None:
    config = SymbolsConfig(tasks=2, steps=40, every=20, blocks=1, d_model=32, heads=2, lr=1e-2,
                           batch=32, loss="all")  # fmt: skip
    document = train_instructions(tmp_path, config, states=20)
    assert list(document["accuracy"]) == ["00000", "00020", "00040"]
    assert document["accuracy"]["00040"]["train"] > document["accuracy"]["00000"]["train"]
    assert {path.name for path in (tmp_path / "steps").iterdir()} == set(document["accuracy"])
    assert len(read_state_rows(tmp_path / "states.jsonl")) == 80


def test_bad_settings() -> None:
    with pytest.raises(UsageError, match="`d_model` 64 must be a multiple of 2 x 5 heads"):
        SymbolsConfig(heads=5)
    with pytest.raises(UsageError, match="`loss`"):
        SymbolsConfig(loss="input")


@pytest.mark.slow
def test_the_whole_toy_reproduces(tmp_path: Path) -> None:
    """The figures of the page: clusters by task inside inputs, and answers that follow them."""
    document = train_instructions(tmp_path, SymbolsConfig(steps=400, every=400))
    found = document["accuracy"]["00400"]
    assert found["train"] > 0.95 and found["fillers"] > 0.95
    assert 0.4 < found["inputs"] < 0.9 and document["accuracy"]["00000"]["train"] < 0.3
    rows = read_state_rows(tmp_path / "states.jsonl")
    models = [str(tmp_path / "steps" / name) for name in ("00000", "00400")]
    clusters = cluster(models, rows, ProbeConfig(n_init=3), at=("instruction", "query"))
    at = {(r["model"], r["at"], r["layer"]): r for r in clusters.rows}
    assert at["00400", "query", 2]["within"] > 0.7 > 0.25 > at["00400", "query", 2]["ari_label"]
    assert at["00000", "query", 2]["within"] < 0.15
    assert at["00400", "instruction", 1]["ari_label"] > at["00400", "instruction", 4]["ari_label"]
    moves = move_centroids(models[1], rows, ProbeConfig(draws=1), at=("instruction", "query"))
    rates = {(r["at"], r["layer"]): r for r in moves.rows}
    assert rates["query", 3]["switched"] > 0.9 > 0.1 > rates["query", 3]["random"]
