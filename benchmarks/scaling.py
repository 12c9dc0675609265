"""One training step by several processes: time, bytes sent, and both beside the formula.

    python benchmarks/scaling.py                 # 1 and 2 processes of one thread each
    python benchmarks/scaling.py --csv FOLDER    # also writes scaling-cpu.csv and scaling-cpu.md

Strong: the batch of all stays as it is. Weak: each process keeps its rows. Processes are started by
torchrun and exchange over gloo; bytes are what the kernel's TCP counters say of their sockets.
"""

import argparse
import csv
import json
import os
import platform
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from saesteer.checkpoints.files import writing
from saesteer.sae.config import TrainConfig
from saesteer.sae.runs.mesh_cost import mesh_cost
from saesteer.sae.runs.processes import join_processes, started_processes
from saesteer.sae.training.architectures import architecture_named
from saesteer.sae.training.input_scale import InputScale, PlacedRows
from saesteer.sae.training.sae_trainer import SAETrainer, Variant

PLACE = (0, "resid_post")
WARM_UP = 3
# From <linux/tcp.h>: tcpi_bytes_sent, without headers.
_TCP_BYTES_SENT = 200


def sent_by_sockets() -> int:
    """Bytes that this process has sent over TCP so far."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            one = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        with one:
            try:
                if one.family in (socket.AF_INET, socket.AF_INET6):
                    facts = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", facts, _TCP_BYTES_SENT)[0]
            except (OSError, struct.error):
                continue
    return total


def worker(args: argparse.Namespace) -> None:
    """One process: steps on made-up rows; the first writes what it has measured."""
    torch.set_num_threads(1)
    world = started_processes()
    mesh = None
    if world > 1:
        from saesteer.sae.training.mesh.mesh import Mesh

        processes = join_processes(300)
        mesh = Mesh(processes, args.latent_shards, torch.device("cpu"))
    config = TrainConfig(
        arch=args.arch,
        k=(args.k,),
        tokens=1000 * args.batch,
        batch_tokens=args.batch,
        dtype="float32",
        latent_shards=args.latent_shards,
    )
    architecture = architecture_named(args.arch).from_config(config)[0].at_width(args.d_sae)
    rng = torch.Generator().manual_seed(0)
    batch = torch.randn(args.batch, args.d_model, generator=rng)
    scales = {PLACE: InputScale.of(batch)}
    variant = Variant((PLACE,), (PLACE,), args.d_sae, architecture, 0)
    trainer = SAETrainer(variant, config, scales, torch.device("cpu"), mesh)
    columns = PlacedRows.columns_of([PLACE], args.d_model)
    parts, part = (1, 0) if mesh is None else (mesh.row_parts, mesh.row_part)
    own = PlacedRows(batch.tensor_split(parts)[part], columns)
    seconds, cpu_seconds = [], []
    sent = counted = 0
    for step in range(WARM_UP + args.steps):
        if step == WARM_UP:
            sent, counted = sent_by_sockets(), 0 if mesh is None else mesh.sent_bytes
        start, cpu = time.perf_counter(), time.process_time()
        trainer.step(trainer.forward(own))
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu)
    sent = sent_by_sockets() - sent
    counted = 0 if mesh is None else mesh.sent_bytes - counted
    cost = mesh_cost(
        architecture,
        args.d_model,
        args.d_model,
        args.d_sae,
        config,
        world=world,
        product_bytes=4,
        row_bytes=4 * args.d_model,
    )
    if mesh is None or mesh.first:
        Path(args.worker).write_text(
            json.dumps(
                {
                    "seconds": statistics.median(seconds[WARM_UP:]),
                    "cpu_seconds": statistics.median(cpu_seconds[WARM_UP:]),
                    "sent": sent / args.steps,
                    "counted": counted / args.steps,
                    "formula": cost.sent_step,
                }
            )
        )


def measure(world: int, shards: int, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """What the first of some processes has measured."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        words = [__file__, "--worker", str(result), "--batch", str(batch)]
        words += ["--latent-shards", str(shards), "--steps", str(args.steps)]
        for name in ("arch", "k", "d_model", "d_sae"):
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(world)]
        command = [sys.executable, "-P", *(launcher if world > 1 else []), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, capture_output=True)
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default="topk")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=2048, help="rows of one process alone")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--latent-shards", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    rows = []
    alone: dict[str, Any] = {}
    for name, world, shards, batch in (
        ("one process", 1, 1, args.batch),
        ("strong, rows shared", 2, 1, args.batch),
        ("weak, rows shared", 2, 1, 2 * args.batch),
        ("latents shared", 2, 2, args.batch),
    ):
        found = measure(world, shards, batch, args)
        alone = alone or found
        speed = batch / args.batch * alone["seconds"] / found["seconds"]
        rows.append(
            {
                "what": name,
                "processes": world,
                "latent_shards": shards,
                "batch_tokens": batch,
                "seconds": round(found["seconds"], 4),
                "cpu_seconds_of_one": round(found["cpu_seconds"], 4),
                "tokens_per_second_ratio": round(speed, 2),
                "sent_bytes": round(found["sent"]),
                "formula_bytes": found["formula"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    if args.csv:
        write(rows, args)


def write(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    with writing(args.csv / "scaling-cpu.csv"), open(args.csv / "scaling-cpu.csv", "w") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    lines = [
        f"`python benchmarks/scaling.py --csv benchmarks/results`: {args.arch}, d_model "
        f"{args.d_model}, d_sae {args.d_sae}, k {args.k}, float32, one thread a process; medians "
        f"of {args.steps} steps; {os.cpu_count()} cores ({platform.machine()}), load "
        f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}.",
        "",
        "| | processes | batch | a step | CPU of one | tokens/s, of one process | sent a step | "
        "by the formula |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['what']} | {row['processes']} | {row['batch_tokens']:,} | "
            f"{row['seconds']:.3f} s | {row['cpu_seconds_of_one']:.3f} s | "
            f"{row['tokens_per_second_ratio']:.2f} | {row['sent_bytes']:,} | "
            f"{row['formula_bytes']:,} |"
        )
    (args.csv / "scaling-cpu.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
