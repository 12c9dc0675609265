"""`saesteer reproduce` on a small run."""

import shutil
from pathlib import Path

from .conftest import Cli


def test_an_equal_run(cli: Cli, sae: Path, tmp_path: Path) -> None:
    outcome = cli("reproduce", sae, "-q")
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines() == [
        f"equal  {sae}", "  the same inputs, versions and machine"
    ]  # fmt: skip
    found = cli("reproduce", sae, "-q", "--json", "-o", tmp_path / "again").json()
    assert found["equal"] and found["again"] == str(tmp_path / "again")


def test_a_run_that_differs_fails(cli: Cli, sae: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sae, tmp_path / "sae")
    log = copy / "metrics.jsonl"
    log.write_text(log.read_text().replace('"step": 20,', '"step": 21,', 1))
    outcome = cli("reproduce", copy, "-q")
    assert outcome.status == 1
    assert outcome.out.startswith(f"DIFFER {copy}\n")
    assert "the logs differ from step" in outcome.out
    assert outcome.err.count("\n") == 1 and "something in it is not deterministic" in outcome.err


def test_what_cannot_be(cli: Cli, sae: Path, tmp_path: Path) -> None:
    assert "RUN is missing" in cli("reproduce").error(2)
    assert "--seed is part of the record" in cli("reproduce", sae, "--seed", 1).error(2)
    assert "holds no run.json" in cli("reproduce", tmp_path, "-q").error(2)
    assert "--out" in cli("reproduce", sae, "-q", "-o", sae.parent, "--force").error(2)
