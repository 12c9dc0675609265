"""Shared by the scripts in this folder: timing contenders in turns, and the output formats.

A machine whose speed drifts slows every contender of a round alike, so what to quote is a ratio:
of the medians, with the 20th and 80th percentile of the ratios inside single rounds as its spread.
"""

import contextlib
import csv
import io
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
# Larger than any last-level cache of a GPU; written before each timing of a single op there.
_FLUSH_BYTES = 256 * 2**20
_MOST_FLUSHES = 200


def leave_folder() -> None:
    """Take this folder off the path, where running one of its scripts has put it.

    It holds a kernels.py, and transformers looks for Hugging Face's package of that name.
    """
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != HERE]


@dataclass(frozen=True)
class Contender:
    """Something to time, ready to run."""

    step: Callable[[int], object]
    """Called with the number of the round; what is timed."""
    given: str
    """Version, dtype and options: what this contender was given."""
    before: Callable[[], object] = lambda: None
    """Called before each step, not timed."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender, one entry a round."""

    seconds: tuple[float, ...]
    host: tuple[float, ...] = ()
    """On CUDA: seconds until the host had launched everything, the device perhaps still at work."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p20(self) -> float:
        return percentile(self.seconds, 0.2)

    @property
    def p80(self) -> float:
        return percentile(self.seconds, 0.8)

    @property
    def slowest_over_fastest(self) -> float:
        return max(self.seconds) / min(self.seconds)

    def over(self, other: "Timing") -> dict[str, float]:
        """How many times as long this takes as the other: by medians, and p20, p80 of rounds."""
        rounds = [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]
        return {
            "ratio": self.median / other.median,
            "ratio_p20": percentile(rounds, 0.2),
            "ratio_p80": percentile(rounds, 0.8),
        }

    def columns(self) -> dict[str, float]:
        host = {"host_ms": 1e3 * statistics.median(self.host)} if self.host else {}
        return {
            "rounds": len(self.seconds),
            "median_ms": 1e3 * self.median,
            "p20_ms": 1e3 * self.p20,
            "p80_ms": 1e3 * self.p80,
            "min_ms": 1e3 * min(self.seconds),
            "max_ms": 1e3 * max(self.seconds),
            "slowest_over_fastest": self.slowest_over_fastest,
            **host,
        }


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a `share` of the values lies, linearly interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def take_turns(
    contenders: Mapping[str, Contender],
    device: torch.device,
    *,
    rounds: int,
    warmup: int,
    flush: bool = False,
) -> dict[str, Timing]:
    """Run every contender once a round, in order, and keep the rounds after the first `warmup`.

    Wall time, from an idle device to an idle device: a training step waits for its host too. With
    `flush` on CUDA, device time: between two events on a device that has just overwritten its cache
    and is kept busy until the host has launched the whole step. That is what a single op costs
    inside a larger program; the host's time is given in addition.
    """
    on_cuda = device.type == "cuda"
    clock = _device_clock(device) if flush and on_cuda else _wall_clock(device)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    host: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warmup + rounds):
        for name, contender in contenders.items():
            contender.before()
            elapsed, launched = clock(contender.step, number)
            if number >= warmup:
                seconds[name].append(elapsed)
                host[name].append(launched)
    return {
        name: Timing(tuple(seconds[name]), tuple(host[name]) if on_cuda else ())
        for name in contenders
    }


Clock = Callable[[Callable[[int], object], int], tuple[float, float]]
"""Seconds of a step, and seconds after which its host was free again."""


def _wall_clock(device: torch.device) -> Clock:
    def clock(step: Callable[[int], object], number: int) -> tuple[float, float]:
        synchronise(device)
        started = time.perf_counter()
        step(number)
        launched = time.perf_counter()
        synchronise(device)
        return time.perf_counter() - started, launched - started

    return clock


def _device_clock(device: torch.device) -> Clock:
    cache = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    wall = _wall_clock(device)
    flush = statistics.median(wall(lambda _: cache.zero_(), 0)[0] for _ in range(5))

    def clock(step: Callable[[int], object], number: int) -> tuple[float, float]:
        # As many writes as take twice as long as the host needs; the first steps also compile, and
        # an op that waits for the device takes its host as long as itself.
        _, launched = wall(step, number)
        for _ in range(1 + min(_MOST_FLUSHES, math.ceil(2 * launched / flush))):
            cache.zero_()
        start.record()
        step(number)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, launched

    return clock


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_device(name: str) -> torch.device:
    """The device that --device names. Raises SystemExit for a missing CUDA device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device here; use --device cpu")
    return torch.device(name)


def facts(device: torch.device, shape: Mapping[str, int]) -> dict[str, Any]:
    """The device, versions, revision and date of a measurement."""
    conditions: dict[str, Any] = dict(shape)
    if device.type == "cuda":
        conditions["device"] = torch.cuda.get_device_name(device)
        conditions["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    else:
        conditions |= {"device": _cpu_name(), "threads": torch.get_num_threads()}
    conditions["python"] = platform.python_version()
    conditions |= {name: _version(name) for name in ("torch", "triton")}
    conditions["revision"] = _revision()
    conditions["date"] = datetime.now(UTC).strftime("%Y-%m-%d")
    return conditions


def slug(device: torch.device) -> str:
    """The device in the name of a file: `cpu`, `h100-80gb-hbm3`."""
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(device).lower().removeprefix("nvidia ")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.M)
    return match[1] if match else platform.processor() or platform.machine()


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except ImportError:
        return "not installed"


def _revision() -> str:
    """The commit this runs from; `+` says that tracked code differs from it."""

    def git(*words: str) -> str:
        # Changed results do not count: the first script of a run has just rewritten them.
        return subprocess.run(
            ["git", *words], cwd=HERE.parent, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ".", ":!docs", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def one_line(conditions: Mapping[str, Any]) -> str:
    """The conditions of a measurement as one line."""
    return ", ".join(f"{name} {value}" for name, value in conditions.items())


def markdown(
    conditions: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Any]
) -> str:
    """A table under a line that says where it was measured.

    Columns map a heading to a function of the row, which returns the text of the cell.
    """
    lines = [
        one_line(conditions),
        "",
        "| " + " | ".join(columns) + " |",
        "| --- " * len(columns) + "|",
    ]
    for row in rows:
        cells = [str(cell(row)).replace("|", "\\|") for cell in columns.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def text_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Any]) -> str:
    """The same for a terminal: the first column to the left, the others to the right.

    The column `given` is too long for a terminal; it follows below the table.
    """
    name = next(iter(columns.values()))
    given = [f"  {name(row)}: {row['given']}" for row in rows if row.get("given")]
    columns = {heading: cell for heading, cell in columns.items() if heading != "given"}
    cells = [list(columns)] + [[str(cell(row)) for cell in columns.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return "\n".join(lines + (["given"] if given else []) + given)


def write_files(
    folder: Path,
    name: str,
    conditions: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    page: str,
) -> None:
    """`NAME.csv`, every row with all facts, and `NAME.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    full = [{**row, **conditions} for row in rows]
    fields = list(dict.fromkeys(field for row in full for field in row))
    with _replacing(folder / f"{name}.csv") as path:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fields, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: _short(v) for k, v in row.items()} for row in full)
    with _replacing(folder / f"{name}.md") as path:
        path.write_text(page, encoding="utf-8")


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def write_page(page: Path, name: str, table: str) -> None:
    """Put the table between `<!-- begin NAME -->` and `<!-- end NAME -->` of a page.

    Raises:
        SystemExit: the page lacks one of the two lines.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    text = page.read_text(encoding="utf-8")
    before, opened, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise SystemExit(f"--page {page}: needs the lines '{begin}' and '{end}' around the table")
    with _replacing(page) as path:
        path.write_text(f"{before}{begin}\n{table}{end}{after}", encoding="utf-8")


class _replacing:
    """A temporary path that becomes the real one when the block ends well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.temporary.replace(self.path)
        else:
            self.temporary.unlink(missing_ok=True)


def measured(text: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    """A cell of rows with a measurement; others show "-"."""
    return lambda row: text(row) if row["status"] == "ok" else "-"


def why_not(error: Exception) -> str:
    """The status of a contender that failed with `error`."""
    say(f"  {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    absent = isinstance(error, ModuleNotFoundError)
    return "not installed" if absent else f"failed: {type(error).__name__}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress what rivals print and warn: stdout is for the result, stderr for `say`."""
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def deliver(
    args: Any,
    device: torch.device,
    conditions: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, Any],
) -> None:
    """Print the result, and write the files that --csv and --page ask for."""
    name = f"{args.name}-{slug(device)}"
    table = markdown(conditions, rows, columns)
    if args.csv is not None:
        write_files(args.csv, name, conditions, rows, table)
    if args.page is not None:
        write_page(args.page, name, table)
    if args.json:
        print(json.dumps({"facts": conditions, "rows": rows}, indent=2))
    else:
        print(f"{one_line(conditions)}\n{text_table(rows, columns)}")


def add_flags(parser: Any, *, name: str, rounds: int) -> None:
    """The flags that every script takes."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timed (default {rounds})")
    parser.add_argument("--seconds", type=float, help="after which nothing new is started")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before (default 2)")
    add_output(parser, name)


def add_output(parser: Any, name: str) -> None:
    """Where the result goes, for `deliver`."""
    parser.add_argument("--name", default=name, help=f"of the files of --csv (default {name})")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--csv", type=Path, metavar="DIR", help="write a CSV and a Markdown table")
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="put the Markdown table into this page"
    )


def add_passes(parser: Any) -> None:
    """What goes through a language model, and how far up."""
    parser.add_argument("--layer", type=int, help="one block (default: quarter, half, full depth)")
    parser.add_argument("--batch-size", type=int, default=16, help="contexts (default 16)")
    parser.add_argument("--context", type=int, default=256, help="tokens (default 256)")


def depths(layer: int | None, blocks: int) -> list[int]:
    """The blocks that `--layer` asks for."""
    return [blocks // 4 - 1, blocks // 2 - 1, blocks - 1] if layer is None else [layer]


def add_only(parser: Any) -> None:
    parser.add_argument("--only", metavar="NAMES", help="contenders, with semicolons between them")


def choose(only: str | None, usual: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The contenders that `--only` names, in its order, or the usual ones.

    Raises:
        SystemExit: a name is not known.
    """
    if only is None:
        return dict(usual)
    names = [name.strip() for name in only.split(";")]
    for name in names:
        if name not in known:
            raise SystemExit(f"--only takes some of {'; '.join(known)}, got {name}")
    return {name: known[name] for name in names}


def begin(args: Any) -> torch.device:
    """Set the process up as the flags of `add_flags` say; the device to run on.

    Afterwards `args.out_of_time()` says whether to start nothing new.
    """
    end = None if args.seconds is None else time.monotonic() + args.seconds
    args.out_of_time = lambda: end is not None and time.monotonic() > end
    leave_folder()
    if args.threads:
        torch.set_num_threads(args.threads)
    return choose_device(args.device)


def say(message: str) -> None:
    """Print a progress message on stderr."""
    print(message, file=sys.stderr, flush=True)
