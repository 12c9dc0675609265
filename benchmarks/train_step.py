"""One TopK optimiser step: saesteer and its rivals, side by side in one process.

    python benchmarks/train_step.py                # d_model 576, d_sae 9216, k 32, batch 2048
    python benchmarks/train_step.py --auxk         # with the auxiliary loss and 10 % dead latents
    python benchmarks/train_step.py --d-sae 4608 --rounds 15 --json

The contenders take turns, round by round, so that a machine whose speed drifts slows all of them;
what to quote is the ratio of medians. Each rival runs as its authors ship it, and every row says
what it was given. `make peers` installs those that saesteer itself does not need; a rival that is
missing is listed as `not installed`. Absolute figures mean nothing on another machine.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from rivals import Job, dictionary_learning, keep_dead, sae_lens, sparsify
from side_by_side import (
    Contender,
    Timing,
    add_flags,
    begin,
    deliver,
    facts,
    say,
    take_turns,
)

from saesteer.kernels import topk_encode
from saesteer.kernels.ops import encode_topk
from saesteer.sae.config import TrainConfig
from saesteer.sae.training.sae_trainer import SAETrainer, Variant
from saesteer.sae.training.topk import InputScale

OURS = "saesteer step"
AUXK = 1 / 32
BATCHES = 4


def ours(job: Job) -> Contender:
    config = TrainConfig(
        d_sae=(job.d_sae,),
        k=(job.k,),
        tokens=job.steps * job.batch,
        batch_tokens=job.batch,
        auxk=AUXK if job.dead else 0.0,
        # One batch of silence is enough here: the marks below decide, and a trainer looks for dead
        # latents only once it has seen as many activations as it takes to die.
        dead_after_tokens=job.batch if job.dead else None,
    )
    scale = InputScale(torch.zeros(job.d_model, dtype=torch.float64), 1.0)
    variant = Variant((0, "resid_post"), job.d_sae, job.k, 0)
    trainer = SAETrainer(variant, config, slice(0, job.d_model), scale, job.device)

    def step(number: int) -> None:
        trainer.update(trainer.backward(job.at(number)))

    before = keep_dead(
        trainer.tokens_since_fired, job.dead, 2 * config.resolved_dead_after_tokens, step
    )
    before()
    trainer.take_log()  # on a GPU this is when room is made for the dead latents
    if int(trainer.dead.sum()) != job.dead:
        raise RuntimeError(f"{int(trainer.dead.sum())} latents count as dead, not {job.dead}")
    auxk = f"AuxK 1/32, k_aux up to 512, {job.dead:,} dead" if job.dead else "AuxK off"
    return Contender(
        step, f"saesteer {version('saesteer')}, float32, Adam, unit decoder rows, {auxk}", before
    )


def product(job: Job) -> Contender:
    W_enc = torch.randn(job.d_model, job.d_sae, device=job.device)
    out = torch.empty(job.batch, job.d_sae, device=job.device)
    return Contender(
        lambda number: torch.mm(job.at(number), W_enc, out=out),
        "torch.mm, float32, into a buffer that exists",
    )


def encode(job: Job) -> Contender:
    W_enc_rows = torch.randn(job.d_sae, job.d_model, device=job.device)
    b_enc = torch.zeros(job.d_sae, device=job.device)
    return Contender(
        lambda number: encode_topk(job.at(number), W_enc_rows, b_enc, job.k),
        f"saesteer {version('saesteer')}, float32, forward only",
    )


def contenders(device: torch.device) -> dict[str, Callable[[Job], Contender]]:
    found: dict[str, Callable[[Job], Contender]] = {
        OURS: ours,
        "SAELens SAETrainer.step": sae_lens,
        "dictionary_learning TopKTrainer.update": dictionary_learning,
        "sparsify coder step, Adam": sparsify,
        "x @ W_enc alone": product,
        "encode_topk alone": encode,
    }
    if device.type == "cuda":
        found["SAELens SAETrainer.step, autocast"] = lambda job: sae_lens(job, autocast=True)
    return found


def prepare(
    makers: dict[str, Callable[[Job], Contender]], job: Job
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that can run, after one step each, and why the others cannot."""
    ready: dict[str, Contender] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        say(f"preparing {name}")
        try:
            # Some rivals print while they are imported; stdout belongs to the result.
            with contextlib.redirect_stdout(sys.stderr):
                contender = make(job)
                contender.before()
                contender.step(0)
        except Exception as error:
            if make in (ours, product, encode):
                raise
            say(f"  {type(error).__name__}: {error}")
            absent = isinstance(error, ModuleNotFoundError)
            missing[name] = "not installed" if absent else f"failed: {type(error).__name__}"
        else:
            ready[name] = contender
    return ready, missing


def rows_of(
    makers: dict[str, Callable[[Job], Contender]],
    ready: dict[str, Contender],
    missing: dict[str, str],
    timings: dict[str, Timing],
    batch: int,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in makers:
        if name in missing:
            rows.append({"contender": name, "status": missing[name], "given": ""})
            continue
        timing = timings[name]
        ratio = timing.over(timings[OURS])
        rows.append(
            {
                "contender": name,
                "status": "ok",
                "given": ready[name].given,
                "tokens_per_second": batch / timing.median,
                **timing.columns(),
                "saesteer_times_as_fast": ratio["ratio"],
                "saesteer_times_as_fast_p20": ratio["ratio_p20"],
                "saesteer_times_as_fast_p80": ratio["ratio_p80"],
            }
        )
    return rows


def _measured(text: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    return lambda row: text(row) if row["status"] == "ok" else "-"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "contender": lambda row: row["contender"],
    "tokens/s": lambda row: (
        f"{row['tokens_per_second']:,.0f}" if row["status"] == "ok" else row["status"]
    ),
    "ms (p20 to p80)": _measured(
        lambda row: f"{row['median_ms']:.1f} ({row['p20_ms']:.1f} to {row['p80_ms']:.1f})"
    ),
    "max/min": _measured(lambda row: f"{row['slowest_over_fastest']:.2f}"),
    "saesteer is (p20 to p80)": _measured(
        lambda row: (
            f"{row['saesteer_times_as_fast']:.2f} x "
            f"({row['saesteer_times_as_fast_p20']:.2f} to {row['saesteer_times_as_fast_p80']:.2f})"
        )
    ),
    "given": lambda row: row["given"],
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=9216)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048, help="activations a step")
    parser.add_argument(
        "--plain-float32",
        action="store_true",
        help="leave the CPU's bfloat16 units alone, as on a CPU that has none",
    )
    parser.add_argument("--auxk", action="store_true", help="auxiliary loss on, for everyone")
    parser.add_argument("--dead", type=float, default=0.1, help="share of dead latents with --auxk")
    add_flags(parser, rounds=9)
    args = parser.parse_args(argv)
    if not 0 < args.dead < 1:
        parser.error(f"--dead must be between 0 and 1 exclusive, got {args.dead}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.plain_float32:
        topk_encode.fast_bfloat16 = lambda: False
    device = begin(args)
    torch.manual_seed(0)
    # Sparse combinations of fixed directions, so that latents differ in how often they are used.
    features = torch.randn(4 * args.d_model, args.d_model)
    batches = [
        (torch.rand(args.batch, len(features)).pow(20) @ features).to(device)
        for _ in range(BATCHES)
    ]
    dead = max(1, round(args.dead * args.d_sae)) if args.auxk else 0
    job = Job(args.d_model, args.d_sae, args.k, batches, dead)
    makers = contenders(device)
    ready, missing = prepare(makers, job)
    say(f"timing {args.rounds} rounds after {args.warmup}")
    with contextlib.redirect_stdout(sys.stderr):
        timings = take_turns(ready, device, rounds=args.rounds, warmup=args.warmup)
    shape = {"d_model": args.d_model, "d_sae": args.d_sae, "k": args.k, "batch": args.batch}
    name = f"train_step{'_auxk' if args.auxk else ''}-{device.type}"
    rows = rows_of(makers, ready, missing, timings, args.batch)
    deliver(args, name, {**facts(device, shape), "rounds": args.rounds}, rows, COLUMNS)


if __name__ == "__main__":
    main()
