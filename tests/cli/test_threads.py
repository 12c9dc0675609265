"""Numbers of threads, and how they wait, are settled before torch is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saesteer.cli import threads
from saesteer.cli.__main__ import VERBS, main, make_parser
from saesteer.cli.threads import others_compute, use_threads

CORES = os.cpu_count() or 1


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "others_compute", lambda: True)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"{CORES * 1.5:.2f} 0.5 0.1 {CORES + 1}/300 4711", True),
        (f"{CORES * 1.5:.2f} 0.5 0.1 1/300 4711", False),  # what ran has ended
        (f"0.02 0.5 0.1 {CORES + 1}/300 4711", False),  # and will soon have ended
        ("no numbers here at all", False),
        ("", False),
    ],
)
def test_other_work_is_seen(line: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "loadavg").write_text(line)
    assert others_compute(tmp_path / "loadavg") is expected
    assert not others_compute(tmp_path / "missing")


def test_threads_sleep_beside_other_work(busy: None) -> None:
    environment: dict[str, str] = {}
    use_threads(None, environment)
    assert environment == {"OMP_WAIT_POLICY": "passive"}
    own = {"OMP_WAIT_POLICY": "active"}
    use_threads(None, own)
    assert own == {"OMP_WAIT_POLICY": "active"}


def test_a_number_goes_to_every_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "others_compute", lambda: False)
    before = torch.get_num_threads()
    environment: dict[str, str] = {}
    try:
        use_threads(before + 1, environment)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert set(environment.values()) == {str(before + 1)} and "OMP_NUM_THREADS" in environment


def test_it_is_early_enough_for_openmp(tmp_path: Path) -> None:
    """A verb that only parses and loads torch computes on the number that was asked for."""
    program = (
        "import sys; from saesteer.cli import __main__, harvest;"
        "harvest.run = lambda args: print('torch' in sys.modules,"
        " __import__('torch').get_num_threads(), __import__('os').environ['OMP_NUM_THREADS']);"
        "__main__.main(['harvest', '--threads', '1', '-o', 'x'])"
    )
    own = {name: value for name, value in os.environ.items() if not name.endswith("_THREADS")}
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=own)
    assert done.stdout.split() == ["False", "1", "1"], done.stderr


def test_every_verb_that_computes_has_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    without = {verb for verb in VERBS if "--threads" not in make_parser(verb).flags()}
    assert without == {"push", "reproduce", "watch", "tasks", "formats", "models"}
    assert main(["harvest", "--threads", "0", "-o", "x"]) == 2
    assert "--threads" in capsys.readouterr().err
