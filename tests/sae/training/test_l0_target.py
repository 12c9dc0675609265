"""The controller that holds L0 at its target, from coefficients far off."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saesteer.sae.config import JumpReLUConfig
from saesteer.sae.training.architectures import architecture_named
from saesteer.sae.training.architectures.standard import Standard
from saesteer.sae.training.l0_target import L0Target
from saesteer.sae.verbs.train import train

from ..training_runs import CONFIG

KINDS = [
    "standard",
    "jumprelu step",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("jumprelu", "gemma-scope-2", "gated")
    ),
]


@pytest.mark.parametrize("times", [0.01, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_l0_on_rows_not_trained_on_is_the_target(
    kind: str, times: float, shards: Path, tmp_path: Path
) -> None:
    """Within 5 %, from a coefficient a hundred times too small or too large."""
    arch, _, penalty = kind.partition(" ")
    config = replace(
        CONFIG,
        arch=arch,
        k=(),
        l0=(4.0,),
        layers=(1,),
        tokens=400 * 64,
        lr=5e-3,
        held_out_share=0.2,
        jumprelu=JumpReLUConfig(penalty=penalty or "quadratic"),
    )
    (usual,) = architecture_named(arch).from_config(config)
    assert isinstance(usual, L0Target)
    config = replace(config, coefficient=times * usual.start)
    (run,) = train(tmp_path, config, activations=shards, device="cpu")
    assert run["sae"]["l0_heldout"] == pytest.approx(4, rel=0.05)


def test_the_coefficient_rises_and_answers() -> None:
    kind = Standard(8.0, coefficient=0.5, rising_steps=4)
    state = kind.buffers(32, torch.device("cpu"))
    at_target = torch.tensor(8.0)
    for step in range(6):
        expected = 0.5 * min(1, (step + 1) / 4)
        assert float(kind.price(state, at_target)) == pytest.approx(expected)
        state["l0_steps"] += 1
    assert float(kind.price(state, torch.tensor(16.0))) == pytest.approx(0.5 * 2**1.5)
    assert float(kind.price(state, torch.tensor(4.0))) == pytest.approx(0.5 * 0.5**1.5)
    assert float(kind.price(state, torch.tensor(0.0))) > 0
    # A dense start builds up no more force than this.
    assert float(kind.price(state, torch.tensor(1e6))) == pytest.approx(6 / 8**0.5)
