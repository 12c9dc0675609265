"""Decode from the few active latents: a weighted sum of k decoder rows per example.

``out[b] = b_dec + sum over i of latent_acts[b, i] * W_dec[latent_indices[b, i]]``

Costs 2 * batch * k * d_model operations where the dense product costs 2 * batch * d_sae * d_model.
"""

from typing import no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor

from saesteer.kernels.dispatch import (
    TRITON_INSTALLED,
    Tile,
    accumulator_dtype,
    unit_stride,
    use_triton,
)
from saesteer.kernels.entries import batch_of, check_entries, to_dense

TILES = (Tile(8, 256, 1), Tile(16, 512, 1), Tile(16, 1024, 2), Tile(8, 512, 1, stages=3))
"""The first, the fastest on an H100, is used; `benchmarks/kernel_tiles.py` times all of them."""


def sparse_decode_reference(
    latent_acts: Tensor,
    latent_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    row_starts: Tensor | None = None,
) -> Tensor:
    """The op's definition in dense, differentiable PyTorch, for tests and benchmarks."""
    return to_dense(latent_acts, latent_indices, W_dec.shape[0], row_starts) @ W_dec + b_dec


def _result_dtype(latent_acts: Tensor, W_dec: Tensor) -> torch.dtype:
    return torch.promote_types(latent_acts.dtype, W_dec.dtype)


def sparse_decode_torch(
    latent_acts: Tensor,
    latent_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    row_starts: Tensor | None = None,
) -> Tensor:
    """PyTorch twin."""
    acc = accumulator_dtype(latent_acts, W_dec)
    if row_starts is not None:
        latent_indices = latent_indices.to(row_starts.dtype)
    out = F.embedding_bag(
        latent_indices.contiguous(),
        W_dec.to(acc).contiguous(),
        row_starts,
        mode="sum",
        per_sample_weights=latent_acts.to(acc).contiguous(),
        include_last_offset=row_starts is not None,
    )
    if b_dec is not None:
        out += b_dec
    return out.to(_result_dtype(latent_acts, W_dec))


if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["k"])
    @no_type_check
    def sparse_decode_kernel(
        latent_acts,
        latent_indices,
        row_starts,
        W_dec,
        b_dec,
        out,
        k,
        d_model,
        stride_W_dec,
        RAGGED: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_D: tl.constexpr,
        STAGES: tl.constexpr,
        ACC: tl.constexpr,
    ):
        """BLOCK_D columns of one example. ROWS row loads are in flight at a time."""
        example = tl.program_id(0).to(tl.int64)
        if RAGGED:
            begin = tl.load(row_starts + example)
            end = tl.load(row_starts + example + 1)
        else:
            begin = example * k
            end = begin + k
        col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        col_ok = col < d_model
        acc = tl.zeros([BLOCK_D], ACC)
        for first in tl.range(begin, end, ROWS, num_stages=STAGES):
            at = first + tl.arange(0, ROWS)
            ok = at < end
            act = tl.load(latent_acts + at, mask=ok, other=0.0).to(ACC)
            row = tl.load(latent_indices + at, mask=ok, other=0).to(tl.int64)
            tile = tl.load(
                W_dec + row[:, None] * stride_W_dec + col[None, :],
                mask=ok[:, None] & col_ok[None, :],
                other=0.0,
            ).to(ACC)
            acc += tl.sum(act[:, None] * tile, axis=0)
        if HAS_BIAS:
            acc += tl.load(b_dec + col, mask=col_ok, other=0.0).to(ACC)
        tl.store(out + example * d_model + col, acc, mask=col_ok)


def sparse_decode_triton(
    latent_acts: Tensor,
    latent_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    row_starts: Tensor | None = None,
) -> Tensor:
    """Triton kernel."""
    batch, d_model = batch_of(latent_indices, row_starts), W_dec.shape[1]
    dtype = accumulator_dtype(latent_acts, W_dec)
    W_dec = unit_stride(W_dec)
    out = W_dec.new_empty((batch, d_model), dtype=_result_dtype(latent_acts, W_dec))
    if out.numel() == 0:
        return out
    tile = TILES[0]
    block_d, warps = tile.fit(d_model, W_dec.element_size())
    latent_indices = latent_indices.contiguous()
    sparse_decode_kernel[(batch, triton.cdiv(d_model, block_d))](
        latent_acts.contiguous(),
        latent_indices,
        latent_indices if row_starts is None else row_starts.contiguous(),
        W_dec,
        W_dec if b_dec is None else b_dec.contiguous(),
        out,
        latent_indices.shape[-1],
        d_model,
        W_dec.stride(0),
        RAGGED=row_starts is not None,
        HAS_BIAS=b_dec is not None,
        ROWS=tile.rows,
        BLOCK_D=block_d,
        STAGES=tile.stages,
        ACC=tl.float64 if dtype == torch.float64 else tl.float32,
        num_warps=warps,
    )
    return out


@torch.library.custom_op("saesteer::sparse_decode", mutates_args=())
def sparse_decode_op(
    latent_acts: Tensor,
    latent_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    row_starts: Tensor | None = None,
) -> Tensor:
    """Decoded [batch, d_model], in the promoted dtype of ``latent_acts`` and ``W_dec``."""
    check_entries(latent_indices, W_dec.shape[0], row_starts)
    run = sparse_decode_triton if use_triton(W_dec) else sparse_decode_torch
    with torch.cuda.device_of(W_dec):  # Triton launches on the current device
        return run(latent_acts, latent_indices, W_dec, b_dec, row_starts)


@sparse_decode_op.register_fake
def _(
    latent_acts: Tensor,
    latent_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    row_starts: Tensor | None = None,
) -> Tensor:
    shape = (batch_of(latent_indices, row_starts), W_dec.shape[1])
    return W_dec.new_empty(shape, dtype=_result_dtype(latent_acts, W_dec))
