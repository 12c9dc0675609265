"""The Triton kernels: in the interpreter, compiled on a GPU, and compiled ahead of time.

Each in a process of its own: Triton reads TRITON_INTERPRET once, when a kernel is defined.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def run(command: list[str], **variables: str) -> str:
    """Output of a child Python, which has to succeed."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SAESTEER_KERNELS")}
    child = subprocess.run(
        [sys.executable, *command],
        env={**env, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-4000:]
    return child.stdout


def run_suite(**variables: str) -> None:
    suite = str(HERE / "triton_suite.py")
    out = run(["-m", "pytest", suite, "-q", "-p", "no:cacheprovider"], **variables)
    passed = re.search(r"(\d+) passed", out)
    assert passed and int(passed.group(1)) > 50, out


def test_in_the_interpreter() -> None:
    run_suite(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
def test_compiled_on_the_gpu() -> None:
    run_suite()


def test_every_kernel_compiles_for_hopper_without_spilling(tmp_path: Path) -> None:
    out = run([str(HERE / "aot_compile.py")], TRITON_CACHE_DIR=str(tmp_path))
    assert out.count("registers, 0 bytes spilled") + out.count("not assembled") >= 12, out
