"""The log in other programs: what arrives is what metrics.jsonl holds; training always goes on."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.files import read_jsonl
from saesteer.sae import SyntheticConfig, TrainConfig, synthesise, train
from saesteer.sae.runs import trackers
from saesteer.sae.runs.trackers import SafeTracker, check_tracker, wandb_mode

SMALL = TrainConfig(d_sae=(16,), k=(2,), tokens=4096, batch_tokens=512)


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("made") / "acts"
    synthesise(folder, SyntheticConfig(d_model=8, features=1400), tokens=4096)
    return folder


class Broken:
    def log(self, row: Mapping[str, float], step: int) -> None:
        raise OSError("the disk is\nfull")

    def close(self) -> None:
        raise AssertionError("a tracker that failed is left alone")


def test_a_tracker_that_fails_is_warned_of_once() -> None:
    told: list[str] = []
    tracker = SafeTracker("wandb", Broken, told.append)
    for step in range(3):
        tracker.log({"fvu": 0.5}, step)
    tracker.close()
    assert told == ["wandb failed and is left alone; metrics.jsonl goes on: the disk is full"]


def test_training_goes_on_without_its_tracker(
    acts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers._OPEN, "tensorboard", lambda folder, settings: Broken())
    monkeypatch.setitem(trackers.PACKAGES, "tensorboard", "json")  # which is always there
    told: list[str] = []
    train(tmp_path / "sae", SMALL, activations=acts, log_to="tensorboard", warn=told.append)
    assert sum("left alone" in line for line in told) == 1
    assert len(read_jsonl(tmp_path / "sae" / "metrics.jsonl")) == 8


def test_rows_of_several_saes_are_told_apart() -> None:
    seen: list[tuple[dict[str, float], int]] = []

    class Kept:
        def log(self, row: Mapping[str, float], step: int) -> None:
            seen.append((dict(row), step))

        def close(self) -> None:
            seen.append(({}, -1))

    tracker = SafeTracker("trackio", Kept, print)
    tracker.log({"step": 3, "fvu": 0.5, "dead": None, "done": True}, 3, "k-4/")
    tracker.close()
    assert seen == [({"k-4/fvu": 0.5}, 3), ({}, -1)]


def test_what_is_unknown_or_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_tracker("none")
    with pytest.raises(UsageError, match="`log_to` must be one of none, trackio, wandb"):
        check_tracker("mlflow")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'saesteer\[wandb\]'"):
        train(tmp_path / "sae", SMALL, activations="nowhere", log_to="wandb")
    assert not (tmp_path / "sae").exists()


def test_wandb_asks_nobody_for_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


def test_tensorboard_holds_the_log(acts: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "sae", SMALL, activations=acts, log_to="tensorboard")
    rows = read_jsonl(tmp_path / "sae" / "metrics.jsonl")
    events = EventAccumulator(str(tmp_path / "sae" / "tensorboard"))
    events.Reload()
    assert {"fvu", "l0", "tokens_per_second"} <= set(events.Tags()["scalars"])
    found = [(event.step, event.value) for event in events.Scalars("fvu")]
    assert [step for step, _ in found] == [row["step"] for row in rows]
    # The events hold float32.
    assert [value for _, value in found] == pytest.approx([row["fvu"] for row in rows], rel=1e-6)


CHILD = """
import json, sys
from saesteer.sae import TrainConfig, train
config = TrainConfig(d_sae=(16,), k=(2,), tokens=4096, batch_tokens=512)
warned = []
train(sys.argv[1], config, activations=sys.argv[2], log_to=sys.argv[3], warn=warned.append)
print(json.dumps([line for line in warned if "left alone" in line]))
"""


def train_in_child(out: Path, acts: Path, log_to: str, **environment: str) -> list[dict[str, Any]]:
    """Train in a process of its own; returns the lines of metrics.jsonl."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, str(out), str(acts), log_to],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
    return read_jsonl(out / "metrics.jsonl")


@pytest.mark.slow
def test_trackio_holds_the_log(acts: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    rows = train_in_child(tmp_path / "sae", acts, "trackio", TRACKIO_DIR=str(tmp_path / "kept"))
    (file,) = (tmp_path / "kept").glob("*.db")
    with sqlite3.connect(file) as database:
        found = database.execute("select step, metrics from metrics order by step").fetchall()
    kept = {step: json.loads(text)["fvu"] for step, text in found}
    assert kept == {row["step"]: pytest.approx(row["fvu"]) for row in rows}


def records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format, in which a
    record is cut at blocks of 32 KiB (types 1 whole, 2 first, 3 middle, 4 last)."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if kind == 0:
            return
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


@pytest.mark.slow
def test_wandb_offline_holds_the_log(acts: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    rows = train_in_child(tmp_path / "sae", acts, "wandb", WANDB_MODE="offline")
    (file,) = (tmp_path / "sae" / "wandb").glob("offline-run-*/run-*.wandb")
    from wandb.proto import wandb_internal_pb2

    found: dict[int, float] = {}
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") != "history":
            continue
        items = {item.key or "/".join(item.nested_key): item for item in record.history.item}
        if "fvu" in items:
            found[record.history.step.num] = json.loads(items["fvu"].value_json)
    assert found == {row["step"]: pytest.approx(row["fvu"]) for row in rows}
