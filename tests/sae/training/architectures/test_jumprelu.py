"""JumpReLU with a target for L0 against dense float64 mathematics; a short run with its figures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saesteer.checkpoints.sae_file import load_sae
from saesteer.sae.config import TrainConfig
from saesteer.sae.training import architecture
from saesteer.sae.training.architecture import DeadList, Parameters
from saesteer.sae.training.architectures.jumprelu import BANDWIDTH, WEIGHT, JumpReLU
from saesteer.sae.verbs.train import train

from ...training_runs import CONFIG
from ..dense_twins import batch_for, gradients, parameters_for, with_dense_auxk


class Step(torch.autograd.Function):
    """1[h > threshold]; its derivative by the threshold that of a step as wide as the window."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(h, threshold)
        return (h > threshold).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        h, threshold = ctx.saved_tensors
        window = (h - threshold).abs() < BANDWIDTH / 2
        return None, -(window * grad / BANDWIDTH).sum(dim=0)


class Jump(torch.autograd.Function):
    """h 1[h > threshold], with the threshold as the size of what the window lets through."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(h, threshold)
        return h * (h > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h, threshold = ctx.saved_tensors
        window = (h - threshold).abs() < BANDWIDTH / 2
        return grad * (h > threshold), -(window * grad * threshold / BANDWIDTH).sum(dim=0)


def dense_loss(p: Parameters, x: Tensor, l0: float, dead: Tensor, auxk: float) -> Tensor:
    pre_acts = x @ p["W_enc_rows"].T + p["b_enc"]
    acts = Jump.apply(pre_acts, p["threshold"])
    residual = x - acts @ p["W_dec"] - p["b_dec"]
    mean = Step.apply(pre_acts, p["threshold"]).sum() / len(x)
    total = residual.square().mean() + WEIGHT * (mean / l0 - 1).square()
    return with_dense_auxk(total, p, pre_acts, residual, dead, auxk)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(2, 9),
    d_model=st.integers(1, 11),
    d_sae=st.integers(1, 17),
    l0=st.floats(0.1, 20),
    height=st.sampled_from([0.0, 0.05, 1.0, 50.0]),
    dead_share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_loss_and_every_gradient(
    rows: int, d_model: int, d_sae: int, l0: float, height: float, dead_share: float
) -> None:
    """Odd shapes; thresholds that let half, some or nothing through; both sides of the window."""
    p = parameters_for(d_model, d_sae)
    rng = torch.Generator().manual_seed(3)
    p["threshold"] = height * torch.rand(d_sae, generator=rng, dtype=torch.float64)
    p["threshold"].requires_grad_()
    x = batch_for(rows, d_model)
    dead = torch.rand(d_sae, generator=torch.Generator().manual_seed(2)) < dead_share
    done = JumpReLU(l0, 0.25).loss(p, x, x, DeadList(dead.nonzero()[:, 0]))
    expected = dense_loss(p, x, l0, dead, 0.25)
    # float64: only the order of additions differs.
    torch.testing.assert_close(done.loss, expected, rtol=1e-10, atol=1e-12)
    (found, counts), wanted = architecture.gradients(done, d_sae), gradients(p, expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-8, atol=1e-10, msg=name)
    pre_acts = x @ p["W_enc_rows"].T + p["b_enc"]
    assert torch.equal(counts, (pre_acts > p["threshold"]).sum(dim=0))


def test_pairs_on_both_sides_of_the_threshold_move_it() -> None:
    """One latent, two examples: just above and just below; too few active lowers it."""
    p = {
        "W_enc_rows": torch.ones(1, 1), "W_dec": torch.ones(1, 1), "b_enc": torch.zeros(1),
        "b_dec": torch.zeros(1), "threshold": torch.ones(1),
    }  # fmt: skip
    for h in (0.95, 1.05):
        x = torch.full((2, 1), h)
        alone = JumpReLU(100.0).loss(p, x, x, None).dense["threshold"]
        assert float(alone) != 0, h
    x = torch.full((2, 1), 1.5)
    assert float(JumpReLU(100.0).loss(p, x, x, None).dense["threshold"]) == 0


def test_a_threshold_is_never_negative() -> None:
    p = {"threshold": torch.tensor([-0.5, 0.0, 0.3])}
    JumpReLU(3.0).after_step(p)
    assert p["threshold"].tolist() == pytest.approx([0, 0, 0.3])


@pytest.mark.parametrize("l0", [3.0, 6.0])
def test_a_short_run_meets_its_target(l0: float, shards: Path, tmp_path: Path) -> None:
    config = replace(
        CONFIG, arch="jumprelu", k=TrainConfig().k, l0=(l0,), layers=(1,), tokens=3840, lr=5e-3
    )
    (run,) = train(tmp_path / "one", config, activations=shards, device="cpu")
    final = run["final"]
    assert final["held_out_l0"] == pytest.approx(l0, rel=0.05)
    # Measured .393 and .258.
    assert final["fvu"] == pytest.approx({3.0: 0.393, 6.0: 0.258}[l0], rel=0.1)
    sae = load_sae(tmp_path / "one")
    assert sae.spec.architecture == "jumprelu" and sae.threshold is not None
    assert float(sae.threshold.std()) > 0 and float(sae.threshold.min()) >= 0
