"""A save beside the run: what it holds, when it waits, and what it says when it fails."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints import durable, run_state, state_saver
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.state_saver import StateSaver


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writes wait until the event is set."""
    go_on, original = threading.Event(), os.write

    def write(descriptor: int, data: Any) -> int:
        if threading.current_thread().name == "save-state":
            assert go_on.wait(30)
        return original(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    return go_on


def step_of(folder: Path) -> int:
    tensors, meta = run_state.load_state(folder)
    assert (tensors["w"] == meta["step"]).all()
    step: int = meta["step"]
    return step


def test_the_run_goes_on_while_its_state_is_written(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    w, meta = torch.full((100,), 1.0), {"step": 1, "list": [1]}
    with StateSaver(tmp_path) as saver:
        saver.save({"w": w}, meta)
        w.fill_(7)  # the next steps
        meta["list"].append(2)  # type: ignore[attr-defined]
        assert not saver.ready() and not run_state.has_state(tmp_path) and saver.saved == 0
        slow_disk.set()
        saver.wait()
        assert saver.saved == 1 and step_of(tmp_path) == 1
        assert run_state.load_state(tmp_path)[1]["list"] == [1]
    assert 0 < saver.blocked_seconds


def test_leaving_waits_for_the_last_write(tmp_path: Path) -> None:
    with StateSaver(tmp_path, keep=2) as saver:
        for step in (1, 2, 3):
            saver.save({"w": torch.full((100,), float(step))}, {"step": step}, score=step / 10)
    assert step_of(tmp_path) == 3 and saver.saved == 3
    assert run_state.load_state(tmp_path, "best")[1]["step"] == 1


def test_a_failed_write_is_raised_where_the_run_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    tensors = {"w": torch.zeros(3)}
    for ask in ("ready", "wait", "save", "leave"):
        saver = StateSaver(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            saver.save(tensors, {"step": 0})
            assert saver._thread is not None
            saver._thread.join()
        with pytest.raises(UserError, match="no space left while writing"):
            if ask == "ready":
                saver.ready()
            elif ask == "wait":
                saver.wait()
            elif ask == "save":
                saver.save(tensors, {"step": 0})
            else:
                with saver:
                    pass
        saver.save(tensors, {"step": 0})  # said once; with space again it works
        saver.wait()
        assert step_of(tmp_path) == 0


def test_a_stop_writes_the_newer_state_and_gives_up_the_older(
    tmp_path: Path, slow_disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "_PIECE_BYTES", 100)
    saver = StateSaver(tmp_path)
    saver.save({"w": torch.full((1000,), 1.0)}, {"step": 1})
    saver._give_up.set()
    slow_disk.set()
    saver.save_now({"w": torch.full((1000,), 2.0)}, {"step": 2})
    assert step_of(tmp_path) == 2 and saver.saved == 1
    assert len(os.listdir(tmp_path / "state")) == 2
    saver.save({"w": torch.full((9,), 3.0)}, {"step": 3})
    saver.wait()
    assert step_of(tmp_path) == 3


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_run_is_the_one_reported(
    tmp_path: Path, kind: type[BaseException], slow_disk: threading.Event
) -> None:
    slow_disk.set()
    with pytest.raises(kind, match="in the run"), StateSaver(tmp_path) as saver:
        saver.save({"w": torch.zeros(5)}, {"step": 0})
        raise kind("in the run")
    assert threading.active_count() == 1 or "save-state" not in str(threading.enumerate())
    if kind is RuntimeError:
        assert step_of(tmp_path) == 0


def test_saves_take_no_more_than_their_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that took one second is not made again within the next hundred."""
    now = [1000.0]
    monkeypatch.setattr(state_saver.time, "monotonic", lambda: now[0])
    saver = StateSaver(tmp_path)
    assert saver.ready(), "the first save waits for nothing"

    class Slow(dict[str, torch.Tensor]):
        def items(self) -> Any:
            now[0] += 1.0
            return super().items()

    saver.save(Slow(w=torch.zeros(2)), {"step": 0})
    saver.wait()
    now[0] += 99.0
    assert not saver.ready()
    now[0] += 1.1
    assert saver.ready()
    assert saver.blocked_seconds == pytest.approx(1.0)
