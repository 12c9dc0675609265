"""JumpReLU with a target for L0 against dense float64 mathematics; short runs' figures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saesteer.checkpoints.sae_file import load_sae
from saesteer.sae.config import JumpReLUConfig, TrainConfig
from saesteer.sae.training import architecture
from saesteer.sae.training.architecture import DeadList, Parameters
from saesteer.sae.training.architectures.gemma_scope_2 import GemmaScope2
from saesteer.sae.training.architectures.jumprelu import JumpReLU
from saesteer.sae.verbs.train import train

from ...training_runs import CONFIG
from ..dense_twins import (
    Jump,
    Step,
    batch_for,
    controlled,
    gradients,
    parameters_for,
    with_dense_auxk,
)

VARIANTS = {
    "quadratic": JumpReLUConfig(),
    "per token": JumpReLUConfig(penalty="quadratic-per-token"),
    "step": JumpReLUConfig(penalty="step", bandwidth=0.05, units="unit"),
    "anthropic": JumpReLUConfig(
        penalty="tanh", bandwidth=2.0, to_input=True, log_threshold=True, pre_act_loss=0.3
    ),
    "all": JumpReLUConfig(
        penalty="step", to_input=True, pre_act_loss=0.7, frequency=0.2, frequency_knee=0.3
    ),
}


def dense_loss(
    kind: JumpReLU,
    p: Parameters,
    state: Parameters,
    x: Tensor,
    dead: Tensor,
    ends: tuple[int, ...] = (),
) -> Tensor:
    """The whole loss, with every pair."""
    options, D, B = kind.options, x.shape[1], len(x)
    theta = p["log_threshold"].exp() if options.log_threshold else p["threshold"]
    width = options.bandwidth * (D**0.5 if options.units == "unit" else 1)
    h = x @ p["W_enc_rows"].T + p["b_enc"]
    acts = Jump.apply(h, theta, width, options.to_input)
    on = Step.apply(h, theta, width, options.to_input)
    total = torch.zeros((), dtype=x.dtype)
    ends = ends or (len(theta),)
    for end in ends:
        residual = x - acts[:, :end] @ p["W_dec"][:end] - p["b_dec"]
        total = total + residual.square().mean() / len(ends)
    total = with_dense_auxk(total, p, h, residual, dead, kind.auxk)
    l0 = on.sum() / B
    risen = min(1.0, (float(state["l0_steps"]) + 1) / max(1, kind.rising_steps))
    integral = state["l0_integral"]
    aim = kind.l0 * (-integral).exp()
    if options.penalty == "quadratic":
        total = total + risen * kind.start * (l0 / aim - 1).square()
    elif options.penalty == "quadratic-per-token":
        total = total + risen * kind.start * (on.sum(dim=1) / aim - 1).square().mean()
    else:
        m = (l0.detach() / kind.l0).clamp_min(1e-9).log().clamp(-3, 1)
        price = risen * (kind.start * (integral + 1.5 * m).exp()).clamp(max=4 / kind.l0)
        total = total + price * (l0 if options.penalty == "step" else (4 * acts).tanh().sum() / B)
    if options.frequency:
        often = on.sum(dim=0) / B
        knee, given_way = options.frequency_knee, integral.clamp(max=0).exp()
        total = total + risen * given_way * options.frequency * (often * (1 + often / knee)).sum()
    if options.pre_act_loss:
        weight = options.pre_act_loss / (D if options.units == "sqrt_d" else D**0.5)
        total = total + risen * weight * (theta - h).relu().sum() / B
    return total


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(2, 9),
    d_model=st.integers(1, 11),
    d_sae=st.integers(1, 17),
    l0=st.floats(0.1, 20),
    height=st.sampled_from([0.01, 0.05, 1.0, 50.0]),
    dead_share=st.sampled_from([0.0, 0.3, 1.0]),
    dense=st.booleans(),
)
def test_loss_and_every_gradient(
    variant: str, rows: int, d_model: int, d_sae: int, l0: float, height: float,
    dead_share: float, dense: bool,
) -> None:  # fmt: skip
    """Odd shapes; thresholds that let half, some or nothing through; both sides of the window; as
    entries and as whole products."""
    kind = JumpReLU(
        l0, 0.25, 0.7, rising_steps=7, options=VARIANTS[variant], dense_from=0.0 if dense else 2.0
    )
    compare(kind, rows, d_model, d_sae, height, dead_share)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 9),
    d_model=st.integers(1, 11),
    inner=st.sets(st.integers(1, 16), max_size=4),
    l0=st.floats(0.1, 16),
    height=st.sampled_from([0.05, 1.0, 50.0]),
    dense=st.booleans(),
)
def test_the_form_of_gemma_scope_2(
    rows: int, d_model: int, inner: set[int], l0: float, height: float, dense: bool
) -> None:
    """Prefixes, empty ones among them, with the penalties of this form."""
    ends = (*sorted(inner), 17)
    (kind,) = GemmaScope2.from_config(
        TrainConfig(arch="gemma-scope-2", l0=(l0,), prefixes=ends, auxk=0.25)
    )
    kind = kind.at_width(17)
    assert isinstance(kind, GemmaScope2) and kind.options.frequency > 0
    assert kind.options.penalty == "quadratic-per-token"
    kind = replace(kind, dense_from=0.0 if dense else 2.0)
    compare(kind, rows, d_model, 17, height, 0.3, ends)


def compare(
    kind: JumpReLU, rows: int, d_model: int, d_sae: int, height: float, dead_share: float,
    ends: tuple[int, ...] = (),
) -> None:  # fmt: skip
    """Loss, gradients and counts of a pass with those of the dense loss."""
    p = parameters_for(d_model, d_sae)
    rng = torch.Generator().manual_seed(3)
    theta = height * torch.rand(d_sae, generator=rng, dtype=torch.float64) + 1e-3
    if kind.options.log_threshold:
        kind = JumpReLU.with_log_thresholds(kind)
        p["log_threshold"] = theta.log().requires_grad_()
    else:
        p["threshold"] = theta.requires_grad_()
    x, state = batch_for(rows, d_model), controlled(kind, d_sae)
    dead = torch.rand(d_sae, generator=torch.Generator().manual_seed(2)) < dead_share
    done = kind.loss({**p, **state}, x, x, DeadList(dead.nonzero()[:, 0]))
    expected = dense_loss(kind, p, state, x, dead, ends)
    # float64: only the order of additions differs.
    torch.testing.assert_close(done.loss, expected, rtol=1e-9, atol=1e-12)
    (found, counts), wanted = architecture.gradients(done, d_sae), gradients(p, expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-8, atol=1e-10, msg=name)
    pre_acts = x @ p["W_enc_rows"].T + p["b_enc"]
    assert torch.equal(counts, (pre_acts > kind.thresholds(p)).sum(dim=0))


def test_pairs_on_both_sides_of_the_threshold_move_it() -> None:
    """One latent, two examples: just above and just below; too few active lowers it."""
    p = {
        "W_enc_rows": torch.ones(1, 1), "W_dec": torch.ones(1, 1), "b_enc": torch.zeros(1),
        "b_dec": torch.zeros(1), "threshold": torch.ones(1),
    }  # fmt: skip
    kind = JumpReLU(100.0)
    p |= kind.buffers(1, torch.device("cpu"))
    for h in (0.95, 1.05):
        x = torch.full((2, 1), h)
        assert float(kind.loss(p, x, x, None).dense["threshold"]) != 0, h
    x = torch.full((2, 1), 1.5)
    assert float(kind.loss(p, x, x, None).dense["threshold"]) == 0


def test_a_threshold_is_never_negative() -> None:
    p = {"threshold": torch.tensor([-0.5, 0.0, 0.3])}
    JumpReLU(3.0).after_step(p)
    assert p["threshold"].tolist() == pytest.approx([0, 0, 0.3])


RUN = replace(CONFIG, arch="jumprelu", k=(), layers=(1,), tokens=4800, lr=5e-3)


@pytest.mark.parametrize("l0", [3.0, 6.0])
def test_a_short_run_meets_its_target(l0: float, shards: Path, tmp_path: Path) -> None:
    (run,) = train(tmp_path / "one", replace(RUN, l0=(l0,)), activations=shards, device="cpu")
    final = run["final"]
    assert run["sae"]["l0_heldout"] == pytest.approx(l0, rel=0.05)
    assert final["fvu"] == pytest.approx({3.0: 0.37, 6.0: 0.24}[l0], rel=0.1)
    sae = load_sae(tmp_path / "one")
    assert sae.spec.architecture == "jumprelu" and sae.threshold is not None
    assert float(sae.threshold.std()) > 0 and float(sae.threshold.min()) >= 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns_and_is_saved_with_plain_thresholds(
    variant: str, shards: Path, tmp_path: Path
) -> None:
    """The state opens as the SAE that was written."""
    options: Any = VARIANTS[variant]
    config = replace(RUN, l0=(4.0,), jumprelu=options)
    (run,) = train(tmp_path, config, activations=shards, device="cpu")
    assert run["final"]["fvu"] < 0.65
    sae, state = load_sae(tmp_path), load_sae(tmp_path / "state")
    assert sae.threshold is not None and state.threshold is not None
    assert torch.equal(sae.threshold, state.threshold) and float(sae.threshold.min()) >= 0
