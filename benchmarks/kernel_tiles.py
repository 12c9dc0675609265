"""Times the candidate tiles of the gathering Triton kernels on a GPU: under a minute in all.

    python benchmarks/kernel_tiles.py              # the two reference sizes, bfloat16
    python benchmarks/kernel_tiles.py --size S1

Each kernel's file lists its candidates in TILES and uses the first: put the best in front. Prints
the median of every one and the share of the roofline that it reaches, computed as in `kernels.py`,
and two ops without candidates for comparison.
"""

import argparse
from collections.abc import Callable

import torch
from op_cases import MAKERS, Operands
from side_by_side import Contender, take_turns

from saesteer.kernels import decode_mse, sparse_decode, sparse_row_grads

SIZES = {"S1": (576, 16384, 32, 8192), "S2": (4096, 131072, 64, 8192)}
"""d_model, d_sae, k, batch; as in `kernels.py`."""

TABLES = {
    "sparse_decode": sparse_decode,
    "decode_mse": decode_mse,
    "sparse_row_grads": sparse_row_grads,
    "sparse_pair_grads": sparse_row_grads,
    "gather_dot": None,
    "auxk": None,
}
"""By op, the module whose TILES it uses."""


def draw(size: tuple[int, int, int, int], device: torch.device) -> Operands:
    """Operands made on the device: `op_cases.make_operands` takes half a minute for S2."""
    d_model, d_sae, k, batch = size
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    indices = torch.randint(0, d_sae, (batch, k), generator=generator, device=device)
    return Operands(
        x=normal(batch, d_model),
        W=normal(d_sae, d_model) / d_model**0.5,
        acts=torch.rand(batch, k, generator=generator, device=device),
        indices=indices.sort(dim=1).values,
        latents="uniform",
    )


def median_seconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median device time of a call, with the cache flushed before each."""
    turns = {"": Contender(lambda _: run(), "")}
    return take_turns(turns, device, rounds=rounds, warmup=3, flush=True)[""].median


def time_tiles(size: str, op: str, operands: Operands, copied: float, rounds: int) -> None:
    """Time every candidate tile of one op and print a line for each."""
    case, module = next(MAKERS[op](operands)), TABLES[op]
    tiles = getattr(module, "TILES", (None,))
    for tile in tiles:
        if module is not None:
            vars(module)["TILES"] = (tile,)
        median = median_seconds(case.ours, operands.W.device, rounds)
        share = case.bytes / copied / median
        print(f"{size} {op:18s} {1e3 * median:8.3f} ms {share:6.0%}  {tile or ''}", flush=True)
    if module is not None:
        vars(module)["TILES"] = tiles


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="S1,S2", help=f"comma-separated, of {', '.join(SIZES)}")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("kernel_tiles.py times Triton kernels, and torch sees no CUDA device here")
    device = torch.device("cuda")
    source = torch.ones(2**28, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copied = 2 * 2**28 / median_seconds(lambda: target.copy_(source), device, args.rounds)
    print(f"{torch.cuda.get_device_name()}: copy {copied / 1e9:.0f} GB/s")
    for size in args.size.split(","):
        operands = draw(SIZES[size], device)
        for op in TABLES:
            time_tiles(size, op, operands, copied, args.rounds)


if __name__ == "__main__":
    main()
