"""Kill a harvest and a live training with SIGKILL at random instants; resuming must lose nothing.

    python benchmarks/kill_resume.py --model smollm2-135m-instruct --kills 20
    python benchmarks/kill_resume.py --verb train --kills 5

Each verb runs once undisturbed. Then it is started again and again on one folder, each time killed
after a random time, `--kills` times, and then left to finish. The folder is compared with that of
the undisturbed run: for `harvest` every row (context, position, token, activations), for `train`
the weights and the log, bit for bit. A kill that comes after the end counts as well, and is
reported as such.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from saesteer.checkpoints.shards import ShardReader

COMMON = ("--layer", "1", "--context", "64", "--batch-size", "8", "--epochs", "50")
WORDS = {
    "harvest": ("--shard-tokens", "4096", "--keep-positions", "--shuffle"),
    "train": (
        "--d-sae",
        "256",
        "--k",
        "8",
        "--batch-tokens",
        "256",
        "--buffer-tokens",
        "8192",
        "--checkpoint-every",
        "8192",
        "--init-seed",
        "0,1",
    ),
}
TIMINGS = ("tokens_per_second", "stall_model", "stall_trainer")


def command(verb: str, args: argparse.Namespace, out: Path, *more: str) -> list[str]:
    """The command line of a run of one verb that writes to `out`."""
    words = ["-m", "saesteer.cli", verb, "--model", args.model, "--tokens", str(args.tokens)]
    return [sys.executable, "-P", *words, *COMMON, *WORDS[verb], "-o", str(out), *more]


def run(words: list[str], verb: str) -> float:
    """Run to the end; returns the seconds it was at work, without starting up."""
    child = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for_work(child, verb)
    started = time.monotonic()
    child.communicate()
    if child.returncode:
        raise SystemExit(f"a run failed by itself: {' '.join(words)}")
    return time.monotonic() - started


def wait_for_work(child: "subprocess.Popen[str]", verb: str) -> None:
    """Read the progress until the verb's own stage begins."""
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith(f"{verb}:"):
            return


def kill_after(words: list[str], verb: str, seconds: float, while_starting: bool) -> bool:
    """Start a run and kill it `seconds` after its work or its process began.

    Returns whether it was still running.
    """
    child = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    if not while_starting:
        wait_for_work(child, verb)
    time.sleep(seconds)
    running = child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.communicate()
    if not running and child.returncode:
        raise SystemExit(f"a resumed run failed by itself: {' '.join(words)}")
    return running


def harvested(folder: Path) -> object:
    """Every row, ordered by its place in the corpus."""
    reader = ShardReader(folder)
    reader.verify()
    keys, rows = [], []
    for index in range(len(reader)):
        columns = reader.columns(index)
        keys.append(
            torch.stack([columns[n].long() for n in ("contexts", "positions", "token_ids")])
        )
        rows.append(reader.shard(index)[0])
    key, row = torch.cat(keys, dim=1), torch.cat(rows)
    order = (key[0] * 65_536 + key[1]).argsort()
    return key[:, order].tolist(), row[order].float().numpy().tobytes()


def trained(folder: Path) -> object:
    """Weights and log of every SAE."""
    weights = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("sae_weights.safetensors"))
    }
    logs = {}
    for path in sorted(folder.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        logs[str(path.relative_to(folder))] = [
            {name: value for name, value in line.items() if name not in TIMINGS} for line in lines
        ]
    return weights, logs


def check(verb: str, args: argparse.Namespace, folder: Path) -> bool:
    """Run, kill and resume one verb; returns whether the results are equal."""
    rng = random.Random(args.seed)
    whole, broken = folder / "whole", folder / "broken"
    seconds = run(command(verb, args, whole), verb)
    print(f"{verb}: {seconds:.1f} s of undisturbed work", flush=True)
    at_work = 0
    for number in range(args.kills):
        # Every fifth kill comes while the process starts. The others leave the run unfinished, all
        # of them together: each lets it work for half a share of the whole on average.
        while_starting = number % 5 == 4
        lasts = rng.uniform(0, 6.0 if while_starting else seconds / args.kills)
        words = command(verb, args, broken, "--resume")
        killed = kill_after(words, verb, lasts, while_starting)
        at_work += killed
        when = f"{lasts:.2f} s after the {'start' if while_starting else 'work began'}"
        print(f"  kill {number + 1}, {when}: {'killed' if killed else 'had finished'}", flush=True)
    run(command(verb, args, broken, "--resume"), verb)
    read = harvested if verb == "harvest" else trained
    same = read(whole) == read(broken)
    print(f"{verb}: {at_work} of {args.kills} kills met it at work; equal to the bit: {same}")
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--verb", choices=("harvest", "train"), help="one of them (default: both)")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    verbs = (args.verb,) if args.verb else ("harvest", "train")
    folder = Path(tempfile.mkdtemp(prefix="kill-resume-"))
    good = []
    for verb in verbs:
        good.append(check(verb, args, folder / verb))
    shutil.rmtree(folder)
    if not all(good):
        raise SystemExit("something was lost or repeated")


if __name__ == "__main__":
    main()
