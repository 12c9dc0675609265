"""TopK encoder whose product never leaves the chip: an opt-in beside `topk_encode`, same result.

The product is made in tiles of latents, and of each tile only a few candidates are written down;
`topk_certificate` says which, and why the k best candidates are exact in all rows but the flagged
ones. Those are redone from their dense pre-activations. The list of flagged rows stays on the
device: the kernels that redo rows are launched for every row and return at once beyond the end of
the list, so the host waits for nothing.
"""

from typing import Any, no_type_check

import torch
from torch import Tensor

from saesteer.kernels import topk_encode
from saesteer.kernels.dispatch import INTERPRETED, TRITON_INSTALLED, accumulator_dtype, use_triton
from saesteer.kernels.topk_certificate import TILE, kept_per_tile, select_certified, tile_count
from saesteer.kernels.topk_encode import topk_encode_op

REDO_BYTES = 256 * 2**20
"""Dense pre-activations of rows redone at a time, on a GPU."""

TWIN_BYTES = 64 * 2**20
"""The same of all rows, in the PyTorch twin."""


def encode_topk_fused_torch(
    x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int, kept: int, strided: bool
) -> tuple[Tensor, Tensor]:
    """PyTorch twin: candidates, certificate and repair, on dense pre-activations of a few rows."""
    batch, d_sae = x.shape[0], W_enc_rows.shape[0]
    dtype = accumulator_dtype(x, W_enc_rows)
    acts = x.new_empty((batch, k), dtype=dtype)
    indices = x.new_empty((batch, k), dtype=torch.int64)
    W_enc, bias = W_enc_rows.to(dtype).t(), b_enc.to(dtype)
    rows = max(1, TWIN_BYTES // (tile_count(d_sae) * TILE * dtype.itemsize))
    for first in range(0, batch, rows):
        part = slice(first, first + rows)
        pre_acts = torch.addmm(bias, x[part].to(dtype), W_enc)
        values, chosen, flagged = select_certified(pre_acts, k, kept, strided)
        acts[part], indices[part] = values.clamp(min=0), chosen
        redo = first + flagged.nonzero()[:, 0]
        if redo.numel():
            acts[redo], indices[redo] = topk_encode_op(x[redo], W_enc_rows, b_enc, k)
    return acts, indices


if TRITON_INSTALLED:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    from saesteer.kernels.topk_encode import _first_k, _ranked

    @triton.jit
    @no_type_check
    def _place(n_row_tiles, n_tiles):
        """Tile of rows and tile of latents of a program: eight row tiles share the weights they
        read, so that both operands come from the cache."""
        at = tl.program_id(0)
        first = at // (8 * n_tiles) * 8
        high = tl.minimum(n_row_tiles - first, 8)
        inside = at % (8 * n_tiles)
        return first + inside % high, inside // high

    @triton.jit
    @no_type_check
    def _product(
        x,
        W_enc,
        row,
        tile,
        d_model,
        BLOCK_B: tl.constexpr,
        TILE: tl.constexpr,
        BLOCK_D: tl.constexpr,
        STRIDED: tl.constexpr,
        WIDEN: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """BLOCK_B rows times the latents of one tile, in float32."""
        acc = tl.zeros([BLOCK_B, TILE], tl.float32)
        for at in range(0, d_model, BLOCK_D):
            left = x.load([row, at])
            if STRIDED:
                right = tl.reshape(W_enc.load([0, tile, at]), [TILE, BLOCK_D])
            else:
                right = W_enc.load([tile * TILE, at])
            if WIDEN:  # the interpreter multiplies bfloat16 wrongly
                left, right = left.to(tl.float32), right.to(tl.float32)
            acc = tl.dot(left, right.T, acc, input_precision=PRECISION)
        return acc

    @triton.jit(do_not_specialize=["batch", "n_row_tiles"])
    @no_type_check
    def candidates_kernel(
        x,
        W_enc,
        b_enc,
        keys,
        cols,
        batch,
        n_row_tiles,
        n_tiles,
        d_model,
        d_sae,
        KEPT: tl.constexpr,
        BLOCK_B: tl.constexpr,
        TILE: tl.constexpr,
        BLOCK_D: tl.constexpr,
        STRIDED: tl.constexpr,
        WIDEN: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """The KEPT best of one tile of latents, for BLOCK_B rows: keys and columns in the tile."""
        row_tile, tile = _place(n_row_tiles, n_tiles)
        first = row_tile * BLOCK_B
        acc = _product(
            x, W_enc, first, tile, d_model, BLOCK_B, TILE, BLOCK_D, STRIDED, WIDEN, PRECISION
        )
        col = tl.arange(0, TILE)
        latent = col * n_tiles + tile if STRIDED else tile * TILE + col
        ok = latent < d_sae
        acc += tl.load(b_enc + latent, mask=ok, other=0.0)[None, :]
        _, key = _ranked(acc, tl.int32, 2147483647)
        # No float has this key, so a column without a latent is never selected.
        key = tl.where(ok[None, :], key, -2147483648)
        row = first + tl.arange(0, BLOCK_B)
        at = (row.to(tl.int64) * n_tiles + tile) * KEPT
        for nth in range(KEPT):
            best = tl.max(key, axis=1)
            # Of equals the first column.
            where = tl.min(tl.where(key == best[:, None], col[None, :], TILE - 1), axis=1)
            tl.store(keys + at + nth, best, mask=row < batch)
            tl.store(cols + at + nth, where.to(tl.int8), mask=row < batch)
            key = tl.where(col[None, :] == where[:, None], -2147483648, key)

    @triton.jit
    @no_type_check
    def _kth_largest(keys, k):
        """The largest threshold that k keys reach, found bit by bit."""
        reached = tl.sum((keys >= 0).to(tl.int32), axis=0) >= k
        kth = tl.where(reached, 0, -2147483648)
        for step in range(31):
            higher = kth + (1 << (30 - step))
            kth = tl.where(tl.sum((keys >= higher).to(tl.int32), axis=0) >= k, higher, kth)
        return kth

    @triton.jit
    @no_type_check
    def merge_kernel(
        keys,
        cols,
        acts,
        indices,
        flags,
        d_sae,
        n_tiles,
        k,
        KEPT: tl.constexpr,
        TILE: tl.constexpr,
        STRIDED: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        """The k best candidates of one row, by ascending latent, and the certificate."""
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        ok = at < n_tiles * KEPT
        key = tl.load(keys + row * n_tiles * KEPT + at, mask=ok, other=-2147483648)
        col = tl.load(cols + row * n_tiles * KEPT + at, mask=ok, other=0).to(tl.int32)
        tile = at // KEPT
        if STRIDED:
            latent = col * n_tiles + tile
            width = (d_sae - tile + n_tiles - 1) // n_tiles
        else:
            latent = tile * TILE + col
            width = tl.minimum(d_sae - tile * TILE, TILE)
        kth = _kth_largest(key, k)
        room = k - tl.sum((key > kth).to(tl.int32), axis=0)
        # Of the candidates equal to the k-th, the ones with the lowest latents.
        early = tl.where(key == kth, 2147483647 - latent, -2147483648)
        chosen = (key > kth) | (early >= _kth_largest(early, room))
        risky = chosen & (at % KEPT == KEPT - 1) & (width > KEPT)
        tl.store(flags + row, tl.max(risky.to(tl.int32), axis=0))

        # Sorted by latent in the place of the result, each latent with the bits of its value.
        bits = tl.where(key < 0, key ^ 2147483647, key)
        pair = (latent.to(tl.int64) << 32) | (bits.to(tl.int64) & 4294967295)
        place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(indices + row * k + place, pair, mask=chosen)
        tl.debug_barrier()
        slot = tl.arange(0, BLOCK_K)
        pair = tl.load(indices + row * k + slot, mask=slot < k, other=9223372036854775807)
        tl.debug_barrier()
        pair = tl.sort(pair)
        value = pair.to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(acts + row * k + slot, tl.where(value > 0, value, 0.0), mask=slot < k)
        tl.store(indices + row * k + slot, pair >> 32, mask=slot < k)

    @triton.jit(do_not_specialize=["first", "n_rows", "n_row_tiles"])
    @no_type_check
    def redo_product_kernel(
        x,
        W_enc,
        b_enc,
        n_flagged,
        pre_acts,
        first,
        n_rows,
        n_row_tiles,
        n_tiles,
        d_model,
        d_sae,
        BLOCK_B: tl.constexpr,
        TILE: tl.constexpr,
        BLOCK_D: tl.constexpr,
        WIDEN: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Dense pre-activations of flagged rows ``first`` and on; ``x`` holds those rows."""
        row_tile, tile = _place(n_row_tiles, n_tiles)
        if first + row_tile * BLOCK_B >= tl.load(n_flagged):
            return
        acc = _product(
            x,
            W_enc,
            row_tile * BLOCK_B,
            tile,
            d_model,
            BLOCK_B,
            TILE,
            BLOCK_D,
            False,
            WIDEN,
            PRECISION,
        )
        latent = tile * TILE + tl.arange(0, TILE)
        ok = latent < d_sae
        acc += tl.load(b_enc + latent, mask=ok, other=0.0)[None, :]
        row = row_tile * BLOCK_B + tl.arange(0, BLOCK_B)
        at = row.to(tl.int64)[:, None] * d_sae + latent[None, :]
        tl.store(pre_acts + at, acc, mask=(row < n_rows)[:, None] & ok[None, :])

    @triton.jit(do_not_specialize=["first"])
    @no_type_check
    def redo_select_kernel(
        pre_acts,
        group_keys,
        group_ids,
        rows,
        n_flagged,
        acts,
        indices,
        first,
        d_sae,
        n_groups,
        n_chosen,
        k,
        GROUP: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_G: tl.constexpr,
    ):
        """The first k of one flagged row, as the kernels of `topk_encode` find them: the best
        entry of each group, the k best groups, the k best entries in them."""
        nth = tl.program_id(0).to(tl.int64)
        if first + nth >= tl.load(n_flagged):
            return
        row = tl.load(rows + nth)
        pre_acts += nth * d_sae
        group_keys += nth * n_groups
        group_ids += nth * n_chosen
        for start in range(0, n_groups, BLOCK_M):
            group = start + tl.arange(0, BLOCK_M)
            col = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            ok = col < d_sae
            _, key = _ranked(tl.load(pre_acts + col, mask=ok, other=0.0), tl.int32, 2147483647)
            key = tl.max(tl.where(ok, key, -2147483648), axis=1)
            tl.store(group_keys + group, key, mask=group < n_groups)
        tl.debug_barrier()
        group = tl.arange(0, BLOCK_N)
        key = tl.load(group_keys + group, mask=group < n_groups, other=-2147483648)
        chosen, place = _first_k(key, n_chosen, tl.int32, 2147483647, 32)
        tl.store(group_ids + place, group, mask=chosen)
        tl.debug_barrier()
        slot = tl.arange(0, BLOCK_G)
        group = tl.load(group_ids + slot, mask=slot < n_chosen, other=0)
        col = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        ok = (col < d_sae) & (slot < n_chosen)[:, None]
        value, key = _ranked(tl.load(pre_acts + col, mask=ok, other=0.0), tl.int32, 2147483647)
        key = tl.reshape(tl.where(ok, key, -2147483648), [BLOCK_G * GROUP])
        chosen, place = _first_k(key, k, tl.int32, 2147483647, 32)
        value = tl.reshape(tl.where(value > 0, value, 0.0), [BLOCK_G * GROUP])
        tl.store(acts + row * k + place, value, mask=chosen)
        col = tl.reshape(col, [BLOCK_G * GROUP])
        tl.store(indices + row * k + place, col.to(tl.int64), mask=chosen)


def _aligned(matrix: Tensor) -> Tensor:
    """``matrix`` itself where the tensor memory accelerator can read it: addresses of rows that are
    multiples of 16 bytes, last axis dense. Else a copy with wider rows."""
    size = matrix.element_size()
    if (
        matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.stride(0) * size % 16 == 0
        and matrix.data_ptr() % 16 == 0
    ):
        return matrix
    width = -(-matrix.shape[1] * size // 16) * 16 // size
    wide = matrix.new_empty((matrix.shape[0], width))[:, : matrix.shape[1]]
    return wide.copy_(matrix)


def _strided_rows(W_enc: Tensor) -> Tensor:
    """View [TILE, n_tiles, d_model] whose [:, t] are the latents of tile t, for aligned rows.

    A copy with rows of zeros at the end where d_sae is no multiple of TILE.
    """
    d_sae, d_model = W_enc.shape
    n_tiles = tile_count(d_sae)
    if d_sae != n_tiles * TILE:
        padded = W_enc.new_zeros((n_tiles * TILE, d_model + -d_model % (16 // W_enc.itemsize)))
        padded[:d_sae, :d_model] = W_enc
        W_enc = padded[:, :d_model]
    stride = W_enc.stride(0)
    return W_enc.as_strided(
        (TILE, n_tiles, d_model), (n_tiles * stride, stride, 1), W_enc.storage_offset()
    )


def row_block(batch: int) -> int:
    """Rows per tile: 128, or what a smaller batch fills (a product of 16 rows is the smallest)."""
    return 128 if batch > 64 else 64 if batch > 16 else 16


def encode_topk_fused_triton(
    x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int, kept: int, strided: bool
) -> tuple[Tensor, Tensor]:
    """Triton kernels, in float32, bfloat16 or float16."""
    batch, (d_sae, d_model) = x.shape[0], W_enc_rows.shape
    acts = x.new_empty((batch, k), dtype=torch.float32)
    indices = x.new_empty((batch, k), dtype=torch.int64)
    if batch == 0:
        return acts, indices
    if x.dtype != W_enc_rows.dtype:
        x, W_enc_rows = x.float(), W_enc_rows.float()
    x, W_enc, bias = _aligned(x), _aligned(W_enc_rows), b_enc.float().contiguous()
    n_tiles, block_b = tile_count(d_sae), row_block(batch)
    block_d = 128 // x.element_size()  # 128 bytes: the widest pattern of shared memory
    how = {
        "BLOCK_B": block_b,
        "TILE": TILE,
        "BLOCK_D": block_d,
        "WIDEN": INTERPRETED and x.dtype == torch.bfloat16,
        **product_options(x.dtype),
    }
    latents = TensorDescriptor.from_tensor(W_enc, [TILE, block_d])
    if strided:
        view = _strided_rows(W_enc)
        tiles = TensorDescriptor.from_tensor(view, [TILE, 1, block_d])
    else:
        tiles = latents
    keys = x.new_empty((batch, n_tiles * kept), dtype=torch.int32)
    cols = x.new_empty((batch, n_tiles * kept), dtype=torch.int8)
    flags = x.new_empty((batch,), dtype=torch.int32)
    n_row_tiles = triton.cdiv(batch, block_b)
    candidates_kernel[(n_row_tiles * n_tiles,)](
        TensorDescriptor.from_tensor(x, [block_b, block_d]),
        tiles,
        bias,
        keys,
        cols,
        batch,
        n_row_tiles,
        n_tiles,
        d_model,
        d_sae,
        KEPT=kept,
        STRIDED=strided,
        **how,
    )
    block = triton.next_power_of_2(n_tiles * kept)
    merge_kernel[(batch,)](
        keys,
        cols,
        acts,
        indices,
        flags,
        d_sae,
        n_tiles,
        k,
        KEPT=kept,
        TILE=TILE,
        STRIDED=strided,
        BLOCK=block,
        BLOCK_K=triton.next_power_of_2(k),
        num_warps=max(4, block // 1024),
    )
    del keys, cols
    _redo(x, latents, bias, k, flags, acts, indices, how)
    return acts, indices


def product_options(dtype: torch.dtype) -> dict[str, Any]:
    """Precision, warps and pipeline stages of the product, chosen so that no register is spilled.

    Without torch's leave to use TensorFloat-32, float32 is multiplied as three products of it: as
    exact as float32 within a few units in the last place, and faster than without tensor cores.
    """
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return {"PRECISION": "tf32x3", "num_warps": 8, "num_stages": 3}
    precision = "tf32" if dtype == torch.float32 else "ieee"
    return {"PRECISION": precision, "num_warps": 4, "num_stages": 3}


def _redo(
    x: Tensor,
    latents: Any,
    bias: Tensor,
    k: int,
    flags: Tensor,
    acts: Tensor,
    indices: Tensor,
    how: dict[str, Any],
) -> None:
    """Overwrite ``acts`` and ``indices`` of the rows with a flag by their exact selection."""
    (batch, d_model), d_sae = x.shape, bias.shape[0]
    counts = flags.cumsum(0)
    rows = counts.new_zeros((batch + 1,))  # row 0 beyond the flagged ones: valid, never used
    rows.scatter_(
        0, torch.where(flags > 0, counts - 1, batch), torch.arange(batch, device=x.device)
    )
    n_flagged = counts[-1:]
    block_b = how["BLOCK_B"]
    most = max(block_b, REDO_BYTES // (4 * d_sae) // block_b * block_b)
    n_rows = min(batch, most)
    group, _ = topk_encode._group_size(d_sae, k)
    n_groups = triton.cdiv(d_sae, group)
    n_chosen = min(k, n_groups)
    pre_acts = x.new_empty((n_rows, d_sae), dtype=torch.float32)
    group_keys = flags.new_empty((n_rows, n_groups))
    group_ids = flags.new_empty((n_rows, n_chosen))
    block_n, block_g = triton.next_power_of_2(n_groups), triton.next_power_of_2(n_chosen)
    for first in range(0, batch, n_rows):
        part = rows[first : min(first + n_rows, batch)]
        row_tiles = triton.cdiv(part.numel(), block_b)
        redo_product_kernel[(row_tiles * tile_count(d_sae),)](
            TensorDescriptor.from_tensor(
                _aligned(x.index_select(0, part)), [block_b, how["BLOCK_D"]]
            ),
            latents,
            bias,
            n_flagged,
            pre_acts,
            first,
            part.numel(),
            row_tiles,
            tile_count(d_sae),
            d_model,
            d_sae,
            **how,
        )
        redo_select_kernel[(part.numel(),)](
            pre_acts,
            group_keys,
            group_ids,
            part,
            n_flagged,
            acts,
            indices,
            first,
            d_sae,
            n_groups,
            n_chosen,
            k,
            GROUP=group,
            BLOCK_M=min(block_n, max(1, 4096 // group)),
            BLOCK_N=block_n,
            BLOCK_G=block_g,
            num_warps=max(4, max(block_n, block_g * group) // 1024),
        )


@torch.library.custom_op("saesteer::encode_topk_fused", mutates_args=())
def encode_topk_fused_op(
    x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int, strided: bool
) -> tuple[Tensor, Tensor]:
    """Latent activations [batch, k] in the accumulator dtype, and indices [batch, k] int64."""
    d_sae, d_model = W_enc_rows.shape
    kept = kept_per_tile(d_sae, k)
    on_triton = use_triton(x)
    double = accumulator_dtype(x, W_enc_rows) == torch.float64
    if kept is None or d_model == 0 or (on_triton and double):
        acts, indices = topk_encode_op(x, W_enc_rows, b_enc, k)
        return acts, indices
    if on_triton and topk_encode._group_size(d_sae, k)[1] <= topk_encode.MAX_CANDIDATES:
        with torch.cuda.device_of(x):  # Triton launches on the current device
            return encode_topk_fused_triton(x, W_enc_rows, b_enc, k, kept, strided)
    return encode_topk_fused_torch(x, W_enc_rows, b_enc, k, kept, strided)


@encode_topk_fused_op.register_fake
def _(
    x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int | torch.SymInt, strided: bool
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    acts = x.new_empty(shape, dtype=accumulator_dtype(x, W_enc_rows))
    return acts, x.new_empty(shape, dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    topk_encode._setup_context(ctx, inputs[:4], output)


def _backward(ctx: Any, grad_acts: Tensor, grad_indices: Any) -> tuple[Any, ...]:
    return (*topk_encode._backward(ctx, grad_acts, grad_indices), None)


encode_topk_fused_op.register_autograd(_backward, setup_context=_setup_context)
