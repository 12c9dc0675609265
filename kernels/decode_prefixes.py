"""Decode nested prefixes of the latents, compare each with the target, and take the gradients.

The entries of an example come in pieces, one for each of ``levels`` prefixes: piece g holds the
latents that belong to prefix g and not to the one before. With ``x^_g = b_dec +`` what pieces 0..g
add up to,

``squared_error[b, g] = |x^_g - target[b]|^2``
``suffix_errors[b, g] = sum over j >= g of (x^_j - target[b])``
``act_grads[i] = <suffix_errors[b, g], W_dec[latent_indices[i]]>`` for entry i of piece g.

Twice the last two are the derivatives of the sum of all squared errors by what piece g adds and by
the activations. An example's rows are read once and are still in the cache for their second use, as
in `decode_mse`, which this is with one level.
"""

import torch
from torch import Tensor

from saesteer.kernels.derivatives import gather_dot_op, sparse_decode_op
from saesteer.kernels.dispatch import accumulator_dtype
from saesteer.kernels.entries import check_entries, to_dense
from saesteer.kernels.native import even_bounds, parts_of, run_parts, use_native

Decoded = tuple[Tensor, Tensor, Tensor, Tensor]


def decode_prefixes_reference(
    latent_acts: Tensor, latent_indices: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor,
    piece_starts: Tensor, levels: int,
) -> Decoded:  # fmt: skip
    """What the op means, in dense PyTorch. For tests and benchmarks."""
    pieces = to_dense(latent_acts, latent_indices, W_dec.shape[0], piece_starts) @ W_dec
    errors = pieces.view(-1, levels, W_dec.shape[1]).cumsum(1) + (b_dec - target)[:, None]
    suffix = errors.flip(1).cumsum(1).flip(1)
    grads = gather_dot_op(suffix.flatten(0, 1), W_dec, latent_indices, piece_starts)
    return errors.square().sum(2), errors[:, -1].clone(), suffix, grads


def decode_prefixes_torch(
    latent_acts: Tensor, latent_indices: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor,
    piece_starts: Tensor, levels: int,
) -> Decoded:  # fmt: skip
    """PyTorch twin, and what runs on a GPU."""
    dtype = accumulator_dtype(latent_acts, W_dec, target)
    added = sparse_decode_op(latent_acts.to(dtype), latent_indices, W_dec, None, piece_starts)
    errors = added.view(-1, levels, W_dec.shape[1])
    errors[:, 0] += b_dec.to(dtype) - target.to(dtype)
    for level in range(1, levels):
        errors[:, level] += errors[:, level - 1]
    squared, last = errors.square().sum(2), errors[:, -1].clone()
    for level in range(levels - 2, -1, -1):
        errors[:, level] += errors[:, level + 1]
    act_grads = gather_dot_op(errors.flatten(0, 1), W_dec, latent_indices, piece_starts)
    return squared, last, errors, act_grads


def decode_prefixes_native(
    latent_acts: Tensor, latent_indices: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor,
    piece_starts: Tensor, levels: int,
) -> Decoded:  # fmt: skip
    """Compiled CPU loop, for float32."""
    from saesteer.kernels.decode_prefixes_cpu import decode_prefixes_rows

    batch, d_model = target.shape
    squared = target.new_empty((batch, levels))
    last = target.new_empty((batch, d_model))
    suffix = target.new_empty((batch, levels, d_model))
    act_grads = target.new_empty(latent_indices.shape)
    run_parts(
        decode_prefixes_rows, even_bounds(batch, parts_of(batch, 8)),
        latent_acts.contiguous().numpy(), latent_indices.to(torch.int64).contiguous().numpy(),
        piece_starts.contiguous().numpy(),
        *(t.contiguous().numpy() for t in (W_dec, b_dec, target)),
        squared.numpy(), last.numpy(), suffix.numpy(), act_grads.numpy(),
    )  # fmt: skip
    return squared, last, suffix, act_grads


@torch.library.custom_op("saesteer::decode_prefixes", mutates_args=())
def decode_prefixes_op(
    latent_acts: Tensor,
    latent_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    piece_starts: Tensor,
    levels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared errors [batch, levels], the last error [batch, d_model], suffix sums [batch, levels,
    d_model] and entry gradients [entries]. Not differentiable: it gives gradients."""
    check_entries(latent_indices, W_dec.shape[0], piece_starts)
    native = use_native(latent_acts, W_dec, b_dec, target)
    run = decode_prefixes_native if native else decode_prefixes_torch
    return run(latent_acts, latent_indices, W_dec, b_dec, target, piece_starts, levels)


@decode_prefixes_op.register_fake
def _(
    latent_acts: Tensor,
    latent_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    piece_starts: Tensor,
    levels: int,
) -> Decoded:
    dtype = accumulator_dtype(latent_acts, W_dec, target)
    batch, d_model = target.shape
    return (
        target.new_empty((batch, levels), dtype=dtype),
        target.new_empty((batch, d_model), dtype=dtype),
        target.new_empty((batch, levels, d_model), dtype=dtype),
        target.new_empty(latent_indices.shape, dtype=dtype),
    )
