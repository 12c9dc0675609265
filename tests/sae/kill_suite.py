"""Kill a training run at random instants until it is done; compare it with one left in peace.

    python tests/sae/kill_suite.py FOLDER shards|live SOURCE --kills 20 --seed 1

Children are forked from this process, which has imported everything and computed nothing, so that
a leg starts within milliseconds and many fit into a minute. The last line on stdout is JSON.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from saesteer.checkpoints.files import read_json, read_jsonl
from saesteer.checkpoints.run_state import has_state, load_state
from saesteer.sae.config import TextConfig, TrainConfig
from saesteer.sae.models import load_model
from saesteer.sae.training import train

TIMINGS = ("tokens_per_second", "stall_model", "stall_trainer")
SHARDS = TrainConfig(
    d_sae=(64,), k=(4,), init_seed=(0, 1), tokens=32 * 1200, batch_tokens=32, buffer_tokens=1024,
    checkpoint_every=64, auxk=0.5, dead_after_tokens=512,
    text=TextConfig(max_norm_ratio=1.3),
)  # fmt: skip
LIVE = replace(
    SHARDS, layers=(1, 2), tokens=32 * 500, init_seed=(0,),
    text=TextConfig(context=32, batch_size=2, epochs=50, max_norm_ratio=1.3),
)  # fmt: skip


def fork(work: Callable[[], object]) -> int:
    """The id of a child that does `work` and leaves without cleaning up."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def finished(pid: int) -> bool:
    """Whether the child ended by itself. Raises when it failed."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit("a leg failed")
    return True


def result_of(folder: Path) -> dict[str, Any]:
    """All that a run leaves but its times: weights, logs, reports, and the last state."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("sae_weights.safetensors")):
        found[str(path.relative_to(folder))] = path.read_bytes()
    for path in sorted(folder.rglob("metrics.jsonl")):
        rows = read_jsonl(path)
        found[str(path.relative_to(folder))] = [
            {key: row[key] for key in row if key not in TIMINGS} for row in rows
        ]
    for path in sorted(folder.rglob("run.json")):
        run = read_json(path)
        final = {key: run["final"][key] for key in run["final"] if key not in TIMINGS}
        keys = ("complete", "sae", "config", "model", "data", "excluded")
        found[str(path.relative_to(folder))] = {**{key: run[key] for key in keys}, "final": final}
    tensors, meta = load_state(folder)
    for name, tensor in tensors.items():
        found[f"state/{name}"] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    found["state"] = {key: meta[key] for key in ("stream", "step", "scales", "peak_lrs")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("mode", choices=["shards", "live"])
    parser.add_argument("source")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the usual length of a run")
    args = parser.parse_args()
    config, source = SHARDS, {"activations": args.source}
    if args.mode == "live":
        config, source = LIVE, {"model": load_model(args.source, device="cpu")}
    config = replace(config, tokens=round(config.tokens * args.share / 32) * 32)
    steps = config.tokens // config.batch_tokens

    def run(folder: Path) -> None:
        train(folder, config, device="cpu", resume=True, **source)

    whole = args.folder / "whole"
    started = time.monotonic()
    assert finished(fork(lambda: run(whole)))
    seconds = time.monotonic() - started
    expected = result_of(whole)
    lines = [[row["step"] for row in rows] for name, rows in expected.items() if "metrics" in name]
    every = max(1, steps // 100)
    assert all(line == list(range(every, steps + 1, every)) for line in lines), lines
    rng = random.Random(args.seed)
    kills, runs, at_steps = 0, 0, []
    while kills < args.kills:
        runs += 1
        out = args.folder / f"killed-{runs}"
        killed_here = 0
        while True:
            pid = fork(lambda out=out: run(out))
            # The last leg of the last run is left in peace.
            if kills < args.kills:
                time.sleep(rng.uniform(0, 0.5 * seconds))
                os.kill(pid, signal.SIGKILL)
            if finished(pid):
                break
            kills += 1
            killed_here += 1
            at_steps.append(load_state(out)[1]["step"] if has_state(out) else 0)
        found = result_of(out)
        differing = [key for key in expected if found.get(key) != expected[key]]
        if differing or found.keys() != expected.keys():
            sys.exit(f"seed {args.seed}: after {killed_here} kills these differ: {differing}")
    report = {
        "mode": args.mode,
        "seed": args.seed,
        "kills": kills,
        "runs": runs,
        "steps": steps,
        "saved_steps_at_kills": at_steps,
        "things_compared": len(expected),
        "seconds_uninterrupted": round(seconds, 2),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
