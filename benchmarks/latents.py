"""What reading latents costs on top of the forward pass of the same tokens.

    python benchmarks/latents.py                    # 5,120 latents, 8,192 tokens, block 20
    python benchmarks/latents.py --tokens 100000    # what the claim is about; minutes

Measured, in this order: the text through the model up to the SAE's block and nothing else; the pass
of `saesteer latents --all`; what follows it (logit lens, neighbours, telling tokens); the pages,
`latents.jsonl` and the export. The SAE is random (top-k, 32 of its latents a token), which is the
worst case for the pages: every latent fires and has all of its contexts. Steering and descriptions
by a model are left out.

Seconds are those of the processor, over all threads, which other programs disturb less than the
time that passes; both are in the table. The last column is the share of the bare pass. Comparing
and writing hardly depend on the number of tokens: the last line is the total for --claim tokens,
with the pass scaled and the rest as measured.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from side_by_side import add_output, deliver, facts, say

from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.activations.reader import ActivationStream
from saesteer.sae.config import TextConfig
from saesteer.sae.model.hooks import resolve_site
from saesteer.sae.model.language_model import LanguageModel, load_model
from saesteer.sae.reading.config import LatentsConfig
from saesteer.sae.reading.site import save_latents
from saesteer.sae.text.contexts import open_contexts
from saesteer.sae.verbs.latents import latents


def random_sae(lm: LanguageModel, layer: int, d_sae: int, k: int) -> SAE:
    """Random unit rows, read and written by the same direction."""
    rows = torch.randn(d_sae, lm.d_model, generator=torch.Generator().manual_seed(0))
    rows /= rows.norm(dim=1, keepdim=True)
    spec = SAESpec(
        architecture="topk",
        k=k,
        d_model=lm.d_model,
        d_sae=d_sae,
        hook_name=f"blocks.{layer}.hook_resid_post",
        model_name=lm.name,
        metadata={"saesteer": {"model": {"hash": lm.fingerprint}}},
    )
    zero = torch.zeros(d_sae)
    return SAE(spec, rows.T.contiguous(), zero, rows, torch.zeros(lm.d_model), source="random")


class Stages:
    """Seconds of the stages, by name."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self._open: tuple[str, float, float] | None = None

    def begin(self, name: str) -> None:
        self.end()
        say(name)
        self._open = name, time.process_time(), time.perf_counter()

    def end(self) -> None:
        if self._open is not None:
            name, cpu, wall = self._open
            self.rows[name] = {
                "stage": name,
                "cpu_seconds": time.process_time() - cpu,
                "seconds": time.perf_counter() - wall,
            }
            self._open = None

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        self.begin(name)
        yield
        self.end()


BARE, PASS, COMPARE, WRITE = "bare forward pass", "pass of latents", "compare", "write pages"


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], torch.device]:
    lm = load_model(args.model, device=args.device, dtype="float32")
    text = TextConfig(context=args.context, batch_size=args.batch_size)
    config = LatentsConfig(tokens=args.tokens, every=True, steer=0, text=text)
    sae, stages = random_sae(lm, args.layer, args.d_sae, args.k).to(lm.device), Stages()

    def bare(tokens: int) -> int:
        point = resolve_site(lm, args.layer)
        stream = ActivationStream(lm, [point], open_contexts(lm, text), text)
        rows = 0
        while rows < tokens and (read := stream.next_batch()) is not None:
            rows += len(read.token_ids)
        return rows

    bare(1)  # threads, caches
    with stages.timed(BARE):
        rows = bare(args.tokens)

    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage == "latents: compare" and not done:
            stages.begin(COMPARE)

    stages.begin(PASS)
    found = latents(sae, lm, config, progress=progress)
    stages.end()
    assert found.collected.tally.rows == rows
    with tempfile.TemporaryDirectory() as folder, stages.timed(WRITE):
        save_latents(found, Path(folder))
    whole = stages.rows[BARE]["cpu_seconds"]
    added = stages.rows[PASS]["cpu_seconds"] - whole
    rest = sum(stages.rows[name]["cpu_seconds"] for name in (COMPARE, WRITE))
    scale = args.claim / rows
    claim = (whole + added) * scale + rest
    result = [
        {**row, "tokens": rows, "latents": args.d_sae, "of_pass": row["cpu_seconds"] / whole}
        for row in stages.rows.values()
    ]
    result.append(
        {
            "stage": f"all, for {args.claim:,} tokens",
            "tokens": args.claim,
            "latents": args.d_sae,
            "cpu_seconds": claim,
            "seconds": None,
            "of_pass": claim / (whole * scale),
        }
    )
    return result, lm.device


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "stage": lambda row: row["stage"],
    "latents": lambda row: f"{row['latents']:,}",
    "tokens": lambda row: f"{row['tokens']:,}",
    "CPU seconds": lambda row: f"{row['cpu_seconds']:.1f}",
    "seconds": lambda row: "" if row["seconds"] is None else f"{row['seconds']:.1f}",
    "of the bare pass": lambda row: f"{row['of_pass']:.2f}",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--layer", type=int, default=20)
    parser.add_argument("--d-sae", type=int, default=5120)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--claim", type=int, default=100_000)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="auto")
    add_output(parser, "latents")
    args = parser.parse_args(argv)
    rows, device = measure(args)
    conditions = {"model": args.model, **facts(device, {"d_sae": args.d_sae, "k": args.k})}
    deliver(args, device, conditions, rows, COLUMNS)


if __name__ == "__main__":
    main()
