"""Compile every Triton kernel for sm_90 without a GPU. Run by test_triton.py in its own process.

The interpreter accepts code that the compiler rejects, and says nothing about registers. Prints one
line per kernel and exits with 1 if one spills registers to memory or takes so much shared memory
that two programs do not fit on a multiprocessor.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from saesteer.kernels import (
    adam_rows,
    auxk,
    batchtopk_encode,
    decode_mse,
    decode_prefixes,
    gather_dot,
    select_largest,
    sparse_decode,
    sparse_row_grads,
    threshold_grads,
    topk_encode,
)

MODULES = (
    adam_rows,
    auxk,
    batchtopk_encode,
    decode_mse,
    decode_prefixes,
    gather_dot,
    select_largest,
    sparse_decode,
    sparse_row_grads,
    threshold_grads,
    topk_encode,
)

POINTERS = {
    "*i64": "latent_indices indices order starts row_starts piece_starts examples owners "
    "old_owners counts later_counts sought block_counts block_ends places chosen",
    "*i32": "group_keys group_ids keys digit_counts best members old_members",
    "*fp32": "latent_acts b_dec b_enc out vectors acts pre_acts weights grads sums later_grads "
    "later_sums "
    "exp_avgs exp_avg_sqs target squared_error error act_grads grad_scales bias last_error "
    "suffix_errors thresholds price pre_act_grads threshold_grads",
    "*bf16": "shadows",
    "*fp64": "schedule",
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names.split()}
TYPES |= dict.fromkeys(("decay1", "beta2", "decay2", "eps", "bandwidth"), "fp32")

KEYS = {"KEY": tl.int32, "MAX": 2**31 - 1, "BITS": 32}

UNHINTED = (
    *("k", "n_chosen", "batch", "n_entries", "levels"),
    *("n_keys", "n_blocks", "n_kept", "n_groups", "first_group"),
)
"""Numbers that need not be multiples of 16."""

MOST_SHARED = 113 * 1024
"""Bytes of shared memory with which two programs fit on one multiprocessor."""


def variants() -> Iterator[tuple[Any, int, dict[str, Any], dict[str, str]]]:
    """Kernel, warps, compile-time values, and the types of its matrices."""
    for matrix, size in (("*fp32", 4), ("*bf16", 2)):
        for module, kernel, types in (
            (sparse_decode, sparse_decode.sparse_decode_kernel, {"W_dec": matrix}),
            (decode_mse, decode_mse.decode_mse_kernel, {"W_dec": matrix, "target": matrix}),
            (
                decode_prefixes,
                decode_prefixes.decode_prefixes_kernel,
                {"W_dec": matrix, "target": matrix},
            ),
            (sparse_row_grads, sparse_row_grads.row_grads_kernel, {"rows": matrix}),
        ):
            for tile, ragged in itertools.product(module.TILES, (False, True)):
                if ragged and (tile != module.TILES[0] or module is sparse_row_grads):
                    continue
                if module is decode_prefixes and (ragged or tile != module.TILES[0]):
                    continue
                columns, warps = tile.fit(4096, size)
                how = {"ROWS": tile.rows, "BLOCK_D": columns, "STAGES": tile.stages}
                how |= {"ACC": tl.float32, "RAGGED": ragged, "HAS_BIAS": not ragged, "CHUNK": 64}
                yield kernel, warps, how, types
        for ragged in (False, True):
            dots = {"BLOCK_K": 8, "BLOCK_D": 256, "ACC": tl.float32, "RAGGED": ragged}
            yield gather_dot.gather_dot_kernel, 4, dots, {"matrix": matrix, "vectors": matrix}
    chunks = {"CHUNK": 64, "BLOCK_D": 512, "ACC": tl.float32}
    yield sparse_row_grads.add_chunks_kernel, 1, chunks, {}
    yield topk_encode.group_max_kernel, 4, {"GROUP": 32, "BLOCK_G": 128, **KEYS}, {}
    for keys, warps in ((512, 4), (topk_encode.MAX_CANDIDATES, 8)):
        yield topk_encode.select_groups_kernel, warps, {"BLOCK": keys, **KEYS}, {}
        latents = {"GROUP": 32, "BLOCK_G": keys // 32, **KEYS}
        yield topk_encode.select_latents_kernel, warps, latents, {}
    for shift, width in ((23, 8), (0, 7)):
        digit = {"SHIFT": shift, "WIDTH": width, "BLOCK": select_largest.BLOCK, **KEYS}
        yield select_largest.count_digits_kernel, 4, digit, {}
        yield select_largest.narrow_kernel, 4, digit, {}
    block = {"BLOCK": select_largest.BLOCK, **KEYS}
    yield select_largest.count_kept_kernel, 4, block, {}
    yield select_largest.list_kept_kernel, 4, block, {}
    groups = {"GROUP": batchtopk_encode.GROUP, "BLOCK": 32, **KEYS}
    yield batchtopk_encode.take_groups_kernel, 4, groups, {}
    for priced in (False, True):
        how = {"ONE_PRICE": not priced, "TO_INPUT": priced, "BLOCK": threshold_grads.BLOCK}
        yield threshold_grads.threshold_grads_kernel, 2, {**how, "ACC": tl.float32}, {}
    for width in (2048, auxk.WIDEST):
        yield auxk.keep_largest_kernel, max(4, width // 1024), {"BLOCK": width, **KEYS}, {}
    plain = dict.fromkeys(("SCALED", "SHADOW", "RANDOM"), False)
    half = {"exp_avgs": "*bf16", "exp_avg_sqs": "*bf16"}
    for flags, types in ((plain, {}), (dict.fromkeys(plain, True), half)):
        yield adam_rows.adam_kernel, 4, {"BLOCK": 1024, **flags}, types
        for width, warps in ((1024, 4), (adam_rows.MAX_WIDTH, 8)):
            yield adam_rows.adam_unit_rows_kernel, warps, {"BLOCK": width, **flags}, types


def compile_kernel(
    kernel: Any, warps: int, constants: dict[str, Any], types: dict[str, str]
) -> Any:
    """Compile as the runtime would for aligned pointers and widths that are multiples of 16."""
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature, hints = {}, {}
    for place, name in enumerate(names):
        kind = "constexpr" if name in constants else types.get(name, TYPES.get(name, "i32"))
        signature[name] = kind
        if kind.startswith("*") or (kind == "i32" and name not in UNHINTED):
            hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel, signature, {(names.index(name),): v for name, v in constants.items()}, hints
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def binds(kernel: Any) -> bool:
    """Whether a launch hands every argument on.

    The function that Triton writes for it has variables of its own, such as `params`, which hide
    arguments of the same name: a launch on a GPU fails, yet everything here compiles.
    """
    arguments = {name: 16 * (place + 1) for place, name in enumerate(kernel.arg_names)}
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    return bool(bind(**arguments)[0] == arguments)


def registers(ptx: str) -> str:
    """What the assembler says about registers; empty where no assembler takes this PTX."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for assembler in sorted(folder.glob("ptxas*"), reverse=True):
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(ptx)
            file.flush()
            child = subprocess.run(
                [assembler, "-v", "--gpu-name=sm_90a", "-o", "/dev/null", file.name],
                capture_output=True,
                text=True,
                check=False,
            )
        if child.returncode == 0:
            spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", child.stderr))
            used = re.search(r"Used (\d+) registers", child.stderr)
            return f"{used.group(1) if used else '?'} registers, {spills} bytes spilled"
    return ""


def main() -> int:
    left = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, triton.runtime.JITFunction)
    }
    print(f"triton {triton.__version__}")
    wrong = False
    for kernel, warps, constants, types in variants():
        if not binds(kernel):
            print(f"{kernel.__name__}: an argument has the name of a variable of Triton's launcher")
            wrong = True
        compiled = compile_kernel(kernel, warps, constants, types)
        facts = registers(compiled.asm["ptx"])
        wrong |= bool(facts) and not facts.endswith(" 0 bytes spilled")
        shared = compiled.metadata.shared
        wrong |= shared > MOST_SHARED
        print(
            f"{kernel.__name__}: {warps} warps, {shared} bytes shared, {facts or 'not assembled'}"
        )
        left.discard(kernel.__name__)
    if left:
        print(f"not compiled: {', '.join(sorted(left))}")
    return 1 if left or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
