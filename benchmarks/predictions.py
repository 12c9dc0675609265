"""Compares what `harvest --dry-run` predicts with what the harvest then takes.

    python benchmarks/predictions.py                         # SmolLM2-135M, eight harvests
    python benchmarks/predictions.py --job 14:256:16:200000  # blocks, context, batch, tokens

Predicts and then harvests, one job after the other, in one process. Loading the model is in neither
time, and both run in a process that is warmed up. Disk and peak memory are compared as well; the
peak of a process never falls, so with several jobs it says nothing about the smaller ones.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from side_by_side import add_flags, begin, deliver, facts, say

from saesteer.sae.config import HarvestConfig, TextConfig
from saesteer.sae.model.language_model import LanguageModel, load_model
from saesteer.sae.runs.harvest_prediction import predict_harvest
from saesteer.sae.verbs.harvest import harvest

JOBS = (
    "6:256:16:350000",
    "14:256:16:180000",
    "29:256:16:100000",
    "14:64:64:180000",
    "14:1024:4:160000",
    "6:512:2:250000",
    "2:256:16:600000",
    "6,14:256:16:180000",
)


def job_of(text: str) -> HarvestConfig:
    """A job's settings from LAYERS:CONTEXT:BATCH:TOKENS."""
    layers, context, batch_size, tokens = text.split(":")
    reading = TextConfig(context=int(context), batch_size=int(batch_size), epochs=1000)
    blocks = tuple(int(layer) for layer in layers.split(","))
    return HarvestConfig(layers=blocks, tokens=int(tokens), text=reading)


def pair(lm: LanguageModel, config: HarvestConfig, folder: Path) -> dict[str, Any]:
    """Predict one harvest and run it: a row of the table."""
    predicted = predict_harvest(lm, config)
    started = time.perf_counter()
    manifest = harvest(lm, folder, config)
    whole = time.perf_counter() - started
    filled = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    shutil.rmtree(folder)
    return {
        "layers": ",".join(map(str, config.layers)),
        "context": config.text.context,
        "batch_size": config.text.batch_size,
        "tokens": config.tokens,
        "predicted_tokens_per_second": predicted["tokens_per_second"],
        "tokens_per_second": config.tokens / whole,
        "predicted_seconds": predicted["seconds"],
        "seconds": whole,
        "off": predicted["seconds"] / whole - 1,
        "predicted_bytes": predicted["bytes"],
        "bytes": filled,
        "predicted_memory_bytes": predicted["memory_bytes"],
        "memory_bytes": manifest["peak_memory_bytes"],
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "blocks": lambda row: row["layers"],
    "context": lambda row: str(row["context"]),
    "batch size": lambda row: str(row["batch_size"]),
    "tokens": lambda row: f"{row['tokens']:,}",
    "tokens/s predicted": lambda row: f"{row['predicted_tokens_per_second']:,.0f}",
    "measured": lambda row: f"{row['tokens_per_second']:,.0f}",
    "seconds predicted": lambda row: f"{row['predicted_seconds']:.1f}",
    "took": lambda row: f"{row['seconds']:.1f}",
    "off": lambda row: f"{row['off']:+.0%}",
    "MB of disk predicted": lambda row: f"{row['predicted_bytes'] / 1e6:.2f}",
    "filled": lambda row: f"{row['bytes'] / 1e6:.2f}",
    "MB of memory predicted": lambda row: f"{row['predicted_memory_bytes'] / 1e6:,.0f}",
    "peak": lambda row: f"{row['memory_bytes'] / 1e6:,.0f}",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument(
        "--job", action="append", metavar="LAYERS:CONTEXT:BATCH:TOKENS", help="repeatable"
    )
    add_flags(parser, name="predictions", rounds=1)
    args = parser.parse_args(argv)
    device = begin(args)
    lm = load_model(args.model, device=device.type)
    folder = Path(tempfile.mkdtemp(prefix="predictions-"))
    rows = []
    for number, text in enumerate(args.job or JOBS):
        say(f"job {text}")
        rows.append(pair(lm, job_of(text), folder / str(number)))
    shutil.rmtree(folder)
    conditions = {"model": lm.name, **facts(device, {"d_model": lm.d_model})}
    deliver(args, device, conditions, rows, COLUMNS)


if __name__ == "__main__":
    main()
