"""One optimiser step: saesteer and its rivals at TopK, or saesteer's architectures side by side.

    python benchmarks/train_step.py                # d_model 576, d_sae 9216, k 32, batch 2048
    python benchmarks/train_step.py --auxk         # with the auxiliary loss and 10 % dead latents
    python benchmarks/train_step.py --arch topk,batchtopk,matryoshka,jumprelu --d-sae 4608
    python benchmarks/train_step.py --d-sae 4608 --rounds 15 --json
    python benchmarks/train_step.py --device cuda --only "saesteer step;saesteer step, CUDA graph"

The contenders take turns, round by round, so that a machine whose speed drifts slows all of them;
what to quote is the ratio of medians. Each rival runs its own code, and every row says
what it was given; on CUDA there are rows in bfloat16, dense steps in plain PyTorch and through
`torch.compile`, and the memory of each. `make peers` installs those that saesteer itself does not
need; a rival that is missing is listed as `not installed`. Absolute figures mean nothing on another
machine.
"""

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from dense_step import dense_step
from our_trainer import make_trainer
from rivals import Job, dictionary_learning, keep_dead, sae_lens, sparsify
from side_by_side import (
    Contender,
    Timing,
    add_flags,
    add_only,
    begin,
    choose,
    deliver,
    facts,
    measured,
    say,
    take_turns,
    why_not,
)
from torch import Tensor

from saesteer.kernels import near_products
from saesteer.kernels.ops import encode_topk
from saesteer.sae.config import TrainConfig
from saesteer.sae.training.input_scale import InputScale

OURS = "saesteer step"
AUXK = 1 / 32
BATCHES = 4
AIMED_AT_L0 = {"jumprelu"}
"""Architectures that have no k."""
Make = Callable[[Job], Contender]


def ours(
    job: Job, *, arch: str = "topk", dtype: str = "auto", cuda_graph: bool = False
) -> Contender:
    """saesteer's own step. An architecture without k has k as its L0."""
    by_l0 = arch in AIMED_AT_L0
    config = TrainConfig(
        arch=arch,
        d_sae=(job.d_sae,),
        **{"l0": (float(job.k),)} if by_l0 else {"k": (job.k,)},
        tokens=job.steps * job.batch,
        batch_tokens=job.batch,
        auxk=AUXK if job.dead else 0.0,
        # One batch of silence is enough here: the marks below decide which latents are dead, and a
        # trainer looks for dead latents only after `dead_after_tokens` activations.
        dead_after_tokens=job.batch if job.dead else None,
        dtype=dtype,
        cuda_graph=cuda_graph,
    )
    scale = InputScale(torch.zeros(job.d_model, dtype=torch.float64), 1.0)
    trainer, take = make_trainer(config, scale, job.device)
    if by_l0:
        start_at_l0(trainer.parameters, job)

    def step(number: int) -> None:
        take(job.at(number))

    before = keep_dead(
        trainer.silence.tokens_since_fired, job.dead, 2 * config.resolved_dead_after_tokens, step
    )
    before()
    trainer.take_log()  # on a GPU this is when room is made for the dead latents
    if int(trainer.silence.dead.sum()) != job.dead:
        raise RuntimeError(
            f"{int(trainer.silence.dead.sum())} latents count as dead, not {job.dead}"
        )
    auxk = f"AuxK 1/32, k_aux up to 512, {job.dead:,} dead" if job.dead else "AuxK off"
    products = "float32 with bfloat16 products" if trainer.optimiser.copies else "float32"
    recorded = ", CUDA graph" if cuda_graph else ""
    return Contender(
        step,
        f"saesteer {version('saesteer')}, {products}, Adam, unit decoder rows, {auxk}{recorded}"
        + (f", L0 {_measured_l0(trainer.parameters, job):.1f} at the start" if by_l0 else ""),
        before,
    )


def start_at_l0(parameters: Mapping[str, Tensor], job: Job) -> None:
    """Set all thresholds to the value that k latents an example are above, as late in training."""
    wanted = job.batch * job.k
    pre_acts = job.at(0) @ parameters["W_enc_rows"].T + parameters["b_enc"]
    parameters["threshold"].fill_(pre_acts.flatten().topk(wanted, sorted=False).values.amin())


def _measured_l0(parameters: Mapping[str, Tensor], job: Job) -> float:
    pre_acts = job.at(0) @ parameters["W_enc_rows"].T + parameters["b_enc"]
    return int((pre_acts > parameters["threshold"]).sum()) / job.batch


def product(job: Job, *, dtype: torch.dtype = torch.float32) -> Contender:
    """The product `x @ W_enc` alone, the least that any step needs."""
    W_enc = torch.randn(job.d_model, job.d_sae, device=job.device, dtype=dtype)
    out = torch.empty(job.batch, job.d_sae, device=job.device, dtype=dtype)
    batches = [batch.to(dtype) for batch in job.batches]
    return Contender(
        lambda number: torch.mm(batches[number % len(batches)], W_enc, out=out),
        f"torch.mm, {_name(dtype)}, into a buffer that exists",
    )


def encode(job: Job, *, dtype: torch.dtype = torch.float32) -> Contender:
    """The TopK encoder alone, without gradients."""
    W_enc_rows = torch.randn(job.d_sae, job.d_model, device=job.device, dtype=dtype)
    b_enc = torch.zeros(job.d_sae, device=job.device)
    batches = [batch.to(dtype) for batch in job.batches]
    return Contender(
        lambda number: encode_topk(batches[number % len(batches)], W_enc_rows, b_enc, job.k),
        f"saesteer {version('saesteer')}, {_name(dtype)}, forward only",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CONTENDERS: dict[str, Make] = {
    OURS: ours,
    "SAELens SAETrainer.step": sae_lens,
    "dictionary_learning TopKTrainer.update": dictionary_learning,
    "sparsify coder step, Adam": sparsify,
    "x @ W_enc alone": product,
    "encode_topk alone": encode,
}
"""Contenders on a CPU, where all of them compute in float32."""

FOR_CUDA: dict[str, Make] = {
    OURS: ours,
    f"{OURS}, CUDA graph": partial(ours, cuda_graph=True),
    f"{OURS}, float32": partial(ours, dtype="float32"),
    "x @ W_enc alone, bfloat16": partial(product, dtype=torch.bfloat16),
    "encode_topk alone, bfloat16": partial(encode, dtype=torch.bfloat16),
    "plain PyTorch, dense, autocast": partial(dense_step, autocast=True),
    "torch.compile, dense, autocast": partial(dense_step, compiled=True, autocast=True),
    "sparsify coder step, Adam": sparsify,
    "SAELens SAETrainer.step, autocast": partial(sae_lens, autocast=True),
    "x @ W_enc alone": product,
    "encode_topk alone": encode,
    "plain PyTorch, dense": dense_step,
    "torch.compile, dense": partial(dense_step, compiled=True),
    "SAELens SAETrainer.step": sae_lens,
    "dictionary_learning TopKTrainer.update": dictionary_learning,
}
"""The most important first: a run that is out of time leaves out the last ones."""


OWN = {OURS, "x @ W_enc alone", "encode_topk alone"}
"""Contenders that must not fail."""


def prepare(make: Make, job: Job) -> tuple[Contender, dict[str, float]]:
    """A contender after one step, and on a GPU the GB that it holds and that a step adds."""
    on_cuda = job.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_cuda else 0
    contender = make(job)
    contender.before()
    contender.step(0)
    if not on_cuda:
        return contender, {}
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contender.before()
    contender.step(1)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    memory = {"held_gb": held - before, "step_gb": peak - held, "peak_gb": peak}
    return contender, {name: size / 1e9 for name, size in memory.items()}


def measure(
    makers: Mapping[str, Make], job: Job, args: argparse.Namespace
) -> tuple[dict[str, Timing], dict[str, dict[str, Any]]]:
    """Timings, and what else is known of each contender: status, what it was given, memory."""
    timings: dict[str, Timing] = {}
    known: dict[str, dict[str, Any]] = {}
    ready: dict[str, Contender] = {}
    spent: dict[str, list[float]] = {}

    def time_those_ready() -> None:
        new = take_turns(ready, job.device, rounds=args.rounds, warmup=args.warmup)
        timings.update(new)
        ready.clear()

    for name, make in makers.items():
        if args.out_of_time():
            known[name] = {"status": "no time left", "given": ""}
            continue
        say(f"preparing {name}")
        try:
            # Some rivals print while they are imported; stdout belongs to the result.
            with contextlib.redirect_stdout(sys.stderr):
                ready[name], memory = prepare(make, job)
                known[name] = {"status": "ok", "given": ready[name].given, **memory}
                if args.arch:
                    spent[name] = []
                    ready[name] = counted(ready[name], spent[name])
                if args.alone:
                    time_those_ready()
        except Exception as error:
            if name in OWN and not args.alone:
                raise
            known[name] = {"status": why_not(error), "given": ""}
            ready.pop(name, None)
        if args.alone:
            free_memory(job.device)
    if ready:
        say(f"timing {args.rounds} rounds after {args.warmup}")
        with contextlib.redirect_stdout(sys.stderr):
            time_those_ready()
    for name, seconds in spent.items():
        known[name]["cpu_ms"] = 1e3 * statistics.median(seconds[args.warmup :])
    return timings, known


def counted(contender: Contender, seconds: list[float]) -> Contender:
    """The same, keeping the CPU time of each step: others on the machine matter less to it."""

    def step(number: int) -> None:
        before = time.process_time()
        contender.step(number)
        seconds.append(time.process_time() - before)

    return replace(contender, step=step)


def free_memory(device: torch.device) -> None:
    """Free the memory of a contender that is no longer referenced."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rows_of(
    timings: dict[str, Timing], known: dict[str, dict[str, Any]], batch: int
) -> list[dict[str, Any]]:
    """A row for each contender, with its speed and its time over saesteer's, or other rows'."""
    rows: list[dict[str, Any]] = []
    for name, about in known.items():
        rows.append({"contender": name, **about})
        if name not in timings:
            continue
        timing = timings[name]
        rows[-1] |= {"tokens_per_second": batch / timing.median, **timing.columns()}
        if OURS in timings:
            ratio = timing.over(timings[OURS])
            rows[-1] |= {f"saesteer_times_as_fast{k[5:]}": v for k, v in ratio.items()}
        for base in BASES:
            if (of := own_step(base)) in timings:
                ratio = timing.over(timings[of])
                rows[-1] |= {f"over_{base}{k[5:]}": v for k, v in ratio.items()}
                if "cpu_ms" in about:
                    rows[-1][f"cpu_over_{base}"] = about["cpu_ms"] / known[of]["cpu_ms"]
    return rows


BASES = ("topk", "batchtopk")
"""Architectures that the time of the others is divided by."""


def own_step(arch: str) -> str:
    """The name of our step as a contender of `--arch`."""
    return f"{OURS}, {arch}"


def over(base: str) -> Callable[[dict[str, Any]], str]:
    """A cell with the time over that of another architecture."""
    name = f"over_{base}"
    return lambda row: (
        f"{row[name]:.2f} ({row[f'{name}_p20']:.2f} to {row[f'{name}_p80']:.2f})"
        if name in row
        else "-"
    )


def cpu_over(base: str) -> Callable[[dict[str, Any]], str]:
    """The same for the CPU time of all threads, by medians."""
    return lambda row: f"{row[f'cpu_over_{base}']:.2f}" if f"cpu_over_{base}" in row else "-"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "contender": lambda row: row["contender"],
    "tokens/s": lambda row: (
        f"{row['tokens_per_second']:,.0f}" if row["status"] == "ok" else row["status"]
    ),
    "ms (p20 to p80)": measured(
        lambda row: f"{row['median_ms']:.1f} ({row['p20_ms']:.1f} to {row['p80_ms']:.1f})"
    ),
    "max/min": measured(lambda row: f"{row['slowest_over_fastest']:.2f}"),
    "saesteer is (p20 to p80)": lambda row: (
        f"{row['saesteer_times_as_fast']:.2f} x "
        f"({row['saesteer_times_as_fast_p20']:.2f} to {row['saesteer_times_as_fast_p80']:.2f})"
        if "saesteer_times_as_fast" in row
        else "-"
    ),
    "given": lambda row: row["given"],
}
COLUMNS_OF_CUDA: dict[str, Callable[[dict[str, Any]], str]] = {
    "host ms": measured(lambda row: f"{row['host_ms']:.1f}"),
    "GB held": measured(lambda row: f"{row['held_gb']:.2f}"),
    "GB in a step": measured(lambda row: f"{row['step_gb']:.2f}"),
}
"""Time until the host had launched the step, parameters and state, and what a step needs more."""


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
    parser.add_argument(
        "--alone",
        action="store_true",
        help="one after the other, each gone before the next: where there is no room for all; what "
        "fails is a row",
    )
    parser.add_argument(
        "--arch", help="our step of these architectures, with commas between them, and no rivals"
    )
    add_only(parser)
    add_flags(parser, name="train_step", rounds=9)
    args = parser.parse_args(argv)
    if args.arch and args.only:
        parser.error("--arch and --only both say what runs: leave one out")
    if not 0 < args.dead < 1:
        parser.error(f"--dead must be between 0 and 1 exclusive, got {args.dead}")
    args.name += ("_arch" if args.arch else "") + ("_auxk" if args.auxk else "")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.plain_float32:
        near_products.fast_bfloat16 = lambda: False
    device = begin(args)
    torch.manual_seed(0)
    # Sparse combinations of fixed directions, so that latents differ in how often they are used.
    features = torch.randn(4 * args.d_model, args.d_model, device=device)
    batches = [
        torch.rand(args.batch, len(features), device=device).pow(20) @ features
        for _ in range(BATCHES)
    ]
    del features
    dead = max(1, round(args.dead * args.d_sae)) if args.auxk else 0
    job = Job(args.d_model, args.d_sae, args.k, batches, dead)
    usual = FOR_CUDA if device.type == "cuda" else CONTENDERS
    if args.arch:
        makers = {own_step(arch): partial(ours, arch=arch) for arch in args.arch.split(",")}
    else:
        makers = choose(args.only, usual, {**CONTENDERS, **FOR_CUDA, **usual})
    timings, known = measure(makers, job, args)
    rows = rows_of(timings, known, args.batch)
    shape = {"d_model": args.d_model, "d_sae": args.d_sae, "k": args.k, "batch": args.batch}
    conditions = {**facts(device, shape), "rounds": args.rounds}
    columns = dict(COLUMNS)
    if args.arch:
        given = columns.pop("given")
        del columns["saesteer is (p20 to p80)"]
        columns |= {f"time over {base}'s": over(base) for base in BASES}
        columns |= {f"CPU time over {base}'s": cpu_over(base) for base in BASES}
        columns["given"] = given
    if device.type == "cuda":
        conditions["peak_gb"] = round(
            max((row.get("peak_gb", 0.0) for row in rows), default=0.0), 2
        )
        given = columns.pop("given")
        columns |= {**COLUMNS_OF_CUDA, "given": given}
    deliver(args, device, conditions, rows, columns)


if __name__ == "__main__":
    main()
