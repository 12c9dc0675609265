"""Rows of states: files, built-in tasks, and what is refused."""

from pathlib import Path

import pytest

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.data.states import (
    StateRow,
    read_state_rows,
    read_states,
    task_states,
    write_states,
)

from ..families import Make, double


def test_files_come_back(tmp_path: Path) -> None:
    rows = [
        StateRow("a b", "t", "g", "b", "inputs", {"t": "c"}, {"q": (2, 3)}),
        StateRow("c", "u", "h"),
    ]
    file = tmp_path / "states.jsonl"
    file.write_text(write_states(rows))
    assert read_state_rows(file) == rows


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "is not an object"),
        ('{"text": "a", "label": "b", "group": "c", "sort": 1}', "unknown key 'sort'"),
        ('{"text": "a", "label": 3, "group": "c"}', "label is no str"),
        ('{"text": "a", "label": "b"}', "group is missing"),
        ('{"text": "a", "label": "b", "group": "c", "positions": {"q": [0, 9]}}', "position 'q'"),
        ("", "holds no row"),
    ],
)
def test_bad_files(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "states.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(UserError, match=says):
        read_state_rows(file)


def test_tasks_share_contents() -> None:
    rows = task_states(["french", "question"], 2, 0)
    assert {row.label for row in rows} == {"french", "question"}
    assert len({row.input for row in rows}) == 2
    for row in rows:
        start, end = row.positions["instruction"]
        assert row.text[:start].strip() == row.input and end == len(row.text)
    with pytest.raises(UsageError, match="at least two tasks"):
        task_states(["french"], 2, 0)


def test_positions_must_exist(tiny_lm: Make) -> None:
    with pytest.raises(UsageError, match="`at` 'q' is no position of row 1: it has last"):
        read_states(double(tiny_lm, "llama"), [StateRow("a", "b", "c")], ("q",))
