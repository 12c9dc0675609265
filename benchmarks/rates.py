"""Facts about a device, and its speed of matrix products and of copies.

    python benchmarks/rates.py
    python benchmarks/rates.py --size 8192

Products of two square matrices in every dtype, and a copy between two buffers that fit into no
cache (bytes read plus bytes written). `kernels.py` measures its rooflines with the same functions.
"""

import argparse
import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import torch
from side_by_side import Contender, add_flags, begin, deliver, facts, take_turns

_COPY_BYTES = 256 * 2**20


def product_flops_per_second(
    rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> float:
    """Operations per second of `[rows, inner] @ [inner, columns]` into an existing buffer."""
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    b = torch.randn(inner, columns, device=device, dtype=dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    product = Contender(lambda _: torch.mm(a, b, out=out), "")
    timing = take_turns({"": product}, device, rounds=rounds, warmup=2, flush=True)[""]
    return 2 * rows * inner * columns / timing.median


def copied_bytes_per_second(device: torch.device, rounds: int) -> float:
    """Bytes read plus bytes written per second by a copy of 256 MiB."""
    source = torch.ones(_COPY_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = Contender(lambda _: target.copy_(source), "")
    timing = take_turns({"": copy}, device, rounds=rounds, warmup=2, flush=True)[""]
    return 2 * _COPY_BYTES / timing.median


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Compute float32 products in TF32 inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measure(size: int, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A row for the products in each dtype and one for the copy."""
    kinds = {
        "bfloat16": (torch.bfloat16, contextlib.nullcontext()),
        "float32": (torch.float32, contextlib.nullcontext()),
        "float32 as TF32": (torch.float32, tf32()),
    }
    if device.type == "cpu":
        del kinds["float32 as TF32"]
    rows = []
    for name, (dtype, setting) in kinds.items():
        with setting:
            rate = product_flops_per_second(size, size, size, dtype, device, rounds)
        rows.append({"what": f"product, {name}", "rate": rate / 1e12, "unit": "TFLOP/s"})
    copied = copied_bytes_per_second(device, rounds)
    return [*rows, {"what": "copy", "rate": copied / 1e9, "unit": "GB/s"}]


def about(device: torch.device) -> dict[str, Any]:
    """What the device and its machine report about themselves."""
    known: dict[str, Any] = {"cores": os.cpu_count()}
    if device.type == "cpu":
        return known
    properties = torch.cuda.get_device_properties(device)
    known |= {
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": getattr(properties, "L2_cache_size", 0) // 2**20,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }
    query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        reported = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout
        known |= dict(zip(query.split(","), map(str.strip, reported.split(",")), strict=True))
    return known


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "what": lambda row: row["what"],
    "rate": lambda row: f"{row['rate']:,.4g} {row['unit']}",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=8192, help="of the matrices (default 8192)")
    add_flags(parser, name="rates", rounds=9)
    args = parser.parse_args(argv)
    device = begin(args)
    rows = measure(args.size, device, args.rounds)
    conditions = {**facts(device, {"size": args.size}), **about(device), "rounds": args.rounds}
    deliver(args, device, conditions, rows, COLUMNS)


if __name__ == "__main__":
    main()
