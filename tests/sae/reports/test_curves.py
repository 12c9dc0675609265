"""A run's curves: read while it goes on, shown as a page and as lines of text."""

import json
from pathlib import Path
from typing import Any

import pytest

from saesteer.checkpoints.errors import UserError
from saesteer.sae.reports.curves import (
    figure,
    progress_text,
    read_curves,
    spark_line,
    training_page,
)


def write_run(folder: Path, rows: list[dict[str, Any]], complete: bool) -> None:
    folder.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    # A line that is still being written, as a reader may find it.
    (folder / "metrics.jsonl").write_text(text if complete else text + '{"step": 3, "tok')
    record = {"complete": complete, "config": {"tokens": 4000}}
    (folder / "run.json").write_text(json.dumps(record))


def rows(first: float) -> list[dict[str, Any]]:
    return [
        {"step": 1, "tokens": 1000, "fvu": first, "l0": 8.0, "lr": 1e-3, "dead_fraction": None},
        {"step": 2, "tokens": 2000, "fvu": first / 2, "l0": 8.0, "lr": 5e-4},
    ]


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    write_run(tmp_path / "run", rows(0.8), complete=False)
    run = read_curves([tmp_path / "run"])
    assert list(run.logs) == ["run"] and len(run.logs["run"]) == 2
    assert (run.complete, run.tokens) == (False, 4000)
    assert progress_text(run) == "2,000 of 4,000 tokens"
    page = training_page(run, "A <run>")
    assert 'http-equiv="refresh"' in page and "A &lt;run&gt;" in page
    assert "<figcaption>FVU</figcaption>" in page
    assert "dead latents" not in page  # never measured: no empty chart
    assert "<td>0.4</td>" in page


def test_several_saes_and_several_runs(tmp_path: Path) -> None:
    for name, first in (("k-8", 0.8), ("k-16", 0.6)):
        write_run(tmp_path / "many" / name, rows(first), complete=True)
    write_run(tmp_path / "one", rows(0.9), complete=True)
    run = read_curves([tmp_path / "many", tmp_path / "one"])
    assert set(run.logs) == {"many/k-8", "many/k-16", "one"}
    page = training_page(run)
    assert run.complete and "finished" in page and "refresh" not in page
    assert page.count("<polyline") == 3 * 3  # three SAEs in the charts of FVU, L0 and rate


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no training run: give a folder"):
        read_curves([tmp_path])


def test_nothing_logged_yet(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    run = read_curves([tmp_path])
    assert progress_text(run) == "nothing is logged yet"
    assert "nothing is logged yet" in training_page(run)


def test_spark_lines() -> None:
    assert spark_line([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert spark_line([3.0, 3.0], 8) == "▁▁"
    assert spark_line(list(range(100)), 10)[-1] == "█" and len(spark_line([1] * 100, 10)) == 10
    assert spark_line([], 8) == ""


def test_figures() -> None:
    assert [figure(v) for v in (None, 12345.6, 7, 0.12345)] == ["–", "12,346", "7", "0.1235"]
