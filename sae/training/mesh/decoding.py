"""Reconstructions that several processes add up, each from its own latents."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.kernels.ops import decode_mse, decode_prefixes, gather_dot, sparse_decode
from saesteer.sae.training.mesh.across import Across


def decode(
    acts: Tensor,
    indices: Tensor,
    W_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"],
    target: Float[Tensor, "batch d_out"],
    row_starts: Int[Tensor, " starts"] | None,
    across: Across,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch d_out"], Tensor]:
    """`decode_mse`: squared errors, errors, and <error, decoder row> of each entry."""
    if across.latent_parts == 1:
        return decode_mse(acts, indices, W_dec, b_dec, target, row_starts)
    own = sparse_decode(acts, indices, W_dec, None, row_starts)
    error = across.latents(own) + b_dec - target
    return error.square().sum(dim=1), error, gather_dot(error, W_dec, indices, row_starts)


def decode_levels(
    acts: Float[Tensor, " entries"],
    indices: Int[Tensor, " entries"],
    W_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"],
    target: Float[Tensor, "batch d_out"],
    pieces: Int[Tensor, " starts"],
    levels: int,
    across: Across,
) -> tuple[
    Float[Tensor, "batch levels"],
    Float[Tensor, "batch d_out"],
    Float[Tensor, "batch levels d_out"],
    Float[Tensor, " entries"],
]:
    """`decode_prefixes`: squared errors of each prefix, errors of the last, sums of the errors of a
    prefix and of those after it, and <that sum, decoder row> of each entry."""
    if across.latent_parts == 1:
        return decode_prefixes(acts, indices, W_dec, b_dec, target, pieces, levels)
    own = sparse_decode(acts, indices, W_dec, None, pieces).unflatten(0, (-1, levels))
    errors = across.latents(own).cumsum(dim=1) + (b_dec - target)[:, None]
    suffix = from_the_end(errors)
    act_grads = gather_dot(suffix.flatten(0, 1), W_dec, indices, pieces)
    return errors.square().sum(dim=2), errors[:, -1].contiguous(), suffix, act_grads


def from_the_end(errors: Float[Tensor, "batch levels d_out"]) -> Float[Tensor, "..."]:
    """Sums over a level and those after it."""
    return torch.flip(torch.flip(errors, (1,)).cumsum(dim=1), (1,)).contiguous()
