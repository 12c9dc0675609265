"""Killed at random instants and resumed: not a token lost or repeated."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "kill_resume.py"


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["harvest", "train"])
def test_twenty_kills(verb: str, tiny_model_dir: Callable[..., Path]) -> None:
    words = [sys.executable, "-P", SCRIPT, "--verb", verb, "--model", tiny_model_dir("llama")]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{verb}: " in done.stdout and "equal to the bit: True" in done.stdout
