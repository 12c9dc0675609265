"""What `--compile` changes: speed, and the distance of activations from float32.

    python benchmarks/compiled.py                # SmolLM2-135M at a quarter, half and full depth
    python benchmarks/compiled.py --layer 14

Eager and compiled passes of one bfloat16 model alternate on the same token ids. The distance is
that of a row of activations from the float32 model's row on the same ids, relative to its length;
the table shows the median over all rows. `seconds` is how much longer the first compiled pass took.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from side_by_side import add_flags, add_passes, begin, deliver, depths, facts, say

from saesteer.sae.config import TextConfig
from saesteer.sae.model.compiled_blocks import CompiledBlocks
from saesteer.sae.model.hooks import HookPoint, resolve_site, run_to
from saesteer.sae.model.language_model import LanguageModel, load_model
from saesteer.sae.runs.memory_use import keep_pages
from saesteer.sae.text.contexts import open_contexts

Pass = Callable[[], torch.Tensor]


def rows_of(lm: LanguageModel, point: HookPoint, ids: torch.Tensor, context: Any) -> Pass:
    """A pass up to `point` inside `context`; returns the activations there."""

    def run() -> torch.Tensor:
        with torch.inference_mode(), context:
            rows = run_to(lm, [point], input_ids=ids.to(lm.device))[point.key]
        if rows.is_cuda:
            torch.cuda.synchronize()
        return rows

    return run


def seconds(run: Pass) -> float:
    """Wall time of one pass."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def distance(rows: torch.Tensor, exact: torch.Tensor) -> float:
    """Median over rows of the relative distance `|rows - exact| / |exact|`."""
    return float(((rows.float() - exact).norm(dim=-1) / exact.norm(dim=-1)).median())


def measure(lm: LanguageModel, exact: LanguageModel, layer: int, args: Any) -> dict[str, Any]:
    """Eager and compiled passes up to one block: a row of the table."""
    text = TextConfig(context=args.context, batch_size=args.batch_size)
    batch = open_contexts(lm, text).next_batch(args.batch_size)
    assert batch is not None
    point, ids = resolve_site(lm, layer), batch.token_ids
    eager = rows_of(lm, point, ids, contextlib.nullcontext())
    compiled = rows_of(lm, point, ids, CompiledBlocks(lm, [point]))
    torch.compiler.reset()
    first = seconds(compiled)
    for _ in range(args.warmup):
        eager(), compiled()
    times = [(seconds(eager), seconds(compiled)) for _ in range(args.rounds)]
    slow, fast = (statistics.median(column) for column in zip(*times, strict=True))
    reference = rows_of(exact, resolve_site(exact, layer), ids, contextlib.nullcontext())()
    return {
        "layer": layer,
        "eager_tokens_per_second": ids.numel() / slow,
        "compiled_tokens_per_second": ids.numel() / fast,
        "ratio": slow / fast,
        "slowest_ratio": min(a / b for a, b in times),
        "fastest_ratio": max(a / b for a, b in times),
        "seconds_to_compile": first - fast,
        "eager_distance": distance(eager(), reference),
        "compiled_distance": distance(compiled(), reference),
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "block": lambda row: str(row["layer"]),
    "eager tokens/s": lambda row: f"{row['eager_tokens_per_second']:,.0f}",
    "compiled": lambda row: f"{row['compiled_tokens_per_second']:,.0f}",
    "ratio": lambda row: f"{row['ratio']:.2f}",
    "of single rounds": lambda row: f"{row['slowest_ratio']:.2f} to {row['fastest_ratio']:.2f}",
    "seconds": lambda row: f"{row['seconds_to_compile']:.1f}",
    "eager from float32": lambda row: f"{row['eager_distance']:.2%}",
    "compiled from float32": lambda row: f"{row['compiled_distance']:.2%}",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    add_passes(parser)
    add_flags(parser, name="compiled", rounds=7)
    args = parser.parse_args(argv)
    device = begin(args)
    if device.type == "cpu":
        keep_pages()
    lm = load_model(args.model, device=device.type, dtype="bfloat16")
    exact = load_model(args.model, device=device.type, dtype="float32")
    n = lm.n_layers
    rows = []
    for layer in depths(args.layer, n):
        say(f"block {layer} of {n}")
        rows.append(measure(lm, exact, layer, args))
    shape = {"d_model": lm.d_model, "batch": args.batch_size, "context": args.context}
    conditions = {
        "model": lm.name,
        "dtype": "bfloat16",
        **facts(device, shape),
        "rounds": args.rounds,
    }
    deliver(args, device, conditions, rows, COLUMNS)


if __name__ == "__main__":
    main()
