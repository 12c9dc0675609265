"""The same SAE trained by saesteer and by its rivals on the same rows: how good, how fast.

    make peers
    saesteer harvest --layer 14,20 --data TRAIN --tokens 500k -o runs/train
    saesteer harvest --layer 14,20 --data OTHER --tokens 40k --keep-positions -o runs/held-out
    python benchmarks/quality.py --data layer-20=runs/train:runs/held-out:20 --archs topk \\
        --work runs/quality --csv benchmarks/results/quality.csv --page docs/quality.md
    python benchmarks/quality.py --smoke        # saesteer alone, on a small synthetic dictionary

Runs are in processes of their own (`quality_ours.py`, `quality_rivals.py`), one after the other; a
tool may have an environment of its own (`--env sparsify=PYTHON`, or `=FOLDER` to put in front of
its path). Rows are scaled once so that the mean of |x|^2 is 1, and come in the same order for
everyone. First each tool is run with one seed at each rate of `--lr` and at its default; then the
best rate, and the default, with all seeds. Runs that `--work` holds already are not repeated, so a
stopped benchmark goes on.

One evaluator measures all SAEs, on held-out rows: that of `saesteer metrics`. An SAE with a
threshold is measured with the threshold that its tool stored, and with one that leaves k latents
active on training rows, which compares dictionaries at equal L0. Intervals are paired: the same
contexts are drawn for both tools, seed by seed.
"""

import argparse
import contextlib
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_page import write_page
from rows import Rows, load_rows
from side_by_side import HERE, leave_folder, say

from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.measuring.figures import OF_ROWS, figures_of_rows, row_values
from saesteer.sae.measuring.ground_truth import score_truth
from saesteer.sae.measuring.latents import LatentTally
from saesteer.sae.synthetic.config import SyntheticConfig
from saesteer.sae.synthetic.features import TRUTH
from saesteer.sae.verbs.synthesise import synthesise

leave_folder()
TOOLS = {
    "saesteer": ("topk", "batchtopk", "matryoshka"),
    "sae_lens": ("topk", "batchtopk", "matryoshka"),
    "dictionary_learning": ("topk", "batchtopk", "matryoshka"),
    "sparsify": ("topk",),
    "sparsify signum": ("topk",),
}
"""What each trains here; "sparsify signum" is sparsify with the optimiser that it ships."""
OURS = "saesteer"
_CHUNK = 4096
# Held-out rows for the points along a run, and training rows for thresholds.
_CURVE_ROWS, _THRESHOLD_ROWS = 4096, 16_384
_COUNTS = ("f1", "mcc", "uniqueness")
COLUMNS = [
    "data", "arch", "tool", "version", "rate", "seed", "given", "d_sae", "k", "steps", "batch",
    "fvu", "l0", "fvu_stored", "l0_stored", "dead", "dense", "cosine", *_COUNTS,
    "cpu_seconds", "wall_seconds", "curve",
]  # fmt: skip
"""`fvu` at equal L0 and `fvu_stored` as saved; `rate` is "default" or a learning rate; `curve` is
CPU seconds and FVU at points along the run."""


@dataclass(frozen=True)
class Data:
    """One set of rows: a name, where they lie, and the truth if they are synthetic."""

    name: str
    train: Rows
    held_out: Rows
    truth: Path | None
    file: Path
    """The training rows, for the processes."""

    @staticmethod
    def open(text: str, work: Path, most_held_out: int) -> "Data":
        """From NAME=TRAIN:HELD_OUT[:LAYER]."""
        name, _, paths = text.partition("=")
        train, held_out, *layer = paths.split(":")
        number = int(layer[0]) if layer else None
        rows = load_rows(Path(train), number)
        file = work / f"{name}.rows.pt"
        if not file.exists():
            torch.save(rows.values.clone(), file)
        truth = Path(train) if (Path(train) / TRUTH).exists() else None
        return Data(name, rows, load_rows(Path(held_out), number, most_held_out), truth, file)


def run(
    data: Data, tool: str, arch: str, wanted: Sequence[tuple[str, int]], args: Any
) -> list[dict[str, Any]]:
    """Train for each rate and seed that `--work` lacks, in one process, and measure."""
    program, _, optimizer = tool.partition(" ")
    common = {"data": data.name, "arch": arch, "tool": tool}
    folders, rows = [], []
    for rate, seed in wanted:
        name = f"{data.name}_{arch}_{tool.replace(' ', '-')}_{rate}_{seed}"
        folders.append(args.work / name)
        folders[-1].mkdir(exist_ok=True)
        job = {
            "tool": program, "optimizer": optimizer or "adam", "arch": arch, "d_sae": args.d_sae,
            "k": args.k, "steps": args.steps, "batch": args.batch, "seed": seed,
            "lr": None if rate == "default" else float(rate), "threads": args.threads,
            "rows": str(data.file.absolute()), "factor": data.train.factor,
            "folder": str(folders[-1].absolute()),
        }  # fmt: skip
        (folders[-1] / "job.json").write_text(json.dumps(job))
    todo = [str(f / "job.json") for f in folders if not (f / "done.json").exists()]
    failed = train_all(program, todo, args) if todo else ""
    for folder, (rate, seed) in zip(folders, wanted, strict=True):
        if not (folder / "done.json").exists():
            say(f"{folder.name} failed: {failed}")
        elif (folder / "row.json").exists():
            rows.append(json.loads((folder / "row.json").read_text()))
        else:
            job = json.loads((folder / "job.json").read_text())
            settings = {name: job[name] for name in ("d_sae", "k", "steps", "batch")}
            found = measure(data, folder, job)
            rows.append({**common, "rate": rate, "seed": seed, **settings, **found})
            (folder / "row.json").write_text(json.dumps(rows[-1]))
            (folder / "sae.pt").unlink()
            say(f"{folder.name}: FVU {found['fvu']:.4f}, {found['cpu_seconds']:.1f} s of a core")
    return rows


def train_all(program: str, jobs: Sequence[str], args: Any) -> str:
    """Train in the tool's environment; returns the last line of what went wrong, if anything."""
    script = "quality_ours.py" if program == OURS else "quality_rivals.py"
    python, environment = environment_of(program, args.env)
    environment["OMP_NUM_THREADS"] = str(args.threads)
    command = [python, str(HERE / script), *jobs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else ""


def environment_of(program: str, given: dict[str, Path]) -> tuple[str, dict[str, str]]:
    """The interpreter of a tool, and its environment variables."""
    environment = dict(os.environ)
    path = given.get(program)
    if path is None or path.is_file():
        return str(path or sys.executable), environment
    before = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(path), *([before] if before else [])])
    return sys.executable, environment


@torch.no_grad()
def measure(data: Data, folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The columns that the SAEs of a finished run give; leaves sums by context in `sums.npy`."""
    done = json.loads((folder / "done.json").read_text())
    kept = torch.load(folder / "sae.pt")
    saes = [as_sae(one, data.train.factor, job) for one in kept]
    held_out = data.held_out
    curve = []
    for sae, seconds in zip(saes, done["cpu"], strict=True):
        equal = at_equal_l0(sae, data, job["k"])
        sums = sums_of(equal, Rows(held_out.values[:_CURVE_ROWS], held_out.units[:_CURVE_ROWS]))
        curve.append((seconds, figures(sums)["fvu"]))
    last = at_equal_l0(saes[-1], data, job["k"])
    latents = LatentTally(job["d_sae"], torch.device("cpu"))
    sums = sums_of(last, held_out, latents)
    np.save(folder / "sums.npy", sums)
    now, of_latents = figures(sums), latents.summary()
    stored = figures(sums_of(saes[-1], held_out))
    scores = score_truth(last, data.truth, samples=20_000) if data.truth else {}
    return {
        "version": done["version"],
        "given": done["given"],
        "fvu": now["fvu"],
        "l0": now["l0"],
        "fvu_stored": stored["fvu"],
        "l0_stored": stored["l0"],
        "dead": of_latents["dead_fraction"],
        "dense": of_latents["dense_latents"]["above_0.1"] / job["d_sae"],
        "cosine": now["cosine"],
        **{name: scores[name] for name in _COUNTS if name in scores},
        "cpu_seconds": done["cpu"][-1],
        "wall_seconds": done["wall"][-1],
        "curve": ";".join(f"{seconds:.4g}:{fvu:.4f}" for seconds, fvu in curve),
    }


def as_sae(kept: dict[str, torch.Tensor], factor: float, job: dict[str, Any]) -> SAE:
    """What a process kept, for rows as they are: it was trained on `factor` times as long ones."""
    jumps = job["arch"] != "topk"
    spec = SAESpec(
        architecture="jumprelu" if jumps else "topk",
        d_model=len(kept["b_dec"]),
        d_sae=job["d_sae"],
        k=None if jumps else job["k"],
        apply_b_dec_to_input=bool(kept["input_bias"]),
    )
    threshold = torch.full((job["d_sae"],), float(kept["threshold"]) / factor) if jumps else None
    W_enc, W_dec = (kept[name].float().contiguous() for name in ("W_enc", "W_dec"))
    b_enc, b_dec = (kept[name].float() / factor for name in ("b_enc", "b_dec"))
    return SAE(spec, W_enc, b_enc, W_dec, b_dec, threshold=threshold)


def at_equal_l0(sae: SAE, data: Data, k: int) -> SAE:
    """With the threshold that leaves k latents of a training row active; a TopK SAE as it is."""
    if sae.threshold is None:
        return sae
    rows = data.train.values[:_THRESHOLD_ROWS]
    least = []
    for part in rows.split(_CHUNK):
        # The largest of each part hold all of the largest over everything, and some more.
        acts = sae.pre_acts(part.float()).flatten()
        least.append(acts.topk(min(len(acts), 4 * k * len(part))).values)
    threshold = torch.cat(least).topk(k * len(rows) + 1).values[-1].clamp(min=0)
    new = torch.full_like(sae.threshold, float(threshold))
    return SAE(sae.spec, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, threshold=new)


def sums_of(sae: SAE, rows: Rows, latents: LatentTally | None = None) -> np.ndarray:
    """Sums of the columns `OF_ROWS` by context, `[contexts, columns]`."""
    mean = rows.values.double().mean(dim=0).float()
    units, inverse = rows.units.unique(return_inverse=True)
    sums = torch.zeros(len(units), len(OF_ROWS), dtype=torch.float64)
    for part, owners in zip(rows.values.split(_CHUNK), inverse.split(_CHUNK), strict=True):
        x = part.float()
        acts = sae.encode(x)
        if latents is not None:
            latents.add(acts)
        values = row_values(x, sae.decode(acts, x), acts, mean)
        table = torch.stack([values[name].double() for name in OF_ROWS], dim=1)
        sums.index_add_(0, owners, table)
    return sums.numpy()


def figures(sums: np.ndarray) -> dict[str, float]:
    """Figures from sums by context."""
    total = dict(zip(OF_ROWS, sums.sum(axis=0)[:, None], strict=True))
    return {name: float(value[0]) for name, value in figures_of_rows(total).items()}


def benchmark(data: Data, arch: str, args: Any) -> None:
    """All runs of one architecture on one set of rows."""
    for tool in args.tools:
        if arch not in TOOLS[tool]:
            continue
        # One seed at each of these rates; the best of them, each tool its own, with the others.
        first, *others = args.seeds
        swept = run(data, tool, arch, [(rate, first) for rate in ["default", *args.lr]], args)
        if not swept:
            continue
        best = min(swept, key=lambda row: row["fvu"])["rate"]
        rates = dict.fromkeys([best, "default"] if args.defaults else [best])
        run(data, tool, arch, [(rate, seed) for rate in rates for seed in others], args)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def smoke(args: argparse.Namespace) -> None:
    """Small enough for a test, without rivals."""
    args.d_sae, args.k, args.steps, args.batch = 32, 3, 24, 64
    args.tools, args.archs, args.seeds, args.lr = [OURS], ["topk", "batchtopk"], [0, 1], ["1e-2"]
    config = SyntheticConfig(d_model=16, features=40, roots=2, branching=2, depth=2)
    for name, tokens in (("train", 2000), ("held-out", 512)):
        if not (args.work / name).exists():
            synthesise(args.work / name, config, tokens=tokens)
    args.data = [f"synthetic={args.work / 'train'}:{args.work / 'held-out'}"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--data", action="append", metavar="NAME=TRAIN:HELD_OUT[:LAYER]")
    parser.add_argument("--archs", type=several, default=["topk", "batchtopk", "matryoshka"])
    parser.add_argument("--tools", type=several, default=list(TOOLS), help=", ".join(TOOLS))
    parser.add_argument("--d-sae", type=int, default=2304)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=several, default=["2e-3", "4e-3", "8e-3"], help="sweep")
    parser.add_argument("--seeds", type=lambda t: [int(s) for s in t.split(",")], default=[0, 1, 2])
    parser.add_argument(
        "--defaults", action="store_true", help="all seeds at each tool's default rate, too"
    )
    parser.add_argument("--held-out-rows", type=int, default=16_384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--env", action="append", default=[], metavar="TOOL=PYTHON|FOLDER")
    parser.add_argument("--work", type=Path, help="folder of the runs (default: a temporary one)")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are rewritten")
    parser.add_argument("--report", action="store_true", help="no new runs: write from --work")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(argv)
    args.env = {name: Path(path) for name, _, path in (text.partition("=") for text in args.env)}
    for tool in args.tools:
        if tool not in TOOLS:
            parser.error(f"--tools must be of {', '.join(TOOLS)}, got {tool}")
    if not (args.data or args.smoke or args.report):
        parser.error("--data is missing")
    return args


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    with contextlib.ExitStack() as stack:
        if args.work is None:
            args.work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        args.work.mkdir(parents=True, exist_ok=True)
        if args.smoke:
            smoke(args)
        for text in () if args.report else args.data:
            data = Data.open(text, args.work, args.held_out_rows)
            for arch in args.archs:
                benchmark(data, arch, args)
        # What other calls have left in the folder belongs to the tables as well.
        rows = [json.loads(path.read_text()) for path in sorted(args.work.glob("*/row.json"))]
        if args.csv:
            write_csv(args.csv, rows)
        if args.page:
            write_page(args.page, rows, args.work)
    return rows


if __name__ == "__main__":
    main()
