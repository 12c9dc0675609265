"""Each op of saesteer.kernels.ops against plain PyTorch and against the roofline of its device.

    python benchmarks/kernels.py                       # CPU: d_model 576, d_sae 9216, k 32
    python benchmarks/kernels.py --size S1,S2          # CUDA: the two reference sizes
    python benchmarks/kernels.py --only encode_topk --rounds 31

First the rate of the matrix product and of copies is measured on the same device. The roofline of
an op is the time its arithmetic takes at that rate, or its bytes at that bandwidth, whichever is
longer. Bytes are counted as if nothing stayed in a cache: an operand once, and a matrix row each
time an example names it. An op whose matrix fits into a cache can therefore exceed 100 %.

On CUDA a time is that of the device alone. `host ms` is what the host takes to launch the op, or to
wait for it where it does: an op whose host is slower than its device waits for its host, unless the
device has other work meanwhile.

Latents are drawn uniformly, and by Zipf's law (the n-th most frequent with a weight of 1/n), where
a few hot latents take part in most examples.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from op_cases import MAKERS, Case, make_operands
from rates import copied_bytes_per_second, product_flops_per_second
from side_by_side import (
    Contender,
    add_flags,
    begin,
    deliver,
    facts,
    say,
    take_turns,
)

from saesteer.kernels import ops

SIZES = {
    "laptop": (576, 9216, 32, 2048),
    "S1": (576, 16384, 32, 8192),
    "S2": (4096, 131072, 64, 8192),
}
"""d_model, d_sae, k, batch."""
NOT_TIMED = {"LatentOrder", "adam_schedule"}
"""Public names of `ops` that do no work on a tensor."""


def public_ops() -> list[str]:
    """What `ops` offers: its functions that work on tensors."""
    return [name for name in ops.__all__ if name not in NOT_TIMED]


def cases(
    size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, only: set[str]
) -> Iterator[Case]:
    """Uniform latents for every op, Zipf for those whose time depends on them."""
    for latents in ("uniform", "zipf"):
        operands = make_operands(size, latents, dtype, device)
        for name, make in MAKERS.items():
            if name in only and hasattr(ops, name):
                for case in make(operands):
                    if latents == "uniform" or case.latents != "any":
                        yield case


def contender(run: Callable[[], object]) -> Contender:
    return Contender(lambda _: run(), "")


def measure(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    only: set[str],
    args: argparse.Namespace,
    failed: list[str],
) -> list[dict[str, Any]]:
    """A row for each case; those that fail are added to `failed`."""
    size = SIZES[name] if name in SIZES else tuple(int(part) for part in name.split("x"))
    assert len(size) == 4
    d_model, d_sae, _, batch = size
    gemm = product_flops_per_second(batch, d_model, d_sae, dtype, device, args.rounds)
    copied = copied_bytes_per_second(device, args.rounds)
    say(f"{name}: product {gemm / 1e12:.3g} TFLOP/s, copy {copied / 1e9:.3g} GB/s")
    rows = []
    for case in cases(size, dtype, device, only):
        if args.out_of_time():
            say(f"no time left: {case.op}, latents {case.latents}, and those after it")
            break
        say(f"timing {case.op}, latents {case.latents}, against {case.counterpart}")
        pair = {"ours": contender(case.ours), "torch": contender(case.torch)}
        try:
            timings = take_turns(pair, device, rounds=args.rounds, warmup=args.warmup, flush=True)
        except Exception as error:
            # Go on with the other ops; the exit status says that one failed.
            say(f"  {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            failed.append(f"{case.op} ({case.latents}): {type(error).__name__}")
            continue
        arithmetic, traffic = case.flops / gemm, case.bytes / copied
        roofline = max(arithmetic, traffic)
        ratio = timings["torch"].over(timings["ours"])
        rows.append(
            {
                "op": case.op,
                "size": name,
                **dict(zip(("d_model", "d_sae", "k", "batch"), size, strict=True)),
                "dtype": str(dtype).removeprefix("torch."),
                "latents": case.latents,
                **timings["ours"].columns(),
                "counterpart": case.counterpart,
                **{f"torch_{k}": v for k, v in timings["torch"].columns().items()},
                "times_as_fast": ratio["ratio"],
                "times_as_fast_p20": ratio["ratio_p20"],
                "times_as_fast_p80": ratio["ratio_p80"],
                "gemm_tflops_per_second": gemm / 1e12,
                "copy_gb_per_second": copied / 1e9,
                "bound": "product" if arithmetic > traffic else "memory",
                "roofline_ms": 1e3 * roofline,
                "share_of_roofline": roofline / timings["ours"].median,
            }
        )
    return rows


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "op": lambda row: row["op"],
    "size": lambda row: row["size"],
    "latents": lambda row: row["latents"],
    "ms (p20 to p80)": lambda row: (
        f"{row['median_ms']:.2f} ({row['p20_ms']:.2f} to {row['p80_ms']:.2f})"
    ),
    "host ms": lambda row: f"{row['host_ms']:.2f}",
    "plain PyTorch": lambda row: f"{row['counterpart']}: {row['torch_median_ms']:.2f} ms",
    "saesteer is (p20 to p80)": lambda row: (
        f"{row['times_as_fast']:.2f} x "
        f"({row['times_as_fast_p20']:.2f} to {row['times_as_fast_p80']:.2f})"
    ),
    "roofline": lambda row: f"{row['roofline_ms']:.2f} ms ({row['bound']})",
    "reached": lambda row: f"{100 * row['share_of_roofline']:.0f} %",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = ", ".join(f"{name} {'x'.join(map(str, size))}" for name, size in SIZES.items())
    parser.add_argument(
        "--size",
        help="comma-separated names or d_model x d_sae x k x batch, such as 64x512x8x128; "
        f"named: {sizes} (default: laptop on a CPU, S1,S2 on CUDA)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of activations and weights (default: float32 on a CPU, bfloat16 on CUDA)",
    )
    parser.add_argument("--only", help=f"comma-separated ops, of {', '.join(MAKERS)}")
    add_flags(parser, name="kernels", rounds=15)
    args = parser.parse_args(argv)
    if args.only and (unknown := set(args.only.split(",")) - set(MAKERS)):
        parser.error(f"--only takes {', '.join(MAKERS)}, got {', '.join(sorted(unknown))}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = begin(args)
    on_cuda = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_cuda else "float32"))
    names = (args.size or ("S1,S2" if on_cuda else "laptop")).split(",")
    only = set(args.only.split(",")) if args.only else set(MAKERS)
    for name in sorted(set(public_ops()) - set(MAKERS)):
        say(f"not measured: {name} has no case in this script")
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for name in names:
        rows += measure(name, dtype, device, only, args, failed)
    described = {
        "sizes": "; ".join(
            f"{row['size']} d_model {row['d_model']} d_sae {row['d_sae']} k {row['k']} "
            f"batch {row['batch']}, product {row['gemm_tflops_per_second']:.3g} TFLOP/s, "
            f"copy {row['copy_gb_per_second']:.3g} GB/s"
            for row in {row["size"]: row for row in rows}.values()
        ),
        "dtype": str(dtype).removeprefix("torch."),
    }
    conditions = {**facts(device, {}), **described, "rounds": args.rounds}
    if failed:
        conditions["failed"] = "; ".join(failed)
    columns = {name: cell for name, cell in COLUMNS.items() if on_cuda or name != "host ms"}
    deliver(args, device, conditions, rows, columns)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
