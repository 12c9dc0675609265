"""Whether the memory of a long harvest and of a long live training stays constant.

    python benchmarks/memory.py                     # block 2 of SmolLM2-135M, a million tokens each
    python benchmarks/memory.py --layer 14 --tokens 5000000

Each verb runs in a process of its own, whose resident memory is read ten times a second from the
first line of its progress on. The table shows it a tenth of the way in, half-way, at the end, and
the most there was; a run that leaks grows from column to column. Linux only.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kill_resume import wait_for_work
from side_by_side import add_output, deliver, facts, say

PAGE = os.sysconf("SC_PAGE_SIZE")
WORDS = {
    "harvest": ("--epochs", "1000"),
    "train": ("--epochs", "1000", "--d-sae", "4608", "--k", "32"),
}


def resident(process: int) -> int:
    """Bytes of memory that a process holds; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def watch(verb: str, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Run one verb and sample its resident memory: a row of the table."""
    words = [verb, "--model", args.model, "--layer", str(args.layer), "--tokens", str(args.tokens)]
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "saesteer.cli", *words, *WORDS[verb], "-o", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    wait_for_work(child, verb)
    drain = threading.Thread(target=child.communicate)
    drain.start()
    started, held = time.monotonic(), []
    while drain.is_alive():
        held.append(resident(child.pid))
        time.sleep(0.1)
    drain.join()
    if child.returncode:
        raise SystemExit(f"the run failed by itself: saesteer {' '.join(words)}")
    held = [size for size in held if size] or [0]
    return {
        "verb": verb,
        "layer": args.layer,
        "tokens": args.tokens,
        "seconds": time.monotonic() - started,
        "bytes_after_a_tenth": held[len(held) // 10],
        "bytes_half_way": held[len(held) // 2],
        # The last readings may be from the process's exit.
        "bytes_at_the_end": held[-max(1, len(held) // 20)],
        "most_bytes": max(held),
    }


def megabytes(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{row[name] / 1e6:,.0f}"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "verb": lambda row: row["verb"],
    "block": lambda row: str(row["layer"]),
    "tokens": lambda row: f"{row['tokens']:,}",
    "seconds": lambda row: f"{row['seconds']:.0f}",
    "MB after a tenth": megabytes("bytes_after_a_tenth"),
    "half-way": megabytes("bytes_half_way"),
    "at the end": megabytes("bytes_at_the_end"),
    "most": megabytes("most_bytes"),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--verb", choices=tuple(WORDS), help="one of them (default: both)")
    add_output(parser, "memory")
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        for verb in (args.verb,) if args.verb else WORDS:
            say(f"{verb}: {args.tokens:,} tokens")
            rows.append(watch(verb, args, Path(folder) / verb))
    device = torch.device("cpu")
    conditions = {"model": args.model, **facts(device, {})}
    deliver(args, device, conditions, rows, COLUMNS)


if __name__ == "__main__":
    main()
