"""`saesteer grade`: JSON lines in; grades and their parts, or a table of rates, out."""

import json
from pathlib import Path

import pytest

from saesteer.cli.__main__ import main

SPOON = "Leila stirs the porridge with the handle of a wooden spoon."
ANSWERS = ("Why does Leila stir the porridge?", "Why blarf the zonk quibrel?", SPOON)


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    file = tmp_path / "answers.jsonl"
    rows = [json.dumps({"content": SPOON, "answer": answer, "id": 3}) for answer in ANSWERS]
    file.write_text("\n".join(rows) + "\n\n", encoding="utf-8")
    return file


def test_json_is_a_line_an_answer(answers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grade", "--task", "question", "--answers", str(answers), "--json", "-q"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["answer"] for row in rows] == list(ANSWERS)
    names = ("follows", "fluent", "faithful", "strict")
    assert [[row[name] for name in names] for row in rows] == [
        [True, True, True, True],
        [True, False, False, False],
        [False, True, True, False],
    ]
    assert rows[1]["parts"]["fluent"]["unknown"] == ["blarf", "zonk", "quibrel"]


def test_the_table_and_the_files(
    answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ["grade", "--task", "question", "--answers", str(answers), "-q", "-o", str(out)]
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert "question: 3 answers, graded by programs" in printed
    assert "strict    0.333  [0.06, 0.79]" in printed
    summary = json.loads((out / "grades.json").read_text(encoding="utf-8"))
    assert summary["strict"][0] == pytest.approx(1 / 3) and summary["thresholds"]["coverage"] == 0.3
    lines = (out / "grades.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["strict"] for line in lines] == [True, False, False]
    assert main(given) == 2  # the folder is in use
    assert main([*given, "--force"]) == 0


def test_translations_without_a_dictionary_say_so(
    answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["grade", "--task", "french", "--answers", str(answers), "-q"]
    assert main([*given, "--dictionaries", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "or give --dictionaries a folder with them" in printed
    assert "strict: not graded, because faithful could not be" in printed


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("not json", "line 1 is no JSON object: give content and answer on each line"),
        ("[1]", "line 1 is no JSON object"),
        ('{"content": "a"}', "line 1: key 'answer' is missing, and must be a text"),
        ('{"content": 3, "answer": "b"}', "line 1: key 'content' is 3, and must be a text"),
        ("", "holds no answer: give one a line"),
    ],
)
def test_files_that_cannot_be_graded(
    line: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(line + "\n", encoding="utf-8")
    assert main(["grade", "--task", "question", "--answers", str(file)]) != 0
    assert says in capsys.readouterr().err


def test_flags_that_are_missing_or_wrong(answers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grade", "--answers", str(answers)]) == 2
    assert "--task is missing" in capsys.readouterr().err
    assert main(["grade", "--task", "question"]) == 2
    assert "--answers is missing" in capsys.readouterr().err
    given = ["grade", "--task", "french", "--answers", str(answers), "--dictionaries", "nowhere"]
    assert main(given) == 2
    assert "--dictionaries nowhere is no folder" in capsys.readouterr().err
