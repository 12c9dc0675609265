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

from saesteer.kernels.ops import encode_topk, sparse_decode

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
        return (x.float() - self.mean.to(x.device, torch.float32)) * self.factor


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
        W_enc_rows=rows.clone().requires_grad_(),
        W_dec=rows.clone().requires_grad_(),
        b_enc=torch.zeros(d_sae, device=device, requires_grad=True),
        b_dec=torch.zeros(d_model, device=device, requires_grad=True),
    )


@dataclass
class TopKLoss:
    """The loss to minimise, and what it was made of; FVU is squared_error / squared_deviation."""

    total: Float[Tensor, ""]
    squared_error: Float[Tensor, ""]
    squared_deviation: Float[Tensor, ""]
    latent_acts: Float[Tensor, "batch k"]
    latent_indices: Int[Tensor, "batch k"]


def topk_loss(
    parameters: TopKParameters,
    x: Float[Tensor, "batch d_model"],
    k: int,
    dead: Bool[Tensor, " d_sae"] | None = None,
    auxk: float = 0.0,
) -> TopKLoss:
    """Reconstruction error of x~, plus the auxiliary loss of the dead latents.

    L = mean ||x~ - x^||^2 / D + auxk * ||e^ - e||^2 / ||e - mean(e)||^2, where e = x~ - x^ is held
    constant and e^ is what the k_aux = min(512, number dead) best dead latents make of it (Gao et
    al., arXiv 2406.04093, section 2.2 and appendix A.2; the residual's variance as divisor).
    """
    acts, indices = encode_topk(x, parameters.W_enc_rows, parameters.b_enc, k)
    reconstruction = sparse_decode(acts, indices, parameters.W_dec, parameters.b_dec)
    error = x - reconstruction
    squared_error = error.square().sum()
    total = squared_error / x.numel()
    if auxk and dead is not None and bool(dead.any()):
        total = total + auxk * _auxk_loss(parameters, x, error.detach(), dead)
    squared_deviation = (x - x.mean(dim=0)).square().sum()
    return TopKLoss(
        total, squared_error.detach(), squared_deviation.detach(), acts.detach(), indices
    )


def _auxk_loss(
    parameters: TopKParameters,
    x: Float[Tensor, "batch d_model"],
    residual: Float[Tensor, "batch d_model"],
    dead: Bool[Tensor, " d_sae"],
) -> Float[Tensor, ""]:
    # The dead latents are few and all of them are read: dense products of [B, dead], no b_dec.
    ids = dead.nonzero().squeeze(1)
    # Where they are not few, some rows of the batch speak for all and the memory stays bounded.
    stride = -(-len(x) * len(ids) // _AUX_ELEMENTS)
    x, residual = x[::stride], residual[::stride]
    pre_acts = x @ parameters.W_enc_rows[ids].T + parameters.b_enc[ids]
    best, chosen = pre_acts.topk(min(512, len(ids)), dim=1)
    acts = torch.zeros_like(pre_acts).scatter(1, chosen, best.relu())
    estimate = acts @ parameters.W_dec[ids]
    variance = (residual - residual.mean(dim=0)).square().sum().clamp_min(1e-12)
    return (estimate - residual).square().sum() / variance


def canonical(parameters: TopKParameters, scale: InputScale) -> dict[str, Float[Tensor, "..."]]:
    """Fold the input scale away: the same SAE on raw activations, latents in residual units.

    With x~ = a (x - mu) and unit decoder rows, latents f = f~ / a come from W_enc unchanged and
    b_enc = b_enc~ / a - mu W_enc, and the reconstruction from W_dec unchanged and
    b_dec = mu + b_dec~ / a. Products are taken in float64; float32 tensors come out.
    """
    W_enc = parameters.W_enc_rows.detach().cpu().double().T
    mean, factor = scale.mean.cpu(), scale.factor
    return {
        "W_enc": W_enc.float().contiguous(),
        "b_enc": (parameters.b_enc.detach().cpu().double() / factor - mean @ W_enc).float(),
        "W_dec": parameters.W_dec.detach().cpu().float().contiguous(),
        "b_dec": (mean + parameters.b_dec.detach().cpu().double() / factor).float(),
    }
