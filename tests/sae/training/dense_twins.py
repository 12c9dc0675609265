"""What tests compare a pass with: generic parameters, and what autograd makes of a dense loss."""

import torch
from torch import Tensor

from saesteer.sae.training.architecture import Parameters, Pass
from saesteer.sae.training.architecture import gradients as pass_gradients


def parameters_for(d_model: int, d_sae: int, seed: int = 0) -> Parameters:
    """Generic float64 parameters: nothing tied, nothing zero."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()

    return {
        "W_enc_rows": draw(d_sae, d_model),
        "W_dec": draw(d_sae, d_model),
        "b_enc": draw(d_sae),
        "b_dec": draw(d_model),
    }


def batch_for(rows: int, d_model: int, seed: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, d_model, generator=rng, dtype=torch.float64)


def gradients(p: Parameters, total: Tensor) -> dict[str, Tensor]:
    """What autograd makes of a dense loss."""
    found = torch.autograd.grad(total, list(p.values()), allow_unused=True)
    return {
        name: torch.zeros_like(q) if g is None else g
        for (name, q), g in zip(p.items(), found, strict=True)
    }


def own_gradients(p: Parameters, done: Pass) -> dict[str, Tensor]:
    return pass_gradients(done, len(p["b_enc"]))[0]


def with_dense_auxk(
    total: Tensor, p: Parameters, pre_acts: Tensor, residual: Tensor, dead: Tensor, auxk: float
) -> Tensor:
    """`total` plus the auxiliary loss of latents that are all within k_aux; `residual` is held."""
    if not dead.any():
        return total
    held = residual.detach()
    estimate = torch.where(dead, pre_acts, 0.0).relu() @ p["W_dec"]
    variance = (held - held.mean(dim=0)).square().sum()
    return total + auxk * (estimate - held).square().sum() / variance
