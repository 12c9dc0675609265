"""The auxiliary loss that revives dead latents (AuxK), as a part of a pass."""

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.kernels.ops import auxk
from saesteer.sae.training.architecture import CompactGradients, DeadList, Parameters
from saesteer.sae.training.mesh.across import ALONE, Across

MOST_AUX = 512
"""Most dead latents that the auxiliary loss uses for an example (Gao et al., appendix A.2)."""

# Most pre-activations of the auxiliary loss at once: 64 MiB in float32.
_AUX_ELEMENTS = 2**24


def with_auxiliary_loss(
    loss: Float[Tensor, ""],
    parameters: Parameters,
    x: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_out"],
    dead: DeadList | None,
    weight: float,
    across: Across = ALONE,
) -> tuple[Float[Tensor, ""], CompactGradients | None]:
    """`loss` plus `weight` times that of `saesteer.kernels.auxk` with k_aux = min(512, number
    dead), and the gradients of what was added; `loss` itself and None where no latent is dead.

    `error` is reconstruction minus target, held constant. `weight` is in the gradients as well.
    """
    if dead is None:
        return loss, None
    if across.latent_parts > 1:
        return _over_latents(loss, parameters, x, error, dead, weight, across)
    if not len(dead.ids):
        return loss, None
    own = _every_nth(len(x), len(dead.ids), across)
    residual = -error[own]
    extra, W_enc, b_enc, W_dec = auxk(
        x[own],
        residual,
        parameters["W_enc_rows"],
        parameters["b_enc"],
        parameters["W_dec"],
        dead.ids,
        MOST_AUX,
        dead.is_filler,
    )
    share: float | Tensor = weight
    if across.row_parts > 1:
        # The op divides by the variance of the rows that it was given.
        share = weight * _variance(residual, ALONE) / _variance(residual, across)
    gradients = CompactGradients(dead.ids, share * W_enc, share * b_enc, share * W_dec)
    return loss + share * extra, gradients


def _every_nth(rows: int, dead: int, across: Across) -> slice:
    """With many dead latents, every n-th row of the batch stands for all, which bounds the
    memory."""
    stride = max(1, -(-rows * across.row_parts * dead // _AUX_ELEMENTS))
    return slice(-across.row_part * rows % stride, None, stride)


def _variance(residual: Float[Tensor, "batch d_out"], across: Across) -> Float[Tensor, ""]:
    """sum |r - mean(r)|^2 over the rows of all processes."""
    total = residual.sum(dim=0)
    count = total.new_tensor([len(residual)])
    sums = across.rows(torch.cat([total, count]))
    mean = sums[:-1] / sums[-1].clamp_min(1)
    return across.rows((residual - mean).square().sum()).clamp_min(1e-12)


def _over_latents(
    loss: Float[Tensor, ""],
    parameters: Parameters,
    x: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_out"],
    dead: DeadList,
    weight: float,
    across: Across,
) -> tuple[Float[Tensor, ""], CompactGradients | None]:
    """The same, where other processes have other dead latents: their estimates add up."""
    wide = error.dtype
    own_dead = len(dead.ids) if dead.is_filler is None else int((~dead.is_filler).sum())
    count = int(across.latents(torch.tensor(own_dead, device=x.device)))
    if not count:
        return loss, None
    own = _every_nth(len(x), count, across)
    x, residual = x[own].to(wide), -error[own]
    W_enc, b_enc, W_dec = (
        parameters[name][dead.ids].to(wide) for name in ("W_enc_rows", "b_enc", "W_dec")
    )
    acts = torch.relu(torch.addmm(b_enc, x, W_enc.t()).nan_to_num(0.0))
    if dead.is_filler is not None:
        acts = acts.masked_fill(dead.is_filler, 0)
    if count > MOST_AUX:
        acts = torch.where(acts >= _lowest_kept(acts, across)[:, None], acts, 0)
    off = across.latents(acts @ W_dec) - residual
    variance = _variance(residual, across)
    extra = off.square().sum() / variance
    scaled = off * (2 * weight / variance)
    by_act = torch.where(acts > 0, scaled @ W_dec.t(), 0)
    made = CompactGradients(dead.ids, by_act.t() @ x, by_act.sum(dim=0), acts.t() @ scaled)
    return loss + weight * extra, made


def _lowest_kept(acts: Float[Tensor, "batch dead"], across: Across) -> Float[Tensor, " batch"]:
    """The MOST_AUX-th largest activation of each example over the latents of all processes."""
    offered = acts.new_zeros((len(acts), MOST_AUX))
    best = acts.topk(min(MOST_AUX, acts.shape[1]), dim=1).values
    offered[:, : best.shape[1]] = best
    every = torch.cat(across.of_latent_parts(offered), dim=1)
    return every.topk(MOST_AUX, dim=1).values[:, -1]
