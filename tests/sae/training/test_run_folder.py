"""A run's folder: one writer, room on the disk, states kept, signals obeyed, and its report."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.files import read_json, read_jsonl, write_json
from saesteer.checkpoints.locks import LOCK_NAME
from saesteer.checkpoints.run_state import has_state, load_state, save_state
from saesteer.checkpoints.shard_writer import ShardWriter
from saesteer.checkpoints.state_saver import StateSaver
from saesteer.sae.config import TrainConfig
from saesteer.sae.verbs.train import train

CONFIG = TrainConfig(
    d_sae=(32,), k=(4,), tokens=2048, batch_tokens=32, buffer_tokens=256, checkpoint_every=64
)

TRAIN = """
import signal
import sys
# As in a terminal: a shell starts background jobs with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from saesteer.checkpoints.errors import Interrupted
from saesteer.sae.config import TrainConfig
from saesteer.sae.verbs.train import train
config = TrainConfig(d_sae=(32,), k=(4,), tokens=10**8, batch_tokens=32, buffer_tokens=256)
def progress(stage, done, total, note):
    if stage == "train" and done == 320:
        print("training", flush=True)
try:
    train(sys.argv[1], config, activations=sys.argv[2], device="cpu", progress=progress)
except Interrupted as error:
    print(error)
    sys.exit(error.exit_status)
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "acts"
    writer = ShardWriter(
        folder, layers=[1], sites=["resid_post"], d_model=16, dtype=torch.float32,
        facts={"model": "made-up"},
    )  # fmt: skip
    rows = torch.randn(1024, 16, generator=torch.Generator().manual_seed(0))
    writer.add({(1, "resid_post"): rows}, torch.arange(1024))
    writer.close()
    return folder


@pytest.fixture
def start(shards: Path, tmp_path: Path) -> Any:
    """Start an endless run in `tmp_path/sae` in another process; returns once it trains."""
    processes: list[subprocess.Popen[str]] = []

    def run() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", TRAIN, str(tmp_path / "sae"), str(shards)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "training\n"
        return process

    yield run
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run_in_time(
    number: signal.Signals, start: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start()
    process.send_signal(number)
    # A run that does not leave within its time of grace is interrupted and ends otherwise.
    out, err = process.communicate()
    assert process.returncode == 130, err
    tensors, meta = load_state(tmp_path / "sae")
    assert f"stopped at step {meta['step']} of" in out and meta["step"] >= 10
    assert int(tensors["0/step"]) == meta["step"]
    assert not (tmp_path / "sae" / LOCK_NAME).exists()


def test_two_processes_cannot_write_one_run(
    start: Callable[[], subprocess.Popen[str]], shards: Path, tmp_path: Path
) -> None:
    process = start()
    out = tmp_path / "sae"
    for options in ({"resume": True}, {"force": True}, {}):
        with pytest.raises(UserError, match=f"is being written by process {process.pid}"):
            train(out, CONFIG, activations=shards, device="cpu", **options)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / LOCK_NAME).exists()  # and stands in nobody's way
    train(out, CONFIG, activations=shards, device="cpu", force=True)


def test_a_run_that_would_fill_the_disk_is_refused_at_once(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sae"
    train(out, CONFIG, activations=shards, device="cpu")
    before = (out / "sae_weights.safetensors").read_bytes()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    wide = replace(CONFIG, d_sae=(4096,))
    with pytest.raises(UserError, match=r"training writes up to .* only 10\.0 kB .*`keep_states`"):
        train(out, wide, activations=shards, device="cpu", force=True)
    assert (out / "sae_weights.safetensors").read_bytes() == before, "the old run is still there"


def test_the_last_states_and_the_best_are_kept(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, tokens=32 * 400, keep_states=2, checkpoint_every=32 * 40)
    monkeypatch.setattr(StateSaver, "ready", lambda saver: True)  # however long the last one took
    train(tmp_path / "sae", config, activations=shards, device="cpu")
    states = list((tmp_path / "sae" / "state").glob("*.safetensors"))
    assert len(states) in (2, 3)
    _, best = load_state(tmp_path / "sae", "best")
    _, last = load_state(tmp_path / "sae")
    assert last["step"] == 400 and best["last"][0]["fvu"] <= last["last"][0]["fvu"]


def test_a_write_that_fails_in_the_background_ends_the_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.write

    def write(descriptor: int, data: Any) -> int:
        if threading.current_thread().name == "save-state":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(UserError, match="no space left while writing .*`resume`"):
            train(tmp_path / "sae", CONFIG, activations=shards, device="cpu")
    assert not has_state(tmp_path / "sae")
    train(tmp_path / "sae", CONFIG, activations=shards, device="cpu", resume=True)
    steps = [row["step"] for row in read_jsonl(tmp_path / "sae" / "metrics.jsonl")]
    assert steps == list(range(1, 65))


@pytest.mark.parametrize(
    ("key", "value"),
    [("stream", None), ("scales", []), ("scales", ["x"]), ("last", 3), ("metrics_bytes", {}),
     ("step", None), ("stream", {"drawn": 0, "source": {"epoch": 0}})],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_in_one_line(
    shards: Path, tmp_path: Path, key: str, value: Any
) -> None:
    out = tmp_path / "sae"
    train(out, CONFIG, activations=shards, device="cpu")
    tensors, meta = load_state(out)
    save_state(out, tensors, {**meta, key: value})
    with pytest.raises(UserError) as error:
        train(out, CONFIG, activations=shards, device="cpu", resume=True)
    assert "\n" not in str(error.value) and "`resume`" in str(error.value)
    save_state(out, {name: t for name, t in tensors.items() if "W_dec" not in name}, meta)
    with pytest.raises(UserError, match="does not fit this run"):
        train(out, CONFIG, activations=shards, device="cpu", resume=True)


def test_the_report_says_what_a_repetition_needs(shards: Path, tmp_path: Path) -> None:
    train(tmp_path / "sae", CONFIG, activations=shards, device="cpu")
    run = read_json(tmp_path / "sae" / "run.json")
    assert run["recipe"] == {
        "model": None, "blocks": None, "activations": str(shards), "replies": [], "device": "cpu",
        "lm_dtype": None,
    }  # fmt: skip
    assert run["config"]["seed"] == 0 and run["config"]["init_seed"] == [0]
    assert run["machine"]["threads"] == torch.get_num_threads()
    assert (
        run["versions"]["torch"] == torch.__version__.partition("+")[0] or run["versions"]["torch"]
    )
    assert run["data"]["shards"][0]["sha256"] and run["seconds_blocked_in_saving"] >= 0


def test_a_lock_in_the_folder_is_no_earlier_run(shards: Path, tmp_path: Path) -> None:
    """What a killed process left behind does not make the folder look used."""
    (tmp_path / "sae").mkdir()
    write_json(tmp_path / "sae" / LOCK_NAME, {"pid": 1})
    (run,) = train(tmp_path / "sae", CONFIG, activations=shards, device="cpu")
    assert run["complete"] and not (tmp_path / "sae" / LOCK_NAME).exists(), "free again"
