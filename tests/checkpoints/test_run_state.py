"""A state that loads whatever moment a run was killed at."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints import files, run_state
from saesteer.checkpoints.errors import UserError


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


def test_a_kill_at_any_moment_leaves_a_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copy the folder around every call that changes it; each copy must load, old or new."""
    live, copies = tmp_path / "live", []
    run_state.save_state(live, *state(1))
    for name in ("replace", "fsync", "unlink"):
        original = getattr(os, name)

        def spy(*arguments: Any, original: Any = original, **options: Any) -> Any:
            for moment in ("before", "after"):
                if moment == "after":
                    result = original(*arguments, **options)
                copies.append(tmp_path / f"copy-{len(copies)}")
                shutil.copytree(live, copies[-1])
            return result

        monkeypatch.setattr(os, name, spy)
    run_state.save_state(live, *state(2))
    monkeypatch.undo()
    assert holds(live, 2)
    steps = [run_state.load_state(copy)[1]["step"] for copy in copies]
    assert steps == sorted(steps) and set(steps) == {1, 2}
    for copy, step in zip(copies, steps, strict=True):
        assert holds(copy, step)
        run_state.save_state(copy, *state(3))  # and the next save clears up
        assert holds(copy, 3)
        assert len(os.listdir(copy / "state")) == 2


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
    with pytest.raises(UserError, match="no saved state in .*run without --resume"):
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
