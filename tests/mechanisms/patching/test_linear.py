"""A Llama that is linear: every effect has a closed form, and shortcuts are exact.

With an epsilon of 1e16 and a gain of 1e8 the norms hand on what they get; queries and keys of 0
attend evenly; MLPs write nothing. With A_l the product of a block's value and output matrices and
P_ts = 1 / (t + 1) for s <= t, two blocks are (1 + P A_2) (1 + P A_1).
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.mechanisms.patching.approximation import approximate
from saesteer.mechanisms.patching.engine import PatchEngine, single
from saesteer.mechanisms.patching.sites import Node, read_values
from saesteer.sae.model.attention import head_tap
from saesteer.sae.model.language_model import LanguageModel, wrap_model

BASE, SOURCE = [3, 14, 15, 9, 26], [5, 35, 8, 9, 7]
WIDTH, LAST = 16, len(BASE) - 1
# Norms of the library compute in float32: seven digits of values of about 1.
ROUNDING = 2e-6


@pytest.fixture(scope="module")
def linear() -> LanguageModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    from saesteer.mechanisms.toys.hand_built import word_tokenizer

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=42, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e16,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1e8)
            elif "q_proj" in name or "k_proj" in name or "down_proj" in name:
                weight.zero_()
            else:
                weight.normal_(0, WIDTH**-0.5)
    return wrap_model(model.eval(), word_tokenizer(), "linear")


def score(logits: Tensor) -> Tensor:
    return logits[:, 7].double() - logits[:, 30].double()


def test_effects_are_the_closed_form_and_shortcuts_are_exact(linear: LanguageModel) -> None:
    model: Any = linear.model
    own = [layer.self_attn for layer in model.model.layers]
    A = [(one.o_proj.weight @ one.v_proj.weight).detach().double() for one in own]
    w = (model.lm_head.weight[7] - model.lm_head.weight[30]).detach().double()
    P = torch.tril(torch.ones(5, 5, dtype=torch.float64)) / torch.arange(1, 6)[:, None]
    nodes = [(Node("resid_pre", 0), t) for t in range(5)]
    new, _ = read_values(linear, SOURCE, nodes)
    old, plain = read_values(linear, BASE, nodes)
    expected = []
    for t in range(5):
        step = (new[t] - old[t]).double()
        moved = (t == LAST) * step + P[LAST, t] * ((A[0] + A[1]) @ step)
        expected.append(w @ (moved + (P @ P)[LAST, t] * (A[1] @ A[0] @ step)))
    closed = torch.stack(expected)
    engine = PatchEngine(linear, BASE)
    exact = torch.empty(5, dtype=torch.float64)
    sets = single([node for node, _ in nodes], list(range(5)), new)
    for indices, logits in engine.run(sets):
        exact[list(indices)] = score(logits) - score(plain[None])
    torch.testing.assert_close(exact, closed, rtol=0, atol=ROUNDING)
    assert closed[LAST].abs() > 0.1 and closed[3] == 0  # the token that both runs share
    # What all tokens do adds up to the whole difference.
    _, other = read_values(linear, SOURCE, [])
    whole = score(other[None])[0] - score(plain[None])[0]
    torch.testing.assert_close(closed.sum(), whole, rtol=0, atol=ROUNDING)
    for method in ("atp", "ig"):
        wanted = [(node, t, t) for node, t in nodes]
        found = approximate(linear, BASE, SOURCE, wanted, score, method)
        torch.testing.assert_close(found.cpu(), closed, rtol=0, atol=ROUNDING)


def test_heads_too(linear: LanguageModel) -> None:
    """Values and outputs of heads are linear as well; patterns are even."""
    wanted = [(Node(site, layer, head), t, t) for site in ("v", "z") for layer in (0, 1)
              for head in range(4) for t in (1, LAST)]  # fmt: skip
    with head_tap(linear) as tap:
        found = approximate(linear, BASE, SOURCE, wanted, score, "atp", tap=tap)
        new, _ = read_values(linear, SOURCE, [(node, t) for node, t, _ in wanted], tap)
        engine = PatchEngine(linear, BASE, tap)
        sets = single([node for node, *_ in wanted], [t for _, t, _ in wanted], new)
        exact = torch.empty(len(wanted), dtype=torch.float64)
        for indices, logits in engine.run(sets):
            exact[list(indices)] = score(logits) - score(engine.logits[None])
    torch.testing.assert_close(found.cpu(), exact, rtol=0, atol=ROUNDING)
    assert exact.abs().max() > 0.01
