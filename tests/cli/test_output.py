"""Tables, JSON, colours and figures for people."""

import io
import json
import math
from pathlib import Path

import pytest

from saesteer.cli import output


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_colour_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert output.paint("x", "red", io.StringIO()) == "x"
    assert output.paint("x", "red", Terminal()) == "\x1b[31mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.paint("x", "red", Terminal()) == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert output.paint("x", "red", Terminal()) == "x"


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_error("first\n  second\n")
    assert capsys.readouterr().err == "error: first second\n"


def test_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(["id", "lens"], [["7", "a b"], ["1234", "c"]], left="lens")
    assert capsys.readouterr().out == "  id  lens\n   7  a b\n1234  c\n"


def shown(width: int, monkeypatch: pytest.MonkeyPatch, left: str = "folder") -> list[str]:
    """The lines of a table on a terminal of that width."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    rows = [["1", "0.123", "runs/a/rather/long/folder"], ["20", "0.5", "runs/b"]]
    output.print_table(["layer", "FVU", "folder"], rows, left, stream=stream)
    return stream.getvalue().splitlines()


def test_a_table_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(80, monkeypatch)[1] == "    1  0.123  runs/a/rather/long/folder"
    narrow = shown(30, monkeypatch)
    assert narrow[1] == "    1  0.123  runs/a/rather/l…"  # figures are whole
    assert all(len(line) <= 30 for line in narrow)


def test_a_row_becomes_a_block_where_nothing_else_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(24, monkeypatch)
    assert lines[:3] == ["layer 1", "  FVU     0.123", "  folder  runs/a/rather…"]
    assert lines[3] == "layer 20" and all(len(line) <= 24 for line in lines)
    assert shown(24, monkeypatch, left="")[0] == "layer 1"  # no column may be shortened


def test_a_table_in_a_file_is_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = io.StringIO()
    output.print_table(["a", "folder"], [["1", "x" * 60]], "folder", stream=stream)
    assert stream.getvalue().splitlines()[1] == "1  " + "x" * 60


def test_json_is_valid_whatever_the_values(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"nan": math.nan, "path": Path("x"), "text": "é"})
    assert json.loads(capsys.readouterr().out) == {"nan": None, "path": "x", "text": "é"}
    output.print_json({"a": [1]}, one_a_line=True)
    assert capsys.readouterr().out == '{"a": [1]}\n'


def test_json_escapes_what_stdout_cannot_write(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    output.print_json("é")
    stream.flush()
    assert json.loads(raw.getvalue()) == "é"


def test_next_command_is_quoted_for_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_next("steer", "--plan", Path("my runs"))
    assert capsys.readouterr().out == "next: saesteer steer --plan 'my runs'\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (output.amount(1234567.4), "1,234,567"),
        (output.size(999), "999 B"),
        (output.size(1_234_567), "1.2 MB"),
        (output.size(5e15), "5000.0 TB"),
        (output.duration(4.23), "4.2 s"),
        (output.duration(231), "3 min 51 s"),
        (output.duration(3725), "1 h 02 min"),
        (output.number(0.123456), "0.1235"),
        (output.number(None), "-"),
        (output.number(math.nan), "-"),
    ],
)
def test_figures_for_people(text: str, expected: str) -> None:
    assert text == expected


def test_run_file_says_what_was_asked(tmp_path: Path) -> None:
    output.write_run(tmp_path, "metrics", {"sae": "x", "layer": None}, model={"name": "m"})
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["verb"] == "metrics"
    assert run["arguments"] == {"sae": "x"}
    assert run["model"] == {"name": "m"}
    assert "torch" in run["versions"]


def test_the_next_command_names_a_program_that_can_be_typed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Outside an activated environment the bare name would not be found."""
    script = tmp_path / "bin" / "saesteer"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr("sys.argv", [str(script)])
    monkeypatch.setenv("PATH", "/nowhere")
    assert output.program() == str(script)
    monkeypatch.setenv("PATH", str(script.parent))
    assert output.program() == "saesteer"
