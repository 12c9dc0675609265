"""The op layer for steering: decoder rows added to, and latents edited in, rows of activations.

Shapes, devices, dtypes and registration are as in `saesteer.kernels.ops`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.kernels.operands import check, check_matrix
from saesteer.kernels.steer_add import steer_add_inplace_op, steer_add_op
from saesteer.kernels.steer_clamp import MODES, steer_clamp_op

__all__ = ["steer_add", "steer_add_", "steer_clamp"]


def _check_steer_add(
    h: Tensor, positions: Tensor, set_ids: Tensor, latent_ids: Tensor, alphas: Tensor, W_dec: Tensor
) -> None:
    check_matrix("h", h, "tokens, d_model")
    check_matrix("W_dec", W_dec, "d_sae, d_model")
    check_matrix("latent_ids", latent_ids, "sets, latents")
    check("W_dec", W_dec, (W_dec.shape[0], h.shape[1]), "d_sae, d_model")
    check("alphas", alphas, tuple(latent_ids.shape), "sets, latents")
    if positions.dim() != 1:
        raise ValueError(f"positions must have one axis [spots], got {list(positions.shape)}")
    check("set_ids", set_ids, tuple(positions.shape), "spots")


def steer_add(
    h: Float[Tensor, "tokens d_model"],
    positions: Int[Tensor, " spots"],
    set_ids: Int[Tensor, " spots"],
    latent_ids: Int[Tensor, "sets latents"],
    alphas: Float[Tensor, "sets latents"],
    W_dec: Float[Tensor, "d_sae d_model"],
) -> Float[Tensor, "tokens d_model"]:
    """``h`` with ``sum over j of alphas[s, j] * W_dec[latent_ids[s, j]]`` added at each position.

    Position ``positions[i]`` gets set ``s = set_ids[i]``: one call serves a batch of requests with
    different latents. Sets with fewer latents are filled up with id -1. Sums are accumulated in
    float32 (float64 if an operand is); the result has the dtype of h, which is not changed.
    Differentiable in h, alphas and W_dec.

    Raises:
        ValueError: shapes disagree, or a position repeats (checked on the CPU only).
        IndexError: an index is out of range (checked on the CPU only).
    """
    _check_steer_add(h, positions, set_ids, latent_ids, alphas, W_dec)
    out: Tensor = steer_add_op(h, positions, set_ids, latent_ids, alphas, W_dec)
    return out


def steer_add_(
    h: Float[Tensor, "tokens d_model"],
    positions: Int[Tensor, " spots"],
    set_ids: Int[Tensor, " spots"],
    latent_ids: Int[Tensor, "sets latents"],
    alphas: Float[Tensor, "sets latents"],
    W_dec: Float[Tensor, "d_sae d_model"],
) -> None:
    """`steer_add` into ``h`` itself, for servers that take no gradients.

    Raises:
        ValueError: as `steer_add`, or a gradient of h is being recorded.
        IndexError: as `steer_add`.
    """
    _check_steer_add(h, positions, set_ids, latent_ids, alphas, W_dec)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (h, alphas, W_dec)):
        raise ValueError(
            "steer_add_ records no gradient: use steer_add, or call it under torch.no_grad()"
        )
    steer_add_inplace_op(h, positions, set_ids, latent_ids, alphas, W_dec)


def steer_clamp(
    h: Float[Tensor, "tokens d_model"],
    W_enc_rows: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_model"],
    latent_ids: Int[Tensor, " latents"],
    values: Float[Tensor, " latents"],
    mode: str = "clamp",
    *,
    activation: str = "relu",
    threshold: float | Float[Tensor, " d_sae"] | None = None,
    membership: str | None = None,
) -> Float[Tensor, "tokens d_model"]:
    """Give the chosen latents new activations in every row of h, and leave all else as it is.

    With a their present activation and v their value, the new one is v (mode ``clamp`` or ``set``),
    at least v (``min``), at most v (``max``), ``a * v`` (``scale``) or ``a + v`` (``add``); h moves
    by the difference times the decoder row, so what the SAE does not reconstruct is kept. Only the
    chosen rows of both matrices are read. An id given twice is edited twice, from the same a.
    Differentiable in everything but the threshold.

    Args:
        b_enc: with the decoder bias folded in where the encoder subtracts it.
        activation: ``relu``; ``jumprelu`` or ``batchtopk``, whose latents are active above
            ``threshold``; ``topk``, see membership.
        threshold: one for all, or one per latent.
        membership: which latents a TopK keeps depends on all of them, so ``topk`` is refused
            unless this is ``"threshold"``: then a latent counts as kept above ``threshold``.

    Raises:
        ValueError: shapes disagree; an unknown mode, activation or membership; a threshold that is
            missing or not used.
        IndexError: an index is outside 0..d_sae-1 (checked on the CPU only).
    """
    check_matrix("h", h, "tokens, d_model")
    check_matrix("W_dec", W_dec, "d_sae, d_model")
    d_sae = W_dec.shape[0]
    check("W_dec", W_dec, (d_sae, h.shape[1]), "d_sae, d_model")
    check("W_enc_rows", W_enc_rows, (d_sae, h.shape[1]), "d_sae, d_model")
    check("b_enc", b_enc, (d_sae,), "d_sae")
    check("values", values, tuple(latent_ids.shape), "latents")
    mode = "set" if mode == "clamp" else mode
    if mode not in MODES:
        raise ValueError(f"mode must be one of clamp, {', '.join(MODES)}, got {mode!r}")
    if activation not in ("relu", "jumprelu", "batchtopk", "topk"):
        raise ValueError(
            f"activation must be relu, jumprelu, batchtopk or topk, got {activation!r}"
        )
    if membership not in (None, "threshold"):
        raise ValueError(f"membership must be None or 'threshold', got {membership!r}")
    if activation == "topk" and membership is None:
        raise ValueError(
            "the latents that a TopK keeps depend on all of them: encode with encode_topk, or give "
            "membership='threshold' and a threshold"
        )
    if (threshold is None) != (activation == "relu"):
        found = "none was given" if threshold is None else "one was given"
        raise ValueError(f"activation {activation!r}: {found} for threshold; relu takes none")
    if isinstance(threshold, Tensor):
        check("threshold", threshold, (d_sae,), "d_sae")
        limits = threshold.detach()[latent_ids]
    else:
        limits = torch.full_like(values, threshold or 0.0, requires_grad=False)
    out: Tensor = steer_clamp_op(
        h, W_enc_rows, b_enc, W_dec, latent_ids, values, limits.detach(), mode
    )
    return out
