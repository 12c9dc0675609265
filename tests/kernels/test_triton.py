"""The Triton kernels: in the interpreter, compiled on a GPU, and compiled ahead of time.

Each in a process of its own: Triton reads TRITON_INTERPRET once, when a kernel is defined. The slow
suite also compiles them with an older Triton, which it fetches.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
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
    suites = [str(path) for path in sorted(HERE.glob("triton_suite*.py"))]
    out = run(["-m", "pytest", *suites, "-q", "-p", "no:cacheprovider"], **variables)
    passed = re.search(r"(\d+) passed", out)
    assert passed and int(passed.group(1)) > 100, out


def test_in_the_interpreter() -> None:
    run_suite(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
def test_compiled_on_the_gpu() -> None:
    run_suite()


def test_every_kernel_compiles_for_hopper_without_spilling(tmp_path: Path) -> None:
    out = run([str(HERE / "aot_compile.py")], TRITON_CACHE_DIR=str(tmp_path))
    assert out.count("registers, 0 bytes spilled") + out.count("not assembled") >= 30, out


OLDER = "3.6"
"""GPU machines with an older torch have the Triton that it pins."""


@pytest.fixture(scope="module")
def older_triton() -> Path:
    """Folder to put first on the path for Triton 3.6; fetched once, into the user's cache."""
    if version("triton").startswith(f"{OLDER}."):
        pytest.skip(f"the installed Triton is {OLDER} itself")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saesteer"
    folder = cache / f"triton-{OLDER}-py{sys.version_info.major}.{sys.version_info.minor}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Renamed once complete: an interrupted download leaves nothing that looks like Triton.
        part = Path(tempfile.mkdtemp(dir=cache))
    except OSError as error:
        pytest.skip(f"Triton {OLDER} cannot be kept in {cache}: {error}")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--timeout=10"]
    command += ["--retries=0", "install", "-q", "--only-binary=:all:", "--no-deps"]
    command += ["--target", str(part / "triton"), f"triton=={OLDER}.*"]
    try:
        child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
        trouble = child.stderr.strip().splitlines()[-1:] if child.returncode else []
        if child.returncode == 0 and not folder.is_dir():
            (part / "triton").rename(folder)
    except subprocess.TimeoutExpired:
        trouble = ["the download took more than 180 s"]
    except OSError:  # another run was first
        trouble = []
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if not folder.is_dir():
        pytest.skip(f"Triton {OLDER} could not be fetched: {' '.join(trouble)}")
    return folder


@pytest.mark.slow
def test_every_kernel_compiles_with_an_older_triton(older_triton: Path, tmp_path: Path) -> None:
    out = run(
        [str(HERE / "aot_compile.py")],
        TRITON_CACHE_DIR=str(tmp_path),
        PYTHONPATH=str(older_triton),
    )
    assert f"triton {OLDER}." in out
    assert out.count("registers, 0 bytes spilled") + out.count("not assembled") >= 30, out
