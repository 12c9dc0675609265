"""What aot_compile.py has to know about the fused encoder's and the steering kernels."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from saesteer.kernels import steer_add, steer_clamp, topk_encode_fused
from saesteer.kernels.topk_certificate import TILE, kept_per_tile, tile_count

MODULES = (steer_add, steer_clamp, topk_encode_fused)

TYPES = {
    "*i64": "positions set_ids set_latents latent_ids rows n_flagged",
    "*i32": "keys flags",
    "*i8": "cols",
    "*fp32": "alphas values threshold moved",
}

UNHINTED = ("batch", "n_row_tiles", "n_rows", "first", "n_slots", "n_latents")
"""Sizes that the runtime does not specialise for."""

SIZES = ((576, 16384, 32), (4096, 131072, 64))
"""The reference sizes: d_model, d_sae, k."""


def variants() -> Iterator[tuple[Any, int, dict[str, Any], dict[str, str]]]:
    """Kernel, warps, compile-time values, and the types of its matrices."""
    fused = topk_encode_fused
    for kind, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        how = {"TILE": TILE, "BLOCK_D": 128 // dtype.itemsize, "WIDEN": False}
        how |= fused.product_options(dtype)
        warps = how.pop("num_warps")
        assert how.pop("num_stages") == 3  # what the compiler takes by itself
        kept = sorted({kept_per_tile(d_sae, k) for _, d_sae, k in SIZES})
        for block_b in (128, 16) if kind == "bf16" else (128,):
            how["BLOCK_B"] = block_b
            x = f"tensordesc<{kind}[{block_b},{how['BLOCK_D']}]>"
            flat = {"x": x, "W_enc": f"tensordesc<{kind}[{TILE},{how['BLOCK_D']}]>"}
            deep = {"x": x, "W_enc": f"tensordesc<{kind}[{TILE},1,{how['BLOCK_D']}]>"}
            for n in kept if (kind, block_b) == ("bf16", 128) else kept[:1]:
                yield fused.candidates_kernel, warps, {**how, "KEPT": n, "STRIDED": False}, flat
            if block_b == 128:
                yield fused.redo_product_kernel, warps, how, flat
        if kind == "bf16":
            how["BLOCK_B"], deep["x"] = 128, f"tensordesc<{kind}[128,{how['BLOCK_D']}]>"
            yield fused.candidates_kernel, warps, {**how, "KEPT": kept[-1], "STRIDED": True}, deep
    for _, d_sae, k in SIZES:
        block = triton.next_power_of_2(tile_count(d_sae) * kept_per_tile(d_sae, k))
        merge = {"KEPT": kept_per_tile(d_sae, k), "TILE": TILE, "BLOCK": block, "BLOCK_K": k}
        for strided in (False, True):
            warps = max(4, block // 1024)
            yield fused.merge_kernel, warps, {**merge, "STRIDED": strided}, {}
        group, widest = fused.topk_encode._group_size(d_sae, k)
        select = {"GROUP": group, "BLOCK_M": 4096 // group, "BLOCK_G": k}
        select["BLOCK_N"] = triton.next_power_of_2(triton.cdiv(d_sae, group))
        yield fused.redo_select_kernel, max(4, widest // 1024), select, {}
    for matrix in ("*fp32", "*bf16"):
        block = {"BLOCK_D": 256, "BLOCK_K": 8, "ACC": tl.float32}
        yield steer_add.steer_add_kernel, 4, block, {"h": matrix, "W_dec": matrix}
        wide = {"MODE": "set", "BLOCK_M": 8, "BLOCK_D": 256, "ACC": tl.float32}
        types = {**dict.fromkeys(("h", "W_enc", "W_dec", "out"), matrix), "b_enc": "*fp32"}
        yield steer_clamp.steer_clamp_kernel, 4, wide, types
