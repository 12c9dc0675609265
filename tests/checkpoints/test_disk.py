"""Room on the disk, asked beforehand."""

import shutil
from pathlib import Path

import pytest

from saesteer.checkpoints.disk import folder_bytes, need_space
from saesteer.checkpoints.errors import UserError


def test_a_run_that_would_fill_the_disk_is_refused(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    need_space(tmp_path / "not" / "there" / "yet", free // 2, "training writes", "lower `d_sae`")
    with pytest.raises(UserError) as error:
        need_space(tmp_path / "a", 10 * free, "training writes", "lower `d_sae`")
    text = str(error.value)
    assert text.startswith("training writes up to ") and text.endswith("lower `d_sae`")
    assert str(tmp_path / "a") in text and "is free there: " in text and "\n" not in text


def test_a_disk_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is refused for what is not known."""
    asked: list[object] = []

    def refuse(path: object) -> None:
        asked.append(path)
        raise OSError

    monkeypatch.setattr(shutil, "disk_usage", refuse)
    need_space(tmp_path, 10**18, "training writes", "lower `d_sae`")
    assert asked == [tmp_path]


def test_bytes_below_a_folder(tmp_path: Path) -> None:
    assert folder_bytes(tmp_path / "absent") == 0
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"x" * 100)
    (tmp_path / "c").write_bytes(b"x" * 7)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert folder_bytes(tmp_path) >= 107
