"""Compiles and compares every Triton kernel: the kernels' suites, and all tests marked `gpu`.

    python benchmarks/suites.py
    python benchmarks/suites.py --device cpu -k test_adam       # in Triton's interpreter

One row for each test function: how many of its cases passed, how long they took, and the largest
relative error that they saw. Compiling is what takes the time, so the tests run in as many
processes as there are cores less two, where pytest-xdist is installed. After `--seconds` the tests
that have ended are reported.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from side_by_side import HERE, add_flags, begin, deliver, facts, say

ROOT = HERE.parent
TESTS = ROOT / "tests"


def suites() -> list[Path]:
    """The files of the kernels' suites."""
    return sorted((TESTS / "kernels").glob("triton_suite*.py"))


def marked() -> list[Path]:
    """Files with tests marked `gpu`, except the one that runs the suites."""
    runner = TESTS / "kernels" / "test_triton.py"
    return [
        path
        for path in sorted(TESTS.rglob("test_*.py"))
        if path != runner and "@pytest.mark.gpu" in path.read_text(encoding="utf-8")
    ]


def run(words: Sequence[str], log: Path, limit: float | None, **variables: str) -> str:
    """Run pytest on some paths and log its results; returns how it ended."""
    dropped = ("TRITON_INTERPRET", "SAESTEER_KERNELS", "PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    paths = [str(HERE / "plugins"), *filter(None, [env.get("PYTHONPATH")])]
    env |= {"LARGEST_ERROR_LOG": str(log), "PYTHONPATH": os.pathsep.join(paths), **variables}
    # The shapes are checked by the ordinary run of the tests; here they would only take time.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "largest_error"]
    command += ["-p", "no:cacheprovider", "--tb=short", "-o", "addopts=--import-mode=importlib"]
    child = subprocess.Popen([*command, *words], env=env, cwd=ROOT, stdout=sys.stderr)
    try:
        code = child.wait(limit)
    except subprocess.TimeoutExpired:
        child.terminate()
        child.wait()
        return "out of time"
    return {0: "passed", 1: "failed", 5: "no tests"}.get(code, f"pytest ended with {code}")


def rows_of(log: Path) -> list[dict[str, Any]]:
    """One for each test function, in the order in which they were first seen."""
    rows: dict[str, dict[str, Any]] = {}
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    for entry in map(json.loads, lines):
        path, _, name = entry["test"].partition("::")
        row = rows.setdefault(
            f"{Path(path).stem}::{name.partition('[')[0]}",
            {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "error": None, "note": ""},
        )
        row["seconds"] += entry["seconds"]
        if entry["when"] == "call" or entry["outcome"] != "passed":
            row[entry["outcome"]] += 1
        if entry["error"] is not None:
            row["error"] = max(row["error"] or 0.0, entry["error"])
        row["note"] = row["note"] or " ".join(entry["message"])[:200]
    return [{"test": test, **row} for test, row in rows.items()]


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "test": lambda row: row["test"],
    "passed": lambda row: str(row["passed"]),
    "failed": lambda row: str(row["failed"]),
    "skipped": lambda row: str(row["skipped"]),
    "seconds": lambda row: f"{row['seconds']:.1f}",
    "largest error": lambda row: "-" if row["error"] is None else f"{row['error']:.1e}",
    "note": lambda row: row["note"],
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-k", metavar="EXPRESSION", help="tests, as pytest takes it")
    parser.add_argument("--processes", type=int, help="default: cores but two, with pytest-xdist")
    add_flags(parser, name="suites", rounds=1)
    args = parser.parse_args(argv)
    device = begin(args)
    end = time.monotonic() + (args.seconds or 1e9)
    processes = args.processes or max(1, (os.cpu_count() or 1) - 2)
    if importlib.util.find_spec("xdist") is None:
        processes = 1
    words = ["-k", args.k] if args.k else []
    words += ["-n", str(processes)] if processes > 1 else []
    ended = {}
    with tempfile.TemporaryDirectory(prefix="suites-") as folder:
        log = Path(folder) / "log"
        jobs: dict[str, tuple[list[Path], list[str], dict[str, str]]] = {
            "suites": (suites(), [], {}),
            "tests marked gpu": (marked(), ["-m", "gpu"], {}),
        }
        if device.type == "cpu":
            say("not run: the tests marked gpu, which need one")
            jobs = {"suites, interpreted": (suites(), [], {"TRITON_INTERPRET": "1"})}
        for name, (paths, more, variables) in jobs.items():
            say(f"{name}: {len(paths)} files in {processes} processes")
            limit = max(1.0, end - time.monotonic())
            ended[name] = run([*map(str, paths), *more, *words], log, limit, **variables)
        rows = rows_of(log)
    conditions = {**facts(device, {}), "processes": processes, **ended}
    deliver(args, device, conditions, rows, COLUMNS)
    if not set(ended.values()) <= {"passed", "no tests"}:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
