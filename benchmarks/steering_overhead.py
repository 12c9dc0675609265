"""What steering costs: time in the hooks as a share of generation, and rivals side by side.

    python benchmarks/steering_overhead.py                  # SmolLM2-135M, batch 16, 24 new tokens
    python benchmarks/steering_overhead.py --only "add;gate" --rounds 9
    python benchmarks/steering_overhead.py --tokens 64 --no-rivals --json
    python benchmarks/steering_overhead.py --model random:1b --batch 1,16,64 --compiled --no-rivals

Every contender generates the same number of tokens from the same prompts inside one process,
taking turns, and sets up its steering again each time. Two figures for each: the time inside its
hooks as a share of the whole of the same run (a busy machine slows both alike), and the whole over
that of the unsteered run (what a person waits; noisy where the difference is small). Hooks are
timed from outside, through `register_forward_hook`, ours and those of others by the same code;
on a GPU that is the time to launch them. Rivals add the same vector in the same block as "add"
does; one that is missing is listed as `not installed`. With `--compiled` transformers decodes with
a static cache, for which it compiles the model on CUDA.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from random_model import load
from side_by_side import (
    Contender,
    Timing,
    add_flags,
    add_only,
    begin,
    choose,
    deliver,
    facts,
    percentile,
    quiet,
    say,
    take_turns,
    why_not,
)
from steering_rivals import RIVALS, HookClock, Rival, Steering
from torch import Tensor

from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import encode_prompt, pad_left
from saesteer.steering.evaluation.damage import neutral_questions
from saesteer.steering.hooking.arrangement import ByRow, Plans
from saesteer.steering.hooking.hook import steer
from saesteer.steering.hooking.latent_values import with_gate
from saesteer.steering.plans.from_sae import make_plan
from saesteer.steering.plans.plan import Plan, PlannedLatent

PLAIN = "unsteered"


@dataclass
class Bench:
    """One loaded model, its prompts, and SAEs with random weights: no result depends on them."""

    lm: LanguageModel
    layer: int
    ids: Tensor
    mask: Tensor
    options: dict[str, Any]
    d_sae: int
    clock: HookClock
    saes: dict[str, SAE]

    def sae(self, architecture: str) -> SAE:
        """An SAE with random weights, made once for each architecture."""
        if architecture not in self.saes:
            generator = torch.Generator().manual_seed(0)
            d_model = self.lm.d_model
            W_dec = torch.randn(self.d_sae, d_model, generator=generator)
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            spec = SAESpec(
                architecture=architecture,  # type: ignore[arg-type]
                d_model=d_model,
                d_sae=self.d_sae,
                k=32 if architecture == "topk" else None,
                hook_name=f"blocks.{self.layer}.hook_resid_post",
            )
            self.saes[architecture] = SAE(
                spec=spec,
                W_enc=W_dec.T.contiguous(),
                b_enc=torch.zeros(self.d_sae),
                W_dec=W_dec,
                b_dec=torch.zeros(d_model),
                source="random",
                sha256=architecture,
            ).to(self.lm.device)
        return self.saes[architecture]

    def plan(self, k: int, architecture: str = "standard", **fields: Any) -> Plan:
        """A plan of `k` latents of a random SAE."""
        latents = [PlannedLatent(id=7 * i, mu=20.0, sigma=4.0, max=60.0) for i in range(k)]
        return make_plan(self.lm, self.sae(architecture), latents, **fields)

    def generate(self) -> Tensor:
        """Generate once from all prompts, `[batch, prompt + new tokens]`."""
        with torch.inference_mode():
            sequences: Tensor = self.lm.model.generate(
                input_ids=self.ids, attention_mask=self.mask, **self.options
            )
        return sequences

    def steered(self, plans: Plans, sae: SAE | None = None) -> Callable[[], Tensor]:
        """A function that generates once under plans, with the hooks timed."""

        def run() -> Tensor:
            with self.clock.watching(), steer(self.lm, plans, sae=sae):
                return self.generate()

        return run


def _gated(bench: Bench, gate: str, **fields: Any) -> Callable[[], Tensor]:
    sae = bench.sae("standard")
    return bench.steered(with_gate(bench.plan(15, **fields), gate, sae))


OURS: dict[str, Callable[[Bench], Callable[[], Tensor]]] = {
    "add": lambda b: b.steered(b.plan(1)),
    "add, k 15": lambda b: b.steered(b.plan(15)),
    "add, relative dose": lambda b: b.steered(b.plan(15, unit="rel", scale=0.3)),
    "add, decay": lambda b: b.steered(b.plan(15, schedule="decay:0.1,3")),
    "keep norm": lambda b: b.steered(b.plan(15, method="add-keep-norm")),
    "clamp": lambda b: b.steered(b.plan(1, method="set")),
    "clamp, k 15": lambda b: b.steered(b.plan(15, method="min")),
    "clamp, TopK SAE": lambda b: b.steered(b.plan(15, "topk", method="min"), b.sae("topk")),
    "project, k 15": lambda b: b.steered(b.plan(15, method="project")),
    "gate": lambda b: _gated(b, "7 > -1"),
    "gate, hysteresis": lambda b: _gated(b, "7 > 2 : 1 | 14 > 3 & !(21 > 9)"),
    "a plan for each row": lambda b: b.steered(
        ByRow([b.plan(1 + i % 4) for i in range(len(b.ids))])
    ),
    "two plans": lambda b: b.steered([b.plan(15), b.plan(15, method="min")]),
}


def contenders(bench: Bench, names: list[str], job: Steering) -> dict[str, Callable[[], Rival]]:
    """A function for each contender that prepares it: ours first, then the rivals."""
    makers: dict[str, Callable[[], Rival]] = {}
    given = f"saesteer {version('saesteer')}"
    for name in names:
        if name in OURS:
            makers[name] = lambda name=name: Rival(OURS[name](bench), given)  # type: ignore[misc]
        else:
            makers[name] = lambda name=name: RIVALS[name](job)  # type: ignore[misc]
    return makers


def prepare(
    makers: dict[str, Callable[[], Rival]], plain: Tensor
) -> tuple[dict[str, Rival], dict[str, str]]:
    """The contenders that run, and why the others do not. A rival must change what is generated."""
    ready: dict[str, Rival] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        say(f"preparing {name}")
        try:
            with quiet():
                rival = make()
                generated = rival.run()
            # Our own hook raises when it has edited no position.
            if name in RIVALS and torch.equal(generated, plain):
                raise RuntimeError("it generates what the unsteered model does")
        except Exception as error:
            if name in OURS:
                raise
            missing[name] = why_not(error)
        else:
            ready[name] = rival
    return ready, missing


def measure(
    bench: Bench, ready: dict[str, Rival], device: torch.device, rounds: int, warmup: int
) -> tuple[dict[str, Timing], dict[str, list[float]]]:
    """Whole runs, and the seconds in hooks of each."""
    hooks: dict[str, list[float]] = {name: [] for name in ready}

    def step(name: str, rival: Rival) -> Callable[[int], object]:
        def run(number: int) -> None:
            bench.clock.seconds = 0.0
            rival.run()
            hooks[name].append(bench.clock.seconds)

        return run

    turns = {PLAIN: Contender(lambda number: bench.generate(), "")}
    turns |= {name: Contender(step(name, rival), rival.given) for name, rival in ready.items()}
    with quiet():
        timings = take_turns(turns, device, rounds=rounds, warmup=warmup)
    return timings, {name: seconds[warmup:] for name, seconds in hooks.items()}


def rows_of(
    names: list[str],
    ready: dict[str, Rival],
    missing: dict[str, str],
    timings: dict[str, Timing],
    hooks: dict[str, list[float]],
    passes: int,
) -> list[dict[str, Any]]:
    """A row for the unsteered run and for each contender."""
    rows: list[dict[str, Any]] = [
        {"contender": PLAIN, "status": "ok", "given": "", **timings[PLAIN].columns()}
    ]
    for name in names:
        if name in missing:
            rows.append({"contender": name, "status": missing[name], "given": ""})
            continue
        whole = timings[name]
        row = {
            "contender": name,
            "status": "ok",
            "given": ready[name].given,
            **whole.columns(),
            **{f"over_unsteered_{k}": v for k, v in whole.over(timings[PLAIN]).items()},
        }
        if ready[name].clocked:
            shares = [h / s for h, s in zip(hooks[name], whole.seconds, strict=True)]
            row |= {
                "hook_share": percentile(shares, 0.5),
                "hook_share_p20": percentile(shares, 0.2),
                "hook_share_p80": percentile(shares, 0.8),
                "hook_us_per_pass": 1e6 * percentile(hooks[name], 0.5) / passes,
            }
        rows.append(row)
    return rows


def _hook(row: dict[str, Any]) -> str:
    if "hook_share" not in row:
        return "-"
    low, high = 100 * row["hook_share_p20"], 100 * row["hook_share_p80"]
    return f"{100 * row['hook_share']:.2f} % ({low:.2f} to {high:.2f})"


def _ratio(row: dict[str, Any]) -> str:
    if "over_unsteered_ratio" not in row:
        return "-"
    low, high = row["over_unsteered_ratio_p20"], row["over_unsteered_ratio_p80"]
    return f"{row['over_unsteered_ratio']:.3f} x ({low:.3f} to {high:.3f})"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "contender": lambda row: row["contender"],
    "in hooks (p20 to p80)": lambda row: _hook(row) if row["status"] == "ok" else row["status"],
    "us a pass": lambda row: f"{row['hook_us_per_pass']:.0f}" if "hook_share" in row else "-",
    "over unsteered (p20 to p80)": _ratio,
    "given": lambda row: row["given"],
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--layer", type=int, help="block that is steered (default: the middle)")
    parser.add_argument("--d-sae", type=int, help="latents (default: 8 x d_model)")
    parser.add_argument("--batch", default="16", help="rows, commas between several (default 16)")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of each row")
    parser.add_argument("--no-rivals", action="store_true")
    parser.add_argument("--compiled", action="store_true", help="static cache: compiled on CUDA")
    add_only(parser)
    add_flags(parser, name="steering_overhead", rounds=5)
    return parser.parse_args(argv)


def bench_of(
    lm: LanguageModel, batch: int, args: argparse.Namespace, saes: dict[str, SAE]
) -> Bench:
    """A bench with `batch` prompts and the settings of the flags."""
    layer = lm.n_layers // 2 if args.layer is None else args.layer
    questions = neutral_questions()
    texts = [questions[i % len(questions)].prompt for i in range(batch)]
    prompts = [encode_prompt(lm, text, chat=lm.has_chat_template).token_ids for text in texts]
    ids, mask = pad_left(lm, prompts)
    options = {
        "max_new_tokens": args.tokens,
        "min_new_tokens": args.tokens,
        "do_sample": False,
        "pad_token_id": lm.pad_id,
    }
    if args.compiled:
        options["cache_implementation"] = "static"
    return Bench(lm, layer, ids, mask, options, args.d_sae or 8 * lm.d_model, HookClock(), saes)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    names = list(choose(args.only, {**OURS, **({} if args.no_rivals else RIVALS)}, OURS | RIVALS))
    device = begin(args)
    lm = load(args.model, device, args.dtype)
    batches = [int(batch) for batch in args.batch.split(",")]
    saes: dict[str, SAE] = {}
    rows: list[dict[str, Any]] = []
    for batch in batches:
        if rows and args.out_of_time():
            rows.append({"contender": PLAIN, "batch": batch, "status": "no time left", "given": ""})
            continue
        say(f"batch {batch}: timing {args.rounds} rounds after {args.warmup}")
        bench = bench_of(lm, batch, args, saes)
        plan = bench.plan(1)
        vector = (torch.tensor(plan.doses()) @ plan.directions.float()).to(lm.device, lm.dtype)
        job = Steering(lm, bench.layer, vector, bench.ids, bench.mask, bench.options, bench.clock)
        ready, missing = prepare(contenders(bench, names, job), bench.generate())
        timings, hooks = measure(bench, ready, device, args.rounds, args.warmup)
        batch_rows = rows_of(names, ready, missing, timings, hooks, args.tokens)
        rows += [{**row, "batch": batch} for row in batch_rows]
    shape = {
        "model": lm.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "layer": bench.layer,
        "d_sae": bench.d_sae,
        "batch": args.batch,
        "prompt": bench.ids.shape[1],
        "tokens": args.tokens,
    }
    if args.compiled:
        shape["generation"] = "static cache" + (", compiled" if device.type == "cuda" else "")
    columns = dict(COLUMNS)
    if len(batches) > 1:
        columns["batch"] = lambda row: str(row["batch"])
        columns["ms a token"] = lambda row: (
            f"{row['median_ms'] / args.tokens:.2f}" if "median_ms" in row else "-"
        )
    deliver(args, device, {**facts(device, shape), "rounds": args.rounds}, rows, columns)


if __name__ == "__main__":
    main()
