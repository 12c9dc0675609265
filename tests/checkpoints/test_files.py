"""Whole files or none, and errors in one line."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saesteer.checkpoints import files
from saesteer.checkpoints.errors import UsageError, UserError


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@contextmanager
def small_files_only(limit: int) -> Iterator[None]:
    """Let the system refuse writes past `limit` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_sha256_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    content = b"x" * ((1 << 20) + 3)  # longer than one block
    path.write_bytes(content)
    assert files.sha256_file(path) == hashlib.sha256(content).hexdigest()
    with pytest.raises(UserError) as error:
        files.sha256_file(tmp_path / "missing")
    assert "missing" in one_line(error) and "No such file" in one_line(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(value=json_values)
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    files.write_json(path, value)
    assert files.read_json(path) == value


def test_plain_values() -> None:
    @dataclasses.dataclass
    class Config:
        path: Path
        sizes: tuple[int, ...]

    value = {"c": Config(Path("a/b"), (1, 2)), 3: torch.float32, "x": math.nan, "y": -math.inf}
    assert files.plain(value) == {
        "c": {"path": "a/b", "sizes": [1, 2]},
        "3": "torch.float32",
        "x": None,
        "y": None,
    }
    assert files.plain(torch.tensor([1.5, 2.5])) == [1.5, 2.5]
    assert files.plain({2, 1}) == [1, 2]


@pytest.mark.parametrize("content", ["{", b"\xff\xfe"])
def test_broken_json(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        files.read_json(path)
    assert "a.json is not valid JSON" in one_line(error)


def test_missing_json(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        files.read_json(tmp_path / "a.json")
    assert "cannot read" in one_line(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.bool])
def test_tensors_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "a.safetensors"
    grid = (torch.arange(12).reshape(3, 4) % 2).to(dtype)
    tensors = {"whole": grid, "turned": grid.T, "row": grid[1], "empty": grid[:0], "same": grid}
    files.write_tensors(path, tensors, {"made": "here"})
    found = files.read_tensors(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor), name
    header = files.read_header(path)
    assert header["metadata"] == {"made": "here"}
    assert header["tensors"]["turned"]["shape"] == [4, 3]
    assert header["tensors"]["row"]["dtype"] in {"F32", "BF16", "I32", "BOOL"}


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    files.write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    files.write_text(tmp_path / "a.txt", "a")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1 and modes.pop() & 0o400


@pytest.mark.parametrize("reader", [files.read_tensors, files.read_header])
@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_tensors(tmp_path: Path, reader: Any, keep: int) -> None:
    path = tmp_path / "a.safetensors"
    files.write_tensors(path, {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError) as error:
        reader(path)
    assert "a.safetensors is damaged or cut short" in one_line(error)


def test_missing_tensors(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        files.read_tensors(tmp_path / "a.safetensors")
    assert "no file" in one_line(error)


WRITERS = {
    "tensors": lambda path: files.write_tensors(path, {"a": torch.zeros(1 << 16)}),
    "text": lambda path: files.write_text(path, "a" * (1 << 18)),
    "json": lambda path: files.write_json(path, ["a" * (1 << 18)]),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_refused_write_leaves_the_old_file(tmp_path: Path, writer: Any) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(UserError) as error, small_files_only(1 << 16):
        writer(path)
    assert f"no space left while writing {path}" in one_line(error)
    assert "`resume`" in one_line(error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_full_at_the_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Any, call: str
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(UserError, match="no space left"):
        writer(tmp_path / "a")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_interrupting_a_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Any
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        writer(tmp_path / "a")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_missing_folder_is_named(tmp_path: Path, writer: Any) -> None:
    with pytest.raises(UserError) as error:
        writer(tmp_path / "none" / "a")
    assert "cannot write" in one_line(error) and "No such file" in one_line(error)


def test_jsonl_grows_and_repairs_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    files.append_jsonl(path, {"step": 1, "loss": math.nan})
    files.append_jsonl(path, {"step": 2, "text": "ä" * 5000})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 3, "text": "' + b"x" * 5000)
    assert [line["step"] for line in files.read_jsonl(path)] == [1, 2]
    files.append_jsonl(path, {"step": 4})
    assert path.read_bytes() == whole + b'{"step": 4}\n'
    assert files.read_jsonl(path)[0] == {"step": 1, "loss": None}


def test_jsonl_that_was_cut_in_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"st')
    files.append_jsonl(path, {"step": 1})
    assert files.read_jsonl(path) == [{"step": 1}]


def test_jsonl_on_a_full_disk_stays_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    files.append_jsonl(path, {"step": 1})
    before = path.read_bytes()
    with pytest.raises(UserError, match="no space left"), small_files_only(len(before) + 4):
        files.append_jsonl(path, {"step": 2})
    assert path.read_bytes() == before


def test_wrong_jsonl_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\nnothing\n')
    with pytest.raises(UserError) as error:
        files.read_jsonl(path)
    assert "line 2 is not valid JSON" in one_line(error)


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.json.12ab34cd.tmp", "a.json", ".hidden", "b.tmp"):
        (tmp_path / name).touch()
    files.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "a.json", "b.tmp"]


class TestClaimOutput:
    def test_new_and_empty_folders_are_taken(self, tmp_path: Path) -> None:
        folder = tmp_path / "a" / "b"
        assert files.claim_output(folder) == folder and folder.is_dir()
        assert files.claim_output(str(folder), force=True) == folder

    def test_a_folder_in_use_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "run.json").write_text("{}")
        with pytest.raises(UsageError) as error:
            files.claim_output(tmp_path)
        text = one_line(error)
        assert f"`out` {tmp_path} exists" in text and "`force`" in text
        assert "`resume`" not in text

    def test_resume_is_advised_where_there_is_one(self, tmp_path: Path) -> None:
        (tmp_path / "run.json").write_text("{}")
        with pytest.raises(UsageError, match="`resume` to continue it, `force` to replace it"):
            files.claim_output(tmp_path, can_resume=True)

    def test_the_flag_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "run.json").write_text("{}")
        with pytest.raises(UsageError, match="`report`"):
            files.claim_output(tmp_path, flag="`report`")

    def test_resume_keeps_what_is_there(self, tmp_path: Path) -> None:
        (tmp_path / "anything").touch()
        assert files.claim_output(tmp_path, resume=True) == tmp_path
        assert (tmp_path / "anything").exists()

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("run.json", "{}"),
            ("demo.json", "{}"),
            ("plan.yaml", ""),
            ("manifest.json", '{"schema_version": 1, "shards": []}'),
            ("cfg.json", '{"d_sae": 3}'),
            ("layer-3_dsae-8_k-2_seed-0/run.json", "{}"),
        ],
    )
    def test_force_empties_what_we_wrote(self, tmp_path: Path, name: str, content: str) -> None:
        out, outside = tmp_path / "out", tmp_path / "outside"
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text(content)
        (out / "state").mkdir()
        (out / "state" / "a").touch()
        outside.mkdir()
        (outside / "kept").touch()
        (out / "link").symlink_to(outside)
        assert files.claim_output(out, force=True) == out
        assert os.listdir(out) == []
        assert (outside / "kept").exists()

    @pytest.mark.parametrize(
        "names",
        [
            {"notes.txt": "mine"},
            {"manifest.json": '{"name": "an app"}', "index.html": ""},
            {"manifest.json": "{"},
            {"run.json": "{}", "pyproject.toml": ""},
        ],
    )
    def test_force_spares_what_others_wrote(self, tmp_path: Path, names: dict[str, str]) -> None:
        for name, content in names.items():
            (tmp_path / name).write_text(content)
        with pytest.raises(UsageError) as error:
            files.claim_output(tmp_path, force=True)
        assert "was not written by saesteer" in one_line(error)
        assert sorted(os.listdir(tmp_path)) == sorted(names)

    def test_force_never_empties_the_working_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "run.json").write_text("{}")
        (tmp_path / "below").mkdir()
        monkeypatch.chdir(tmp_path / "below")
        with pytest.raises(UsageError, match="working or home directory"):
            files.claim_output("..", force=True)
        assert (tmp_path / "run.json").exists()

    def test_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a").touch()
        with pytest.raises(UsageError, match="is a file; a folder is needed"):
            files.claim_output(tmp_path / "a", resume=True)
        with pytest.raises(UserError, match="cannot make the folder"):
            files.claim_output(tmp_path / "a" / "b")

    def test_resume_and_force_contradict(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="contradict"):
            files.claim_output(tmp_path, resume=True, force=True)


def test_json_files_end_with_a_newline_and_keep_umlauts(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"text": "für"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.endswith("}\n") and "für" in text and json.loads(text) == {"text": "für"}
