"""Kill a run at random instants until it ends; compare it with an uninterrupted one.

    python tests/sae/training/kill_suite.py FOLDER shards|live|gloo SOURCE --kills 20 --seed 1

`shards` and `live` train in one process; `gloo` harvests with two, of which one or both are killed.
Children are forked from this process, which has imported everything and computed nothing, so that
each starts within milliseconds and many fit into a minute. The last line on stdout is JSON.
"""

import argparse
import faulthandler
import json
import math
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from saesteer.checkpoints.files import read_json, read_jsonl
from saesteer.checkpoints.run_state import has_state, load_state
from saesteer.sae.config import HarvestConfig, TextConfig, TrainConfig
from saesteer.sae.model.language_model import load_model
from saesteer.sae.verbs.harvest import harvest
from saesteer.sae.verbs.train import train

TIMINGS = ("tokens_per_second", "stall_model", "stall_trainer")
SHARDS = TrainConfig(
    d_sae=(64,),
    k=(4,),
    init_seed=(0, 1),
    tokens=32 * 1200,
    batch_tokens=32,
    buffer_tokens=1024,
    checkpoint_every=64,
    auxk=0.5,
    dead_after_tokens=512,
    text=TextConfig(max_norm_ratio=1.3),
)
LIVE = replace(
    SHARDS,
    layers=(1, 2),
    tokens=32 * 500,
    init_seed=(0,),
    text=TextConfig(context=32, batch_size=2, epochs=50, max_norm_ratio=1.3),
)

HUNG_SECONDS = 240.0
"""A child that is still at it then prints where it stands, and fails."""
PARTNER_SECONDS = 5.0
"""How long a process may take to notice that the other one was killed."""

HARVEST = HarvestConfig(
    layers=(1, 2),
    tokens=24_000,
    shard_tokens=700,
    keep_positions=True,
    shuffle=True,
    rank_timeout=30,
    text=TextConfig(context=32, batch_size=2, epochs=50, max_norm_ratio=1.3),
)


def fork(work: Callable[[], object]) -> int:
    """The id of a child that does `work` and leaves without cleaning up."""
    pid = os.fork()
    if pid == 0:
        status = 1
        faulthandler.dump_traceback_later(HUNG_SECONDS, exit=True)
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def fork_two(work: Callable[[], object]) -> list[int]:
    """Two children that find each other as the processes of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def joined(rank: int) -> None:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), **where}
        work()

    return [fork(partial(joined, rank)) for rank in range(2)]


def finished(pids: Sequence[int]) -> bool:
    """Whether the children ended by themselves. Raises when one failed while none was killed.

    A process whose partner was killed reports that and ends. If it does not within
    `PARTNER_SECONDS`, it is killed as well, as torchrun would.
    """
    codes: dict[int, int] = {}
    give_up = math.inf
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] == -signal.SIGKILL:
                give_up = min(give_up, time.monotonic() + PARTNER_SECONDS)
        elif time.monotonic() > give_up:
            for left in set(pids) - codes.keys():
                os.kill(left, signal.SIGKILL)
            give_up = math.inf
        else:
            time.sleep(0.002)
    if -signal.SIGKILL in codes.values():
        return False
    if any(codes.values()):
        sys.exit("a run failed")
    return True


def harvest_of(folder: Path) -> dict[str, Any]:
    """All that a harvest writes except timings: every shard, and the manifest."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.*"))
        if path.suffix != ".json"
    }
    manifest = read_json(folder / "manifest.json")
    for name in ("seconds", "peak_memory_bytes"):
        manifest.pop(name)
    return {**found, **{f"manifest.{name}": value for name, value in manifest.items()}}


def saved_tokens(folder: Path) -> int:
    """Tokens in the shards of all processes."""
    parts = folder.glob("manifest-part-*.json")
    return sum(int(read_json(part)["tokens"]) for part in parts)


def saved_step(folder: Path) -> int:
    return int(load_state(folder)[1]["step"]) if has_state(folder) else 0


def result_of(folder: Path) -> dict[str, Any]:
    """All that a run writes except timings: weights, logs, records, and the last state."""
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
    parser.add_argument("mode", choices=["shards", "live", "gloo"])
    parser.add_argument("source")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the usual length of a run")
    args = parser.parse_args()
    config: TrainConfig | HarvestConfig = {"shards": SHARDS, "live": LIVE, "gloo": HARVEST}[
        args.mode
    ]
    config = replace(config, tokens=round(config.tokens * args.share / 32) * 32)
    source: dict[str, Any] = {"activations": args.source}
    if args.mode != "shards":
        source = {"model": load_model(args.source, device="cpu")}

    def run(folder: Path) -> list[int]:
        if isinstance(config, HarvestConfig):
            lm = source["model"]
            return fork_two(lambda: harvest(lm, folder, config, device="cpu", resume=True))
        return [fork(lambda: train(folder, config, device="cpu", resume=True, **source))]

    results, saved = result_of, saved_step
    if args.mode == "gloo":
        results, saved = harvest_of, saved_tokens
    whole = args.folder / "whole"
    started = time.monotonic()
    assert finished(run(whole))
    seconds = time.monotonic() - started
    expected = results(whole)
    steps = config.tokens
    if isinstance(config, TrainConfig):
        steps = config.tokens // config.batch_tokens
        every = max(1, steps // 100)
        logs = [rows for name, rows in expected.items() if "metrics" in name]
        lines = [[row["step"] for row in rows] for rows in logs]
        assert all(line == list(range(every, steps + 1, every)) for line in lines), lines
    rng = random.Random(args.seed)
    kills, runs, at_steps = 0, 0, []
    while kills < args.kills:
        runs += 1
        out = args.folder / f"killed-{runs}"
        killed_here = 0
        while True:
            pids = run(out)
            # The last start of the last run is not killed.
            if kills < args.kills:
                time.sleep(rng.uniform(0, 0.5 * seconds))
                for pid in rng.choice([pids, *([pid] for pid in pids)]):
                    os.kill(pid, signal.SIGKILL)
            if finished(pids):
                break
            kills += 1
            killed_here += 1
            at_steps.append(saved(out))
        found = results(out)
        differing = [key for key in expected if found.get(key) != expected[key]]
        if differing or found.keys() != expected.keys():
            sys.exit(f"seed {args.seed}: after {killed_here} kills these differ: {differing}")
    report = {
        "mode": args.mode,
        "seed": args.seed,
        "kills": kills,
        "runs": runs,
        "steps": steps,
        "saved_at_kills": at_steps,
        "things_compared": len(expected),
        "seconds_uninterrupted": round(seconds, 2),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
