"""All GPU measurements in one command, for a machine that is available for a few minutes only.

    python benchmarks/gpu.py                          # eight minutes; all parts
    python benchmarks/gpu.py --minutes 4              # fewer rounds, the most important parts
    python benchmarks/gpu.py --only suites,ops-S1
    python benchmarks/gpu.py --device cpu --smoke     # tiny shapes: only checks the script
    python benchmarks/gpu.py --page-of h100-80gb-hbm3 # the page, from files made elsewhere

Needs no network. Where torch, triton, transformers, jaxtyping, pytest and hypothesis are,
`pip install --no-deps --no-build-isolation -e .` is enough; pytest-xdist makes the tests several
times as fast, and other projects' steps are timed where they can be imported.

Each part is a script of this folder in a process of its own with a time limit. Its result is saved
as soon as it ends, and a failure does not stop the next part. A part is left out, and listed, when
the more important ones that follow would have too little time. Results are `PART-<gpu>.csv` and
`.md` in `benchmarks/results` and a section of `docs/performance.md`, where parts that do not run
this time keep their results; a smoke run writes neither unless --csv and --page say where. The exit
status is 1 when a part failed.
"""

import argparse
import contextlib
import csv
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from side_by_side import (
    HERE,
    add_output,
    choose_device,
    markdown,
    one_line,
    say,
    slug,
    text_table,
    write_files,
    write_page,
)

Row = dict[str, Any]
MINUTES = 8.0
"""Length of the run that the parts' times and rounds are chosen for."""
SECTION = "gpu"
PAGE = HERE.parent / "docs" / "performance.md"


@dataclass(frozen=True)
class Part:
    """One script of the run, and how it is started."""

    name: str
    title: str
    script: str
    flags: str
    smoke: str
    """Flags for tiny shapes; empty where a smoke run of a similar part is enough."""
    seconds: float
    """How long it takes on an H100."""
    priority: int
    """1 is the most important."""
    headline: Callable[[list[Row]], str]
    rounds: int = 1
    cuda_only: str = ""
    """Why a CPU cannot run it."""

    def seconds_for(self, minutes: float) -> float:
        """Its time in a run of `minutes`; compiling takes as long with few rounds as with many."""
        return self.seconds * max(0.6, minutes / MINUTES) if self.rounds > 1 else self.seconds


@dataclass
class Outcome:
    """How a part ended, and its results."""

    part: Part
    status: str
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.status.startswith("failed")

    def row(self) -> Row:
        """Its line in the summary, with the facts that may differ between parts."""
        broken = [row for row in self.rows if str(row.get("status", "")).startswith("failed")]
        notes = [self.part.headline(self.rows)] if self.rows else []
        if self.status != "ok":
            notes.insert(0, self.status)
        notes += [f"{row['contender']} {row['status']}" for row in broken]
        notes.append(self.facts.get("failed", ""))
        return {
            "part": self.part.name,
            "seconds": self.seconds,
            "peak_gb": self.facts.get("peak_gb"),
            "status": self.status,
            "result": "; ".join(filter(None, notes)),
            **{name: self.facts.get(name, "") for name in ("device", "torch", "revision", "date")},
        }


COLUMNS: dict[str, Callable[[Row], str]] = {
    "part": lambda row: row["part"],
    "seconds": lambda row: f"{row['seconds']:.0f}",
    "peak GB": lambda row: "-" if row["peak_gb"] is None else f"{row['peak_gb']:.1f}",
    "revision": lambda row: row["revision"],
    "result": lambda row: row["result"],
}


# ---------------------------------------------------------------------------------------------
# one line of each result


def rates(rows: list[Row]) -> str:
    return ", ".join(f"{row['what']} {row['rate']:,.4g} {row['unit']}" for row in rows)


def suites(rows: list[Row]) -> str:
    counts = ", ".join(
        f"{sum(row[what] for row in rows)} {what}" for what in ("passed", "failed", "skipped")
    )
    compared = [row for row in rows if row["error"] is not None]
    if not compared:
        return counts
    worst = max(compared, key=lambda row: row["error"])
    return f"{counts}, largest error {worst['error']:.1e} ({worst['test']})"


def steps(rows: list[Row]) -> str:
    timed = {row["contender"]: row for row in rows if "median_ms" in row}
    (name, ours), *others = timed.items()
    text = f"{name} {ours['median_ms']:.2f} ms, {ours['tokens_per_second']:,.0f} tokens/s"
    times = [f"{name} {row['median_ms'] / ours['median_ms']:.2f}" for name, row in others]
    return text + (f"; times as long: {', '.join(times)}" if times else "")


def ops(rows: list[Row]) -> str:
    by_share = sorted(rows, key=lambda row: row["share_of_roofline"])
    median = statistics.median(row["share_of_roofline"] for row in rows)
    slower = [
        f"{row['op']} ({row['latents']}) {row['times_as_fast']:.2f} x"
        for row in sorted(rows, key=lambda row: row["times_as_fast"])
        if row["times_as_fast"] < 1
    ]
    text = f"{len(rows)} cases, {median:.0%} of the roofline in the median, "
    text += f"least {by_share[0]['op']} {by_share[0]['share_of_roofline']:.0%}"
    return text + (f"; slower than plain PyTorch: {', '.join(slower)}" if slower else "")


def harvests(rows: list[Row]) -> str:
    return ", ".join(
        f"{row['contender']} {row['tokens_per_second']:,.0f} tokens/s ({row['share_of_bare']:.0%})"
        for row in rows
        if row["status"] == "ok"
    )


def overheads(rows: list[Row]) -> str:
    """The time of each contender over that of the unsteered run, for each batch size."""
    ratios_of: dict[str, list[str]] = {}
    for row in rows:
        if "over_unsteered_ratio" in row:
            ratio = f"{row['over_unsteered_ratio']:.3f}"
            ratios_of.setdefault(row["contender"], []).append(ratio)
    batches = "/".join(str(batch) for batch in dict.fromkeys(row["batch"] for row in rows))
    parts = [f"{name} {'/'.join(ratios)} x" for name, ratios in ratios_of.items()]
    return f"batch {batches}: {', '.join(parts)}"


# ---------------------------------------------------------------------------------------------
# the parts


def _step(
    d_model: int, d_sae: int, k: int, *, seconds: float, priority: int, rounds: int, smoke: str = ""
) -> Part:
    return Part(
        f"step-{d_model}",
        f"One training step, {d_model} x {d_sae}, k {k}, batch 8192",
        "train_step.py",
        f"--alone --d-model {d_model} --d-sae {d_sae} --k {k} --batch 8192",
        smoke,
        seconds,
        priority,
        steps,
        rounds=rounds,
    )


TINY = "--d-model 24 --d-sae 96 --k 4 --batch 48"
GRAPH = "--only 'saesteer step;saesteer step, CUDA graph'"
DENSE = (
    "--only 'saesteer step;saesteer step, float32;x @ W_enc alone;x @ W_enc alone, bfloat16;"
    "encode_topk alone, bfloat16;plain PyTorch, dense;plain PyTorch, dense, autocast'"
)
STEERED = "--no-rivals --only 'add;clamp, TopK SAE;gate'"
READ = "--only 'harvest to shards;live batches;live train'"

PARTS = (
    Part(
        "rates", "The device: rate of products, bandwidth of copies", "rates.py",
        "--size 8192", "--size 128", 15, 1, rates, rounds=15,
    ),
    Part(
        "suites", "Every kernel compiled and compared", "suites.py",
        "", "-k 'test_adam and shape0' --processes 1", 90, 2, suites,
    ),
    _step(576, 16384, 32, seconds=50, priority=3, rounds=9, smoke=f"--alone {TINY} {DENSE}"),
    _step(2304, 65536, 64, seconds=50, priority=9, rounds=7),
    _step(4096, 131072, 64, seconds=80, priority=5, rounds=5),
    Part(
        "ops-S1", "Every op against its roofline, 576 x 16384, k 32, batch 8192", "kernels.py",
        "--size S1", "--size 24x96x4x48", 25, 4, ops, rounds=15,
    ),
    Part(
        "ops-S2", "Every op against its roofline, 4096 x 131072, k 64, batch 8192", "kernels.py",
        "--size S2", "", 55, 6, ops, rounds=9,
    ),
    Part(
        "graph", "A step as a CUDA graph, 576 x 16384, k 32, batch 2048", "train_step.py",
        f"--alone --d-model 576 --d-sae 16384 --k 32 --batch 2048 {GRAPH}",
        f"--alone {TINY} {GRAPH}",
        15, 7, steps, rounds=15, cuda_only="CUDA graphs",
    ),
    Part(
        "harvest", "Harvest of a random model of Llama 3.2 1B's shape", "harvest.py",
        f"--model random:1b --layer 8 --batch-size 16 --context 512 {READ}",
        "--model random:tiny --layer 0 --batch-size 4 --context 64 --only 'live batches'",
        45, 8, harvests, rounds=5,
    ),
    Part(
        "steering", "Steering that model, eager", "steering_overhead.py",
        f"--model random:1b --d-sae 16384 --batch 1,16,64 {STEERED}",
        "--model random:tiny --batch 1,2 --tokens 3 --no-rivals --only 'add;clamp, TopK SAE'",
        45, 10, overheads, rounds=3,
    ),
    Part(
        "steering-compiled", "Steering that model, compiled with a static cache",
        "steering_overhead.py",
        f"--compiled --model random:1b --d-sae 16384 --batch 16,1,64 {STEERED}",
        "--compiled --model random:tiny --batch 1,2 --tokens 3 --no-rivals --only 'add'",
        60, 11, overheads, rounds=3, cuda_only="generation that transformers compiles",
    ),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------
# running them


def run(command: Sequence[str], limit: float) -> tuple[str, str, str]:
    """Run a script; returns how it ended, its stdout, and the last line of its stderr.

    Its stderr is passed on. A script past its limit is stopped with all processes that it started.
    """
    last: deque[str] = deque(maxlen=1)

    def forward(stream: IO[str]) -> None:
        for line in stream:
            sys.stderr.write(f"    {line}")
            last.extend(filter(None, [line.strip()]))

    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        child = subprocess.Popen(
            command, stdout=out, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert child.stderr is not None
        reader = threading.Thread(target=forward, args=(child.stderr,), daemon=True)
        reader.start()
        status = "ok"
        try:
            if child.wait(limit):
                status = "failed"
        except subprocess.TimeoutExpired:
            status = f"failed: stopped after {limit:.0f} s"
        finally:
            _end(child)
        reader.join(2)
        out.seek(0)
        return status, out.read(), "".join(last)


def _end(child: subprocess.Popen[str]) -> None:
    """Stop a script and the processes that it started, which are its process group."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5)
            return


def run_part(part: Part, args: argparse.Namespace, limit: float, enough: float) -> Outcome:
    """Run a part, which starts nothing new after `enough` seconds and is stopped after `limit`."""
    rounds = 1 if args.smoke else max(3, round(part.rounds * args.minutes / MINUTES))
    flags = shlex.split(part.smoke if args.smoke else part.flags)
    command = [sys.executable, str(HERE / part.script), *flags]
    command += ["--device", args.device, "--rounds", str(rounds), "--name", part.name]
    # The scripts take a step of every contender before they time any.
    command += ["--warmup", "0" if args.smoke else "1", "--seconds", f"{enough:.1f}"]
    command += ["--json", "--csv", str(args.csv)]
    started = time.monotonic()
    status, printed, last = run(command, limit)
    outcome = Outcome(part, status, time.monotonic() - started)
    start = printed.find("{\n")
    if start >= 0:
        with contextlib.suppress(json.JSONDecodeError):
            document, _ = json.JSONDecoder().raw_decode(printed[start:])
            outcome.facts, outcome.rows = document["facts"], document["rows"]
    if status == "failed":
        outcome.status = "failed" if outcome.rows else f"failed: {last[:200]}"
    return outcome


def room_for(part: Part, later: Sequence[Part], remaining: float, minutes: float) -> float:
    """Seconds that later, more important parts leave to this one; 0 where they are too few."""
    important = [other for other in later if other.priority < part.priority]
    room = remaining - sum(other.seconds_for(minutes) for other in important)
    return room if room >= part.seconds_for(minutes) / 1.5 else 0.0


def reason_to_leave_out(part: Part, args: argparse.Namespace) -> str:
    """Why a part cannot run here; empty where it can."""
    if args.device == "cpu" and part.cuda_only:
        return f"a CPU has no {part.cuda_only}"
    if args.smoke and not part.smoke:
        return "a smoke run takes one shape"
    return ""


# ---------------------------------------------------------------------------------------------
# saving what they found


def earlier(args: argparse.Namespace, where: str) -> dict[str, Row]:
    """Lines of the summary of an earlier run in the folder, by part."""
    path = args.csv / f"{args.name}-{where}.csv"
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows: list[Row] = list(csv.DictReader(file))
    for row in rows:
        row["seconds"] = float(row["seconds"])
        row["peak_gb"] = float(row["peak_gb"]) if row["peak_gb"] else None
    return {row["part"]: row for row in rows}


def save(
    args: argparse.Namespace, outcomes: Sequence[Outcome], left_out: dict[str, str], where: str
) -> None:
    """Write the summary and the page: of this run, and of earlier ones for parts not in it."""
    absent = {
        name: {
            "part": name,
            "seconds": 0.0,
            "peak_gb": None,
            "status": "left out",
            "result": f"left out: {why}",
            "device": "",
            "revision": "",
        }
        for name, why in left_out.items()
    }
    ran = {outcome.part.name: outcome.row() for outcome in outcomes}
    known = absent | earlier(args, where) | ran
    rows = [known[part.name] for part in PARTS if part.name in known]
    device = next((row["device"] for row in rows if row["device"]), where)
    summary = markdown({"device": device}, rows, COLUMNS)
    write_files(args.csv, f"{args.name}-{where}", {}, rows, summary)
    if args.page is None:
        return
    without = {outcome.part.name for outcome in outcomes if not outcome.rows}
    tables = ""
    for part in PARTS:
        table = args.csv / f"{part.name}-{where}.md"
        if part.name in known and part.name not in without and table.exists():
            tables += f"\n### {part.title}\n\n{table.read_text(encoding='utf-8')}"
    write_page(args.page, SECTION, summary + tables)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="in all (default 8)")
    names = ",".join(part.name for part in PARTS)
    parser.add_argument("--only", metavar="PARTS", help=f"commas between them; all: {names}")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, one round")
    parser.add_argument(
        "--page-of", metavar="GPU", help="measure nothing: the page, from the files of GPU in --csv"
    )
    add_output(parser, SECTION)
    args = parser.parse_args(argv)
    chosen = names.split(",") if args.only is None else args.only.split(",")
    if unknown := [name for name in chosen if name not in names.split(",")]:
        parser.error(f"--only takes some of {names}, got {unknown[0]}")
    if args.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {args.minutes:g}")
    args.parts = [part for part in PARTS if part.name in chosen]
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    started = time.monotonic()
    if args.page_of:
        args.csv, args.page = args.csv or HERE / "results", args.page or PAGE
        if not earlier(args, args.page_of):
            raise SystemExit(f"--page-of {args.page_of}: {args.csv} has no results of it")
        save(args, [], {}, args.page_of)
        return
    device = choose_device(args.device)
    if device.type == "cpu" and not args.smoke:
        raise SystemExit(
            "torch sees no CUDA device here: --device cpu --smoke proves this script on a CPU, and "
            "`make bench` measures one"
        )
    args.device = device.type
    folder = None
    if args.csv is None and args.smoke:
        folder = tempfile.TemporaryDirectory(prefix="gpu-smoke-")
        args.csv = Path(folder.name)
    elif not args.smoke:
        args.csv, args.page = args.csv or HERE / "results", args.page or PAGE
    where = slug(device)
    outcomes: list[Outcome] = []
    left_out: dict[str, str] = {}
    for number, part in enumerate(args.parts):
        later = args.parts[number + 1 :]
        remaining = 60 * args.minutes - (time.monotonic() - started)
        usual = part.seconds_for(args.minutes)
        why = reason_to_leave_out(part, args)
        room = room_for(part, later, remaining, args.minutes)
        if not why and not room:
            why = f"no time: it takes about {usual:.0f} s, and {remaining:.0f} s are left for all"
        if why:
            say(f"{part.name}: left out, {why}")
            left_out[part.name] = why
            continue
        limit = min(room, 2 * usual)
        # It may use the time that later parts do not need, but keeps a fifth to write its results.
        spare = remaining - sum(other.seconds_for(args.minutes) for other in later)
        enough = min(max(usual, spare), 0.8 * limit)
        say(f"{part.name}: {part.title} (at most {limit:.0f} s)")
        outcomes.append(run_part(part, args, limit, enough))
        say(f"{part.name}: {outcomes[-1].status} after {outcomes[-1].seconds:.0f} s")
        save(args, outcomes, left_out, where)
    if left_out:
        save(args, outcomes, left_out, where)
    report(args, outcomes, left_out)
    if folder is not None:
        folder.cleanup()
    if any(outcome.failed for outcome in outcomes):
        raise SystemExit(1)


def report(args: argparse.Namespace, outcomes: Sequence[Outcome], left_out: dict[str, str]) -> None:
    """Print the results, for people or as JSON."""
    rows = [outcome.row() for outcome in outcomes]
    facts = next((outcome.facts for outcome in outcomes if outcome.facts), {})
    if args.json:
        print(json.dumps({"facts": facts, "rows": rows, "left_out": left_out}, indent=2))
        return
    # The results are sentences, so they follow below the table of numbers.
    numbers = {name: cell for name, cell in COLUMNS.items() if name not in ("result", "revision")}
    print(one_line(facts))
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    print(text_table(rows, {**numbers, "status": lambda row: row["status"].partition(":")[0]}))
    for row in rows:
        print(f"{row['part']}: {row['result']}")


if __name__ == "__main__":
    main()
