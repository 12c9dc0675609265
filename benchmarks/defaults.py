"""Which learning rate, warm-up, decay and length of x~ train best: held-out FVU over a grid.

    saesteer harvest --layer 14,20 --data TRAIN --tokens 500k -o runs/train
    saesteer harvest --layer 14,20 --data OTHER --tokens 40k --keep-positions -o runs/held-out
    python benchmarks/defaults.py --activations runs/train --held-out runs/held-out --layer 20 \\
        --lr 1.5e-3,3e-3,6e-3 --length 1,0.04 --steps 256,1024 --csv benchmarks/results/defaults.csv

Every combination of the comma-separated settings is one run; those that the CSV holds already are
not run again. `--length` is E|x~| in units of sqrt(d_model): training at a length s is training at
length 1 with the biases' learning rate multiplied by 1/s, because Adam takes no notice of the scale
of a gradient. FVU is that of the loss (see `held_out_fvu`).
"""

import argparse
import csv
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from our_trainer import held_out_fvu, make_trainer
from rows import Rows, load_rows
from side_by_side import leave_folder, say

from saesteer.sae.config import TrainConfig
from saesteer.sae.training.input_scale import InputScale

leave_folder()
_SCALE_ROWS = 32_768


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


AXES: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "arch": (str, "topk", "kinds of SAE"),
    "d_sae": (int, "4608", "latents"),
    "k": (int, "32", "latents per token"),
    "steps": (int, "256", "optimiser steps"),
    "batch": (int, "2048", "activations per step"),
    "lr": (float, "0", "peak learning rates; 0: the default"),
    "length": (float, "1", "E|x~| over sqrt(d_model)"),
    "warmup": (float, "0.05", "share of the run that warms up"),
    "decay": (float, "0.2", "share of the run that decays"),
    "auxk": (float, "0.03125", "weight of AuxK"),
    "seed": (int, "0", "seeds of initialisation and order"),
}
FOUND = ["fvu", "fvu_train", "dead", "seconds"]


def run(train: Rows, held_out: Rows, settings: dict[str, Any]) -> dict[str, float]:
    """Train one SAE; its FVU on held-out rows and on the last rows of training, and more."""
    steps, batch = settings["steps"], settings["batch"]
    config = TrainConfig(
        arch=settings["arch"],
        d_sae=(settings["d_sae"],),
        k=(settings["k"],),
        tokens=steps * batch,
        batch_tokens=batch,
        buffer_tokens=batch,
        lr=settings["lr"] or None,
        warmup_steps=max(1, round(settings["warmup"] * steps)),
        decay_share=settings["decay"],
        auxk=settings["auxk"],
        init_seed=(settings["seed"],),
    )
    measured = InputScale.of(train.values[:_SCALE_ROWS])
    scale = InputScale(measured.mean, measured.factor * settings["length"])
    trainer, step = make_trainer(config, scale, torch.device("cpu"))
    started = time.perf_counter()
    for rows in train.batches(steps, batch, settings["seed"]):
        step(rows)
    seconds = time.perf_counter() - started
    dead = float(trainer.silence.dead.float().mean())
    fvu = held_out_fvu(trainer, held_out.values, batch)
    seen = held_out_fvu(trainer, train.values[: len(held_out)], batch)
    return {"fvu": fvu, "fvu_train": seen, "dead": dead, "seconds": seconds}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--activations", type=Path, required=True, help="shards to train on")
    parser.add_argument("--held-out", type=Path, required=True, help="shards to measure on")
    parser.add_argument("--layer", type=int, help="of the shards; not needed where there is one")
    parser.add_argument("--name", default="", help="of the data in the table")
    parser.add_argument("--held-out-rows", type=int, default=16_384)
    parser.add_argument("--csv", type=Path, required=True, help="table to write, or to go on with")
    for name, (kind, usual, meaning) in AXES.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=_numbers(kind), default=usual, help=f"{meaning} ({usual})")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    train = load_rows(args.activations, args.layer)
    held_out = load_rows(args.held_out, args.layer, args.held_out_rows)
    data = args.name or f"{args.activations.name} layer {args.layer}"
    columns = ["data", *AXES, *FOUND]
    known = set()
    if args.csv.exists():
        with args.csv.open(newline="") as file:
            known = {tuple(row[name] for name in ("data", *AXES)) for row in csv.DictReader(file)}
    else:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        args.csv.write_text(",".join(columns) + "\n")
    for values in itertools.product(*(getattr(args, name) for name in AXES)):
        settings = dict(zip(AXES, values, strict=True))
        key = (data, *(str(value) for value in values))
        if key in known:
            continue
        found = run(train, held_out, settings)
        shown = [f"{value:.5g}" for value in found.values()]
        say(f"{data} {settings}: FVU {found['fvu']:.4f}, {found['seconds']:.0f} s")
        # Appended at once: what was stopped goes on.
        with args.csv.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([*key, *shown])


if __name__ == "__main__":
    main()
