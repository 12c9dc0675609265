"""Prompts from files, and the folder for the results."""

import io
import json
from argparse import Namespace
from pathlib import Path

import pytest

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.cli.inputs import check_reading, open_model, read_prompts, reserved, take_folder
from saesteer.cli.progress import Report


def prompts(**values: object) -> list[str]:
    return read_prompts(Namespace(**{"prompt": None, "prompts": None, **values}))


def test_prompts_come_in_the_order_given(tmp_path: Path) -> None:
    lines = tmp_path / "p.txt"
    lines.write_text("one\n\n  two\r\n", encoding="utf-8")
    assert prompts(prompt=("zero",), prompts=str(lines)) == ["zero", "one", "  two"]
    rows = tmp_path / "p.jsonl"
    rows.write_text('\ufeff{"prompt": "a\\nb", "id": 1}\n\n{"prompt": "c"}\n', encoding="utf-8")
    assert prompts(prompts=str(rows)) == ["a\nb", "c"]


@pytest.mark.parametrize(
    ("text", "found"), [("one\ntwo\n", ["one", "two"]), ('\n{"prompt": "x"}\n', ["x"])]
)
def test_prompts_from_stdin(monkeypatch: pytest.MonkeyPatch, text: str, found: list[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert prompts(prompts="-") == found


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\n \n", "holds no prompt"),
        (b"{bad\n", "line 1 is not JSON"),
        (b'{"prompt": "x"}\n{"text": "x"}\n', 'line 2 has no text under "prompt"'),
        (b'{"prompt": " "}\n', 'line 1 has no text under "prompt"'),
        (b"[1]\n", 'line 1 has no text under "prompt"'),
        (b'{"prompt": "caf\xe9"}\n', "is not UTF-8 (byte 15)"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        prompts(prompts=str(file))
    assert str(caught.value).startswith(f"--prompts {file}")
    assert says in str(caught.value)


def test_no_prompt_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no prompt: give -p TEXT, or --prompts FILE"):
        prompts()
    with pytest.raises(UserError, match="does not exist"):
        prompts(prompts=str(tmp_path / "none.txt"))


def test_missing_data_is_refused_early(tmp_path: Path) -> None:
    check_reading(Namespace(site=None, data=None))
    (tmp_path / "a.txt").write_text("words")
    check_reading(Namespace(site=None, data=("python-docs", str(tmp_path))))
    with pytest.raises(UserError, match="`data` .*none.txt does not exist"):
        check_reading(Namespace(site=None, data=(str(tmp_path / "none.txt"),)))
    with pytest.raises(UserError, match="`data` hf:some/thing: it is not on this machine"):
        check_reading(Namespace(site=None, data=("hf:some/thing",)))


@pytest.mark.parametrize("name", ["p.json", "p.csv", "p.parquet", "p.jsonl.gz", "p.yaml"])
def test_prompts_of_another_format_are_not_taken_for_lines(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('[{"prompt": "Hello"}]')
    with pytest.raises(UserError, match=r"--prompts .* is no \.jsonl or \.txt file: write one"):
        prompts(prompts=str(tmp_path / name))


def test_line_separators_inside_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "one\u2028two\x85"}, ensure_ascii=False) + "\n")
    assert prompts(prompts=str(path)) == ["one\u2028two\x85"]
    path = tmp_path / "p.txt"
    path.write_text("one\u2028two\x85\nthree\n")
    assert prompts(prompts=str(path)) == ["one\u2028two\x85", "three"]


# --- --out ---------------------------------------------------------------------------------------


def claim(out: Path | None, *, force: bool = False, resume: bool = False) -> Namespace:
    return Namespace(out=None if out is None else str(out), force=force, resume=resume)


def test_no_out_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with reserved(claim(None)):
        assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    with pytest.raises(UsageError, match="`out` .* is not empty: add `resume` .* `force`"):
        with reserved(claim(tmp_path)):
            pass
    with pytest.raises(UsageError, match="contradict"):
        with reserved(claim(tmp_path, force=True, resume=True)):
            pass
    with reserved(claim(tmp_path, resume=True)):
        pass
    file = tmp_path / "kept"
    with pytest.raises(UsageError, match="is a file"):
        with reserved(claim(file, force=True)):
            pass


@pytest.mark.parametrize("force", [False, True])
def test_two_commands_cannot_write_one_folder(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "new"
    with reserved(claim(out)):
        with pytest.raises(UserError, match="`out` .* is being written by process"):
            with reserved(claim(out, force=force)):
                pass
    with reserved(claim(out, force=force)):
        assert [path.name for path in out.iterdir()] == [".saesteer.lock"]
    assert list(out.iterdir()) == []


def test_a_failure_leaves_no_empty_folder(tmp_path: Path) -> None:
    out = tmp_path / "new"
    with pytest.raises(KeyboardInterrupt):
        with reserved(claim(out)):
            assert out.is_dir()
            raise KeyboardInterrupt
    assert not out.exists()
    with pytest.raises(UserError):
        with reserved(claim(out)):
            (out / "result").touch()
            raise UserError("late")
    assert (out / "result").exists()


def test_force_empties_only_when_there_is_something_new(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    args = claim(tmp_path, force=True)
    with reserved(args):
        assert (tmp_path / "run.json").exists()
        assert take_folder(args) == tmp_path
        assert not (tmp_path / "run.json").exists()


def test_force_never_empties_what_is_read(tmp_path: Path) -> None:
    sae = tmp_path / "sae"
    sae.mkdir()
    (sae / "cfg.json").write_text('{"d_sae": 1}')
    for out in (sae, tmp_path):
        with pytest.raises(UsageError, match="holds what --sae reads"):
            with reserved(claim(out, force=True), sae=str(sae)):
                pass
    with pytest.raises(UsageError, match="holds what --data reads"):
        with reserved(claim(tmp_path, force=True), data=("python-docs", str(sae))):
            pass
    with reserved(claim(sae / "metrics"), sae=str(sae), plan=None):
        pass


def test_a_model_that_has_moved_is_asked_for(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    with pytest.raises(UserError, match=f"was at {gone}, where nothing is now: give --model"):
        open_model(Namespace(model=None), Report(io.StringIO()), name=gone)
