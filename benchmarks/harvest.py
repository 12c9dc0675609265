"""Tokens per second out of a language model: saesteer, the bare forward pass, and other toolkits.

    python benchmarks/harvest.py                   # SmolLM2-135M at a quarter, half and full depth
    python benchmarks/harvest.py --layer 14 --rounds 7

    python benchmarks/harvest.py --layer 14 --csv benchmarks/results
    python benchmarks/harvest.py --model random:1b --device cuda --batch-size 16 --context 512

Everything runs in one process on one loaded model, taking turns round by round, so that a machine
whose speed drifts slows all of them; what to quote is the ratio of medians. Where other programs
use the CPU as well, the ratio by CPU time (of all threads of this process) says more than the
clock. "bare" is the same model cut after the block that is read, on batches of token ids that were
prepared before, without a hook. Every other contender also reads and tokenises its text and hands
out what its users get:

    harvest to shards   kept rows written to disk, hashes included: two shards a round, as large as
                        `harvest` makes them; waiting for the second to be written is included
    live batches        training batches out of the shuffle buffer
    live train          the same, and a TopK SAE of 8 x d_model trained on them
    ..., compiled       harvest and train with --compile
    SAELens HF          ActivationsStore.next_batch, model by AutoModelForCausalLM
    SAELens             the same, model converted for its default backend (TransformerLens)
    sparsify            its Trainer's pass: the whole base model, a hook that flattens
    dictionary_learning ActivationBuffer, out_batch_size as here

All of them profit from `sae.runs.memory_use.keep_pages`, which the first stream calls.
Toolkits that are not installed, or that do not run with the installed transformers, are listed as
such. Absolute figures mean nothing on another machine.
"""

import argparse
import contextlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harvest_rivals import (
    BATCH_TOKENS,
    BATCHES_A_ROUND,
    PASSES_A_ROUND,
    Round,
    dictionary_learning,
    sae_lens_default,
    sae_lens_hf,
    sparsify,
)
from our_trainer import make_trainer
from random_model import load
from side_by_side import (
    add_flags,
    add_passes,
    begin,
    deliver,
    depths,
    facts,
    measured,
    quiet,
    say,
    synchronise,
)

from saesteer.checkpoints.background import BackgroundWriter
from saesteer.checkpoints.shard_writer import ShardWriter
from saesteer.sae.activations.batches import BatchStream, LiveSource
from saesteer.sae.activations.prefetch import Prefetch
from saesteer.sae.activations.reader import ActivationStream, open_activations
from saesteer.sae.config import HarvestConfig, TextConfig, TrainConfig
from saesteer.sae.model.hooks import resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.training.input_scale import InputScale

SHARD_TOKENS = HarvestConfig(layers=(0,)).shard_tokens
SHARDS_A_ROUND = 2


class Bench:
    """What all contenders share."""

    def __init__(self, lm: LanguageModel, layer: int, batch_size: int, context: int) -> None:
        self.lm = lm
        self.point = resolve_site(lm, layer)
        self.layer = self.point.layer
        self.text = TextConfig(batch_size=batch_size, context=context, epochs=1000)
        self.folder = Path(tempfile.mkdtemp(prefix="harvest-benchmark-"))
        self.cleanup = contextlib.ExitStack()
        self.documents = [str(d) for d in open_corpus_texts()]

    def stream(self, compiled: bool = False) -> ActivationStream:
        """A new stream of activations at the bench's hook point."""
        text = replace(self.text, compile=compiled)
        return open_activations(self.lm, [self.point], text, replies_folder=self.folder)

    def batches(self, compiled: bool = False) -> BatchStream:
        """A new stream of shuffled training batches."""
        source = LiveSource(self.stream(compiled))
        return BatchStream(
            source,
            self.lm.d_model,
            tokens=10**9,
            batch_tokens=BATCH_TOKENS,
            buffer_tokens=4 * BATCH_TOKENS,
            dtype=self.lm.dtype,
            seed=0,
        )


def open_corpus_texts() -> list[str]:
    """The documents that rivals read: those of `python-docs`."""
    from saesteer.sae.text.corpora import PythonDocs

    return PythonDocs().topics


def bare(bench: Bench) -> Round:
    """The model cut after the block, on prepared token ids and without a hook."""
    contexts = bench.stream().contexts
    model, whole = bench.lm.text_model, bench.lm.blocks
    name = bench.lm.blocks_path.rpartition(".")[2]

    def run() -> int:
        tokens = 0
        setattr(model, name, whole[: bench.layer + 1])
        try:
            with torch.inference_mode():
                for _ in range(PASSES_A_ROUND):
                    batch = prepared[len(seen) % len(prepared)].to(bench.lm.device)
                    seen.append(0)
                    model(input_ids=batch, use_cache=False)
                    tokens += batch.numel()
        finally:
            setattr(model, name, whole)
        return tokens

    prepared = [contexts.next_batch(bench.text.batch_size).token_ids for _ in range(4)]  # type: ignore[union-attr]
    seen: list[int] = []
    return run


def to_shards(bench: Bench, compiled: bool = False) -> Round:
    """Activations written to shards, as `harvest` does."""
    stream = bench.stream(compiled)
    writer = ShardWriter(
        bench.folder / f"shards-{compiled}",
        layers=[bench.layer],
        sites=["resid_post"],
        d_model=bench.lm.d_model,
        dtype=bench.lm.dtype,
        facts={"model": bench.lm.name},
        shard_tokens=SHARD_TOKENS,
    )
    background = BackgroundWriter(writer, SHARD_TOKENS)

    def run() -> int:
        tokens = 0
        while tokens < SHARDS_A_ROUND * SHARD_TOKENS:
            batch = stream.next_batch()
            assert batch is not None
            background.add(batch.activations, batch.token_ids, stream.state_dict())
            tokens += len(batch.token_ids)
        background.checkpoint()  # wait, so that none of its work falls into the others' turns
        return tokens

    return run


def live_batches(bench: Bench) -> Round:
    """Shuffled training batches, not trained on."""
    batches = bench.batches()
    batches.fill()

    def run() -> int:
        for _ in range(BATCHES_A_ROUND):
            batches.next_batch()
        return BATCHES_A_ROUND * BATCH_TOKENS

    return run


def live_train(bench: Bench, compiled: bool = False) -> Round:
    """Shuffled training batches, made in a thread, with a TopK SAE trained on them."""
    batches, d_model = bench.batches(compiled), bench.lm.d_model
    config = TrainConfig(d_sae=(8 * d_model,), k=(32,), tokens=10**9)
    _, step = make_trainer(config, InputScale.of(batches.fill()), bench.lm.device)
    prefetch = Prefetch(batches, bench.lm.device)
    prefetch.__enter__()
    held = contextlib.ExitStack()
    held.enter_context(prefetch.paused())  # paused while the others have their turn

    bench.cleanup.callback(prefetch.__exit__, None, None, None)
    bench.cleanup.callback(held.close)

    def run() -> int:
        before = prefetch.ahead
        held.close()
        for _ in range(BATCHES_A_ROUND):
            batch = prefetch.next_batch()
            assert batch is not None
            step(batch)
        held.enter_context(prefetch.paused())
        # All batches that were made count, taken or not: their passes were timed here.
        return (BATCHES_A_ROUND + prefetch.ahead - before) * BATCH_TOKENS

    return run


CONTENDERS: dict[str, Callable[[Bench], Round]] = {
    "bare": bare,
    "harvest to shards": to_shards,
    "live batches": live_batches,
    "live train": live_train,
    "harvest to shards, compiled": partial(to_shards, compiled=True),
    "live train, compiled": partial(live_train, compiled=True),
    "SAELens HF": sae_lens_hf,
    "SAELens": sae_lens_default,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
}


def measure(bench: Bench, names: list[str], rounds: int, warmup: int) -> list[dict[str, Any]]:
    """Time all contenders in turns at one block: a row for each."""
    runs: dict[str, Round] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            with quiet():
                runs[name] = CONTENDERS[name](bench)
                for _ in range(warmup):
                    runs[name]()
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            runs.pop(name, None)
            if name == "bare":
                raise
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    work: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            synchronise(bench.lm.device)
            started, worked = time.perf_counter(), time.process_time()
            with quiet():
                tokens = run()
            synchronise(bench.lm.device)
            speeds[name].append(tokens / (time.perf_counter() - started))
            work[name].append((time.process_time() - worked) / tokens)
    usual = statistics.median(speeds["bare"])
    worked_bare = statistics.median(work["bare"])
    rows: list[dict[str, Any]] = [
        {
            "layer": bench.layer,
            "contender": name,
            "status": "ok",
            "tokens_per_second": statistics.median(found),
            "share_of_bare": statistics.median(found) / usual,
            "share_of_bare_by_cpu_time": worked_bare / statistics.median(work[name]),
            "fastest_over_slowest": max(found) / min(found),
            "slowest": min(found),
            "fastest": max(found),
        }
        for name, found in speeds.items()
    ]
    missing = [
        {"layer": bench.layer, "contender": name, "status": reason}
        for name, reason in absent.items()
    ]
    return rows + missing


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "contender": lambda row: row["contender"],
    "block": lambda row: str(row["layer"]),
    "tokens/s": lambda row: (
        f"{row['tokens_per_second']:,.0f}" if row["status"] == "ok" else row["status"]
    ),
    "slowest to fastest round": measured(
        lambda row: f"{row['slowest']:,.0f} to {row['fastest']:,.0f}"
    ),
    "of bare": measured(lambda row: f"{row['share_of_bare']:.0%}"),
    "by CPU time": measured(lambda row: f"{row['share_of_bare_by_cpu_time']:.0%}"),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    add_passes(parser)
    parser.add_argument("--only", help="names with semicolons between them; bare always runs")
    add_flags(parser, name="harvest", rounds=5)
    args = parser.parse_args(argv)
    device = begin(args)
    lm = load(args.model, device)
    n = lm.n_layers
    chosen = args.only.split(";") if args.only else list(CONTENDERS)
    names = ["bare", *(name for name in chosen if name != "bare")]
    rows = []
    for layer in depths(args.layer, n):
        say(f"block {layer} of {n}: timing {args.rounds} rounds")
        bench = Bench(lm, layer, args.batch_size, args.context)
        with bench.cleanup:
            rows += measure(bench, names, args.rounds, args.warmup)
        shutil.rmtree(bench.folder)
    shape = {"blocks": n, "d_model": lm.d_model, "batch": args.batch_size, "context": args.context}
    conditions = {
        "model": lm.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        **facts(device, shape),
        "rounds": args.rounds,
    }
    deliver(args, device, conditions, rows, COLUMNS)


if __name__ == "__main__":
    main()
