"""What tests compare a pass with: generic parameters, and what autograd makes of a dense loss."""

from typing import Any

import torch
from torch import Tensor

from saesteer.sae.training.architecture import Parameters, Pass
from saesteer.sae.training.architecture import gradients as pass_gradients
from saesteer.sae.training.l0_target import L0Target


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


class Step(torch.autograd.Function):
    """1[h > threshold]; its derivative by the threshold that of a step as wide as the window, and
    with `to_input` by h as well."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, width: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.width, ctx.to_input = width, to_input
        return (h > threshold).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:  # type: ignore[override]
        h, threshold = ctx.saved_tensors
        slope = ((h - threshold).abs() < ctx.width / 2) * grad / ctx.width
        return slope if ctx.to_input else None, -slope.sum(dim=0), None, None


class Jump(torch.autograd.Function):
    """h 1[h > threshold], with the threshold as the size of what the window lets through."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, width: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.width, ctx.to_input = width, to_input
        return h * (h > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        h, threshold = ctx.saved_tensors
        slope = ((h - threshold).abs() < ctx.width / 2) * grad * threshold / ctx.width
        straight = grad * (h > threshold)
        return straight + slope if ctx.to_input else straight, -slope.sum(dim=0), None, None


def controlled(kind: L0Target, d_sae: int) -> dict[str, Tensor]:
    """The state of a controller that has worked for some steps."""
    state = kind.buffers(d_sae, torch.device("cpu"))
    state["l0_integral"].fill_(0.3)
    state["l0_steps"].fill_(4)
    return state
