"""The frozen network has the model's logits, is affine, and accounts for them exactly."""

import pytest
import torch
from torch import nn

from saesteer.checkpoints.errors import UserError
from saesteer.mechanisms.routes import frozen
from saesteer.mechanisms.routes.frozen import FrozenNetwork
from saesteer.sae.model.language_model import wrap_model

from ..families import EVERY, Make, close, double

IDS = [5, 9, 77, 123, 42, 200, 31]


@pytest.mark.parametrize("family", EVERY)
def test_values_are_kept_and_the_account_is_exact(tiny_lm: Make, family: str) -> None:
    lm = double(tiny_lm, family)
    before = lm.text_model.config._attn_implementation
    net = FrozenNetwork(lm, IDS)
    with torch.no_grad():
        own = lm.model(input_ids=torch.tensor([IDS])).logits[0, -1]
    # In float64 the library's norms still round to float32, which the frozen network leaves out.
    assert torch.allclose(net.logits, own, atol=2e-5)
    start = net.embeddings.clone().requires_grad_(True)
    m = net.run(start)[10] - net.run(start)[20]
    (grad,) = torch.autograd.grad(m, start)
    tokens = (grad * start).sum(-1)[0].detach()
    with torch.no_grad():
        none = net.run(torch.zeros_like(start))
        assert abs(float(m - tokens.sum() - (none[10] - none[20]))) < close(family)
        # Mass by token is what zeroing its embedding takes away.
        for t in (0, 3, len(IDS) - 1):
            less = net.embeddings.clone()
            less[0, t] = 0
            logits = net.run(less)
            assert abs(float(m - (logits[10] - logits[20]) - tokens[t])) < close(family)
    assert lm.text_model.config._attn_implementation == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


def test_several_positions_keep_their_logits(tiny_lm: Make) -> None:
    lm = double(tiny_lm, "gemma2")  # its soft-cap is outside the blocks
    net = FrozenNetwork(lm, IDS, last=3)
    with torch.no_grad():
        own = lm.model(input_ids=torch.tensor([IDS])).logits[0, -3:]
    assert torch.allclose(net.logits, own, atol=2e-5) and torch.allclose(
        net.run(net.embeddings), net.logits, atol=1e-12
    )


def test_activations_at_zero_take_their_limit() -> None:
    u = torch.tensor([0.0, 1.0], dtype=torch.float64)
    mode = frozen._Freeze([], False, False)
    with mode:
        y = nn.functional.silu(u)
    assert torch.allclose(y, torch.nn.functional.silu(u))
    assert mode._kept[0][0] == pytest.approx(0.5, abs=1e-4)


def test_what_does_not_become_affine_is_refused(tiny_lm: Make) -> None:
    lm = double(tiny_lm, "llama")

    class Squared(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * x.mean(-1, keepdim=True)  # type: ignore[no-any-return]

    lm.model.model.layers[1].mlp = Squared(lm.model.model.layers[1].mlp)
    with pytest.raises(UserError, match="cannot be frozen: .* is off by"):
        FrozenNetwork(wrap_model(lm.model, lm.tokenizer, "squared"), IDS)
