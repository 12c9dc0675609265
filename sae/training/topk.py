"""The TopK sparse autoencoder: its parameters, its loss, and the form in which it is shared.

Legend of dimensions: B batch, D d_model, F d_sae. Both matrices are kept latent-major, `[F, D]`.
Training sees x~ = a (x - mu), with mu the mean activation and a = sqrt(D) / mean ||x - mu||, both
measured once at the start: centred data keeps latents alive, and unit scale lets one learning rate
serve every layer of every model. `canonical` folds both away again.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saesteer.checkpoints.folds import fold_centred_scale
from saesteer.kernels.ops import (
    LatentOrder,
    auxk,
    decode_mse,
    encode_topk,
    sort_indices,
    sparse_pair_grads,
)

MOST_AUX = 512
"""Most dead latents that the auxiliary loss uses for an example (Gao et al., appendix A.2)."""

# Pre-activations of the auxiliary loss: at most so many at once (64 MiB).
_AUX_ELEMENTS = 2**24


@dataclass(frozen=True)
class InputScale:
    """mu `[D]` and a, in float64: x~ = a (x - mu)."""

    mean: Float[Tensor, " d_model"]
    factor: float

    @staticmethod
    def of(rows: Float[Tensor, "rows d_model"]) -> "InputScale":
        """Measure a sample of activations."""
        wide = rows.double()
        mean = wide.mean(dim=0)
        length = (wide - mean).norm(dim=-1).mean().clamp_min(1e-12)
        return InputScale(mean, float(rows.shape[1] ** 0.5 / length))

    def apply(self, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_model"]:
        """x~ in float32."""
        return torch.sub(x.float(), self.mean.to(x.device, torch.float32)).mul_(self.factor)


@dataclass
class TopKParameters:
    """What the optimiser moves, in the units of x~."""

    W_enc_rows: Float[Tensor, "d_sae d_model"]
    W_dec: Float[Tensor, "d_sae d_model"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_model"]

    def named(self) -> dict[str, Tensor]:
        return dict(vars(self))


def initialise(d_model: int, d_sae: int, seed: int, device: torch.device) -> TopKParameters:
    """Random unit decoder rows, the encoder tied to them, zero biases (Gao et al., appendix A.1).

    The data's mean is subtracted before the encoder, so zero is the data-driven b_dec here.
    """
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(d_sae, d_model, generator=rng)
    rows /= rows.norm(dim=1, keepdim=True)
    rows = rows.to(device)
    return TopKParameters(
        W_enc_rows=rows.clone(),
        W_dec=rows.clone(),
        b_enc=torch.zeros(d_sae, device=device),
        b_dec=torch.zeros(d_model, device=device),
    )


@dataclass
class AuxGradients:
    """Gradients of the auxiliary loss, of the latents `ids` only; its weight is in them."""

    ids: Int[Tensor, " dead"]
    W_enc_rows: Float[Tensor, "dead d_model"]
    b_enc: Float[Tensor, " dead"]
    W_dec: Float[Tensor, "dead d_model"]


@dataclass
class TopKPass:
    """One batch through the SAE: its loss, and what the gradients are made of.

    FVU is squared_error / squared_deviation. With g = factor * error the gradients are
    W_dec[f] = sum latent_acts g, W_enc[f] = factor * sum pre_grads x, b_enc[f] = factor * sum
    pre_grads over the slots of latent f, and b_dec = sum g; see `gradients`.
    """

    total: Float[Tensor, ""]
    squared_error: Float[Tensor, ""]
    squared_deviation: Float[Tensor, ""]
    x: Float[Tensor, "batch d_model"]
    latent_acts: Float[Tensor, "batch k"]
    latent_indices: Int[Tensor, "batch k"]
    error: Float[Tensor, "batch d_model"]
    pre_grads: Float[Tensor, "batch k"]
    factor: float
    order: LatentOrder
    aux: AuxGradients | None


@torch.no_grad()
def topk_pass(
    parameters: TopKParameters,
    x: Float[Tensor, "batch d_model"],
    k: int,
    *,
    dead_ids: Int[Tensor, " dead"] | None = None,
    alive: Bool[Tensor, " dead"] | None = None,
    auxk: float = 0.0,
) -> TopKPass:
    """Reconstruct x~, measure the error, add the auxiliary loss of the dead latents.

    L = mean |x~ - x^|^2 / D + auxk * AuxK(e), where e = x~ - x^ is held constant and AuxK is the
    loss of `saesteer.kernels.auxk` with k_aux = min(512, number dead). `alive` marks entries of
    `dead_ids` that only fill the list.
    """
    acts, indices = encode_topk(x, parameters.W_enc_rows, parameters.b_enc, k)
    squared, error, act_grads = decode_mse(acts, indices, parameters.W_dec, parameters.b_dec, x)
    squared_error = squared.sum()
    total = squared_error / x.numel()
    aux = None
    if auxk and dead_ids is not None and len(dead_ids):
        aux_loss, aux = _auxk(parameters, x, error, dead_ids, alive, auxk)
        total = total + auxk * aux_loss
    return TopKPass(
        total=total,
        squared_error=squared_error,
        squared_deviation=_squared_deviation(x),
        x=x,
        latent_acts=acts,
        latent_indices=indices,
        error=error,
        # The activation of an empty slot does not depend on anything.
        pre_grads=torch.where(acts > 0, act_grads, 0),
        factor=2 / max(1, x.numel()),
        order=sort_indices(indices, len(parameters.W_enc_rows)),
        aux=aux,
    )


def _squared_deviation(x: Float[Tensor, "batch d_model"]) -> Float[Tensor, ""]:
    """sum |x - mean(x)|^2, as sum |x|^2 - |sum x|^2 / B: x~ is centred, so little cancels."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    squares: Tensor = torch.linalg.vector_norm(x, dtype=dtype).square()
    return squares - x.sum(dim=0, dtype=dtype).square().sum() / max(1, len(x))


def _auxk(
    parameters: TopKParameters,
    x: Float[Tensor, "batch d_model"],
    error: Float[Tensor, "batch d_model"],
    ids: Int[Tensor, " dead"],
    alive: Bool[Tensor, " dead"] | None,
    weight: float,
) -> tuple[Float[Tensor, ""], AuxGradients]:
    # Where the dead are not few, some rows of the batch speak for all and memory stays bounded.
    stride = max(1, -(-len(x) * len(ids) // _AUX_ELEMENTS))
    loss, W_enc, b_enc, W_dec = auxk(
        x[::stride], -error[::stride], parameters.W_enc_rows, parameters.b_enc, parameters.W_dec,
        ids, MOST_AUX, alive,
    )  # fmt: skip
    return loss, AuxGradients(ids, weight * W_enc, weight * b_enc, weight * W_dec)


@torch.no_grad()
def gradients(done: TopKPass, d_sae: int) -> tuple[dict[str, Tensor], Int[Tensor, " d_sae"]]:
    """Gradients of `total` by every parameter, and how often each latent fired.

    With matrices of the parameters' size: for clipping and accumulation. The trainer's fast path
    steps from the pass itself.
    """
    W_dec, W_enc, b_enc, counts = sparse_pair_grads(
        done.latent_acts, done.error, done.pre_grads, done.x, done.latent_indices, d_sae, done.order
    )
    grads = {"W_enc_rows": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": done.error.sum(dim=0)}
    for grad in grads.values():
        grad.mul_(done.factor)
    if done.aux is not None:
        for name in ("W_enc_rows", "b_enc", "W_dec"):
            grads[name][done.aux.ids] += getattr(done.aux, name)
    return grads, counts


def canonical(parameters: TopKParameters, scale: InputScale) -> dict[str, Float[Tensor, "..."]]:
    """Fold the input scale away: the same SAE on raw activations, latents in residual units."""
    return fold_centred_scale(
        W_enc=parameters.W_enc_rows.T,
        b_enc=parameters.b_enc,
        W_dec=parameters.W_dec,
        b_dec=parameters.b_dec,
        mean=scale.mean,
        factor=scale.factor,
    )
