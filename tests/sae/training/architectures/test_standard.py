"""ReLU with L1, and the gated form, against dense float64 mathematics; short runs with figures."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saesteer.checkpoints import folds
from saesteer.checkpoints.sae_file import load_sae
from saesteer.sae.training import architecture
from saesteer.sae.training.architecture import DeadList, Parameters
from saesteer.sae.training.architectures.gated import Gated
from saesteer.sae.training.architectures.standard import Standard
from saesteer.sae.verbs.train import train

from ...training_runs import CONFIG, sparse_data
from ..dense_twins import batch_for, controlled, gradients, parameters_for, with_dense_auxk


def price(kind: Standard, state: Parameters, l0: Tensor) -> Tensor:
    risen = min(1.0, (float(state["l0_steps"]) + 1) / max(1, kind.rising_steps))
    m = (l0.detach() / kind.l0).clamp_min(1e-9).log().clamp(-3, 1)
    return risen * (kind.start * (state["l0_integral"] + 1.5 * m).exp()).clamp(max=6 / kind.l0**0.5)


def dense_standard(
    kind: Standard, p: Parameters, state: Parameters, x: Tensor, dead: Tensor
) -> tuple[Tensor, Tensor]:
    h = x @ p["W_enc_rows"].T + p["b_enc"]
    acts = h.relu()
    residual = x - acts @ p["W_dec"] - p["b_dec"]
    total = with_dense_auxk(residual.square().mean(), p, h, residual, dead, kind.auxk)
    cost = price(kind, state, (acts > 0).double().sum() / len(x))
    return total + cost * acts.sum() / len(x) / x.shape[1] ** 0.5, acts


def dense_gated(
    kind: Standard, p: Parameters, state: Parameters, x: Tensor, dead: Tensor
) -> tuple[Tensor, Tensor]:
    u = x @ p["W_enc_rows"].T
    gate = u + p["b_enc"]
    acts = (gate > 0) * (u * p["r_mag"].exp() + p["b_mag"]).relu()
    residual = x - acts @ p["W_dec"] - p["b_dec"]
    by_gate = x - gate.relu() @ p["W_dec"].detach() - p["b_dec"].detach()
    total = residual.square().mean() + by_gate.square().mean()
    total = with_dense_auxk(total, p, gate, residual, dead, kind.auxk)
    cost = price(kind, state, (acts != 0).double().sum() / len(x))
    return total + cost * gate.relu().sum() / len(x) / x.shape[1] ** 0.5, acts


@pytest.mark.parametrize("kind", [Standard, Gated])
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 9),
    d_model=st.integers(1, 11),
    d_sae=st.integers(1, 17),
    l0=st.floats(0.1, 20),
    bias=st.sampled_from([0.0, -3.0, -100.0]),
    dead_share=st.sampled_from([0.0, 0.3, 1.0]),
    dense=st.booleans(),
)
def test_loss_and_every_gradient(
    kind: type[Standard], rows: int, d_model: int, d_sae: int, l0: float, bias: float,
    dead_share: float, dense: bool,
) -> None:  # fmt: skip
    """Odd shapes; half, some or none of the latents active; as entries and as whole products."""
    one = kind(l0, 0.25, 0.7, rising_steps=7, dense_from=0.0 if dense else 2.0)
    p = parameters_for(d_model, d_sae)
    if kind is Gated:
        more = parameters_for(d_sae, d_sae, seed=5)
        p |= {"b_mag": more["b_enc"], "r_mag": more["b_dec"]}
    p["b_enc"].data += bias
    x, state = batch_for(rows, d_model), controlled(one, d_sae)
    dead = torch.rand(d_sae, generator=torch.Generator().manual_seed(2)) < dead_share
    done = one.loss({**p, **state}, x, x, DeadList(dead.nonzero()[:, 0]))
    expected, acts = (dense_gated if kind is Gated else dense_standard)(one, p, state, x, dead)
    # float64: only the order of additions differs.
    torch.testing.assert_close(done.loss, expected, rtol=1e-9, atol=1e-12)
    (found, counts), wanted = architecture.gradients(done, d_sae), gradients(p, expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-8, atol=1e-10, msg=name)
    assert torch.equal(counts, (acts != 0).sum(dim=0))
    assert float(done.measured["l0"]) == pytest.approx(float((acts != 0).sum() / len(x)))


RUN = replace(CONFIG, k=(), l0=(4.0,), layers=(1,), tokens=300 * 64, lr=5e-3, held_out_share=0.2)


# Measured .423 and .205: L1 shrinks, and a gate does not.
@pytest.mark.parametrize(("arch", "fvu"), [("standard", 0.423), ("gated", 0.205)])
def test_a_short_run_meets_its_target(arch: str, fvu: float, shards: Path, tmp_path: Path) -> None:
    (run,) = train(tmp_path, replace(RUN, arch=arch), activations=shards, device="cpu")
    assert run["sae"]["l0_heldout"] == pytest.approx(4, rel=0.05)
    assert run["final"]["fvu"] == pytest.approx(fvu, rel=0.15)
    sae = load_sae(tmp_path)
    assert sae.spec.architecture == arch
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
    # The exact form as a JumpReLU: the same latents on raw activations.
    x, other = sparse_data(300, 1).double(), folds.as_jumprelu(sae.to(dtype="float64"))
    assert other.spec.architecture == "jumprelu" and other.b_mag is None
    other.check("the other form")
    torch.testing.assert_close(
        other.encode(x), sae.to(dtype="float64").encode(x), atol=1e-6, rtol=1e-6
    )
