"""A state that loads whatever moment a run was killed at."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints import durable, files, run_state
from saesteer.checkpoints.errors import UsageError, UserError


def state(step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "W_enc": torch.randn(3, 5, generator=generator),
        "rng": generator.get_state(),
        "tokens": torch.tensor(step * 10**12),
    }
    return tensors, {"step": step, "cursor": {"document": step, "seed": 2**63}}


def holds(folder: Path, step: int) -> bool:
    tensors, meta = run_state.load_state(folder)
    expected, expected_meta = state(step)
    same = all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    return tensors.keys() == expected.keys() and meta == expected_meta and same


def test_round_trip_keeps_only_the_newest(tmp_path: Path) -> None:
    assert not run_state.has_state(tmp_path)
    for step in (1, 2, 3):
        run_state.save_state(tmp_path, *state(step))
        assert holds(tmp_path, step)
    assert len(os.listdir(tmp_path / "state")) == 2


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written in many calls, as large ones are."""
    monkeypatch.setattr(durable, "_PIECE_BYTES", 100)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_at_any_moment_leaves_a_state(
    tmp_path: Path, small_pieces: None, faults: Any, keep: int
) -> None:
    """Copy the folder around every call that changes it; each copy must load, old or new."""
    live, copies = tmp_path / "live", []
    run_state.save_state(live, *state(0), keep=keep)
    run_state.save_state(live, *state(1), keep=keep)

    def copy(number: int, name: str) -> None:
        copies.append(tmp_path / f"copy-{len(copies)}")
        shutil.copytree(live, copies[-1])

    disk = faults.Disk(before=copy, after=copy)
    with disk.watched():
        run_state.save_state(live, *state(2), keep=keep)
    assert holds(live, 2)
    steps = [run_state.load_state(copied)[1]["step"] for copied in copies]
    assert steps == sorted(steps) and set(steps) == {1, 2}
    for copied, step in zip(copies, steps, strict=True):
        assert holds(copied, step)
        run_state.save_state(copied, *state(3), keep=keep)  # and the next save clears up
        assert holds(copied, 3)
        assert len(os.listdir(copied / "state")) == keep + 1
    print(f"killed around each of {len(disk.calls)} system calls, keep {keep}")


@pytest.mark.parametrize("keep", [1, 2])
def test_a_power_cut_at_any_moment_leaves_a_state(
    tmp_path: Path, small_pieces: None, faults: Any, keep: int
) -> None:
    """What was not synced is lost, in every order that a journal allows."""
    live = tmp_path / "live"
    run_state.save_state(live, *state(0), keep=keep)
    run_state.save_state(live, *state(1), keep=keep)
    found: list[set[int]] = []

    def cut(number: int, name: str) -> None:
        steps = set()
        for place in disk.after_power_cut(tmp_path / f"cut-{number}"):
            step = run_state.load_state(place)[1]["step"]
            assert holds(place, step)
            steps.add(step)
        found.append(steps)

    disk = faults.UnsafeDisk(live, cut)
    with disk.watched():
        run_state.save_state(live, *state(2), keep=keep)
    assert found[0] == {1} and found[-1] == {2}
    assert set().union(*found) == {1, 2} and {1, 2} in found
    print(f"power cut after each of {len(disk.calls)} system calls, keep {keep}")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_disk_that_fails_at_any_call_leaves_a_state(
    tmp_path: Path, small_pieces: None, faults: Any, keep: int, number: int
) -> None:
    """Once with a call that fails and once with all after it failing too."""
    live = tmp_path / "live"
    run_state.save_state(live, *state(0), keep=keep)
    run_state.save_state(live, *state(1), keep=keep)
    counting = faults.Disk()
    with counting.watched():
        run_state.save_state(shutil.copytree(live, tmp_path / "count"), *state(2), keep=keep)
    calls = len(counting.calls)
    failures = 0
    for at in range(1, calls + 1):
        for lasting in (False, True):
            folder = shutil.copytree(live, tmp_path / f"{at}-{lasting}")

            def fail(n: int, name: str, at: int = at, lasting: bool = lasting) -> None:
                if n == at or (lasting and n > at and name != "close"):
                    raise OSError(number, os.strerror(number))

            with faults.Disk(before=fail).watched():
                try:
                    run_state.save_state(folder, *state(2), keep=keep)
                    reported = False
                except UserError as error:
                    assert "\n" not in str(error)
                    reported = True
            failures += reported
            step = run_state.load_state(folder)[1]["step"]
            assert holds(folder, step)
            # Said to be saved means saved; an error may come after the pointer has moved.
            assert step == 2 or reported, (at, lasting)
            run_state.save_state(folder, *state(3), keep=keep)
            assert holds(folder, 3) and len(os.listdir(folder / "state")) == keep + 1
    assert failures > calls
    print(f"{os.strerror(number)} at each of {calls} system calls, keep {keep}")


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, score in enumerate([0.9, 0.2, 0.5, None, 0.4, 0.3]):
        run_state.save_state(tmp_path, *state(step), keep=2, score=score)
    assert holds(tmp_path, 5)
    assert run_state.load_state(tmp_path, "best")[1]["step"] == 1
    assert len(list((tmp_path / "state").glob("*.safetensors"))) == 3
    run_state.save_state(tmp_path, *state(6), keep=2, score=0.1)
    assert run_state.load_state(tmp_path, "best")[1]["step"] == 6
    assert len(list((tmp_path / "state").glob("*.safetensors"))) == 2
    with pytest.raises(UsageError, match="`keep_states`"):
        run_state.save_state(tmp_path, *state(7), keep=0)


def test_an_earlier_state_stands_in_for_a_damaged_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        run_state.save_state(tmp_path, *state(step), keep=2)
    newest = max((tmp_path / "state").glob("*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    assert holds(tmp_path, 1)
    assert f"{newest} is missing or damaged" in caplog.text
    newest.unlink()
    newest.symlink_to(tmp_path / "elsewhere")
    assert holds(tmp_path, 1)


def test_a_cancelled_save_leaves_no_trace(tmp_path: Path, small_pieces: None) -> None:
    run_state.save_state(tmp_path, *state(1))
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 2

    with pytest.raises(durable.Cancelled):
        run_state.save_state(tmp_path, *state(2), cancelled=cancelled)
    assert holds(tmp_path, 1) and len(os.listdir(tmp_path / "state")) == 2


def test_what_a_state_relies_on_is_made_durable_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text("{}\n")
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    run_state.save_state(tmp_path, *state(1), first=[log])
    assert synced.index(str(log)) < next(i for i, name in enumerate(synced) if "state-" in name)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", range(6))
def test_ctrl_c_at_any_moment_leaves_a_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, moment: str
) -> None:
    run_state.save_state(tmp_path, *state(1))
    calls: list[str] = []
    for name in ("replace", "fsync"):
        original = getattr(os, name)

        def spy(*arguments: Any, name: str = name, original: Any = original) -> None:
            calls.append(name)
            if len(calls) == number + 1 and moment == "before":
                raise KeyboardInterrupt
            original(*arguments)
            if len(calls) == number + 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, name, spy)
    with pytest.raises(KeyboardInterrupt):
        run_state.save_state(tmp_path, *state(2))
    monkeypatch.undo()
    pointer_moved = number > 4 or (number == 4 and moment == "after")
    assert calls[:5] == ["fsync", "replace", "fsync", "fsync", "replace"][: len(calls)]
    assert holds(tmp_path, 2 if pointer_moved else 1)


@pytest.mark.parametrize("fail_at", range(3))
def test_disk_full_keeps_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    run_state.save_state(tmp_path, *state(1))
    original, calls = os.fsync, []

    def refuse(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match="no space left"):
        run_state.save_state(tmp_path, *state(2))
    monkeypatch.undo()
    assert holds(tmp_path, 1)
    assert len(os.listdir(tmp_path / "state")) == 2  # the space is given back


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no saved state in .*run without `resume`"):
        run_state.load_state(tmp_path)


def test_a_damaged_state_is_not_loaded(tmp_path: Path) -> None:
    run_state.save_state(tmp_path, *state(1))
    path = next((tmp_path / "state").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="missing or damaged"):
        run_state.load_state(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        run_state.load_state(tmp_path)


@pytest.mark.parametrize("pointer", [{"file": "a"}, [], {"file": "../x", "sha256": "", "meta": {}}])
def test_a_wrong_pointer_is_refused(tmp_path: Path, pointer: Any) -> None:
    (tmp_path / "state").mkdir()
    files.write_json(tmp_path / "state" / "latest.json", pointer)
    with pytest.raises(UserError, match="latest.json"):
        run_state.load_state(tmp_path)
