"""`saesteer watch` shows the curves of a run that is finished or goes on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Cli


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [{"step": i, "tokens": 100 * i, "fvu": 1 / i, "l0": 8.0} for i in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps({"complete": True, "config": {"tokens": 800}}))
    return folder


def test_prints_every_quantity_that_was_logged(cli: Cli, run: Path, tmp_path: Path) -> None:
    outcome = cli("watch", run, "--page", tmp_path / "page.html")
    assert (outcome.status, outcome.err) == (0, "")
    first, _, name, fvu, l0 = outcome.out.splitlines()
    assert (first, name) == ("finished", "run")
    assert fvu.split()[:2] == ["FVU", "0.125"] and fvu.endswith("▁") and "█▄" in fvu
    assert l0.split()[:2] == ["L0", "8"]
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_follows_until_the_run_is_finished(
    on_terminal: Callable[..., tuple[int, str]], run: Path
) -> None:
    status, seen = on_terminal("watch", run)
    assert status == 0 and "finished" in seen and "FVU" in seen


def test_json_holds_the_rows(cli: Cli, run: Path) -> None:
    found = cli("watch", run, "--json").json()
    assert found["complete"] and found["logs"]["run"][-1]["tokens"] == 800


def test_what_cannot_be(cli: Cli, tmp_path: Path) -> None:
    assert "holds no training run" in cli("watch", tmp_path).error(1)
    assert "RUN" in cli("watch").error(2)
