"""Patches in batches equal patches made one by one over whole rows, to rounding in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import NonFiniteError
from saesteer.mechanisms.config import HEAD_SITES, RESIDUAL_SITES
from saesteer.mechanisms.patching.engine import PatchEngine, plan_batches
from saesteer.mechanisms.patching.reference import patched_logits
from saesteer.mechanisms.patching.sites import Node, Patch, make_nodes, read_values
from saesteer.sae.model.attention import head_tap
from saesteer.sae.model.language_model import LanguageModel, wrap_model

from ...conftest import FAMILIES

Make = Callable[..., tuple[Any, Any]]
# Longer than the sliding windows of the tiny models.
BASE = [int(x) for x in torch.arange(21) * 17 % 390 + 3]
SOURCE = [int(x) for x in torch.arange(21) * 29 % 390 + 5]


QUICK = ("llama", "gemma2", "gpt2", "mixtral")
"""Grouped heads, windows with soft-caps, learned positions, experts; the others are slow tests."""


def double(tiny_lm: Make, family: str) -> LanguageModel:
    model, tokenizer = tiny_lm(family)
    # The kernels of the experts know no float64.
    return wrap_model(model if family == "mixtral" else model.double(), tokenizer)


def sites_of(family: str) -> tuple[str, ...]:
    parallel = family in ("gpt_neox", "phi")
    return tuple(s for s in (*RESIDUAL_SITES, *HEAD_SITES) if not (parallel and s == "resid_mid"))


def all_rows(engine: PatchEngine, sets: list[list[Patch]], **more: Any) -> Tensor:
    found = engine.logits.new_empty(len(sets), len(engine.logits))
    for indices, logits in engine.run(sets, **more):
        found[list(indices)] = logits
    return found


@pytest.mark.parametrize(
    "family",
    [
        family if family in QUICK else pytest.param(family, marks=pytest.mark.slow)
        for family in FAMILIES
    ],
)
def test_the_engine_equals_its_slow_twin(tiny_lm: Make, family: str) -> None:
    lm = double(tiny_lm, family)
    places = [
        (node, position)
        for site in sites_of(family)
        for node in make_nodes(lm, [site], [0, 2], [3] if site in HEAD_SITES else None)
        for position in (0, 18)
    ]
    with head_tap(lm) as tap:
        values, _ = read_values(lm, SOURCE, places, tap)
        sets = [[Patch(n, p, v)] for (n, p), v in zip(places, values, strict=True)]
        # Several patches in one set: two blocks, two tokens, two heads of one place.
        last = sets[-1][0]
        sets.append([sets[0][0], sets[7][0], last])
        sets.append([last, Patch(Node("z", 3, 1), 20, last.value)])
        added = [Patch(p.node, p.position, p.value, adds=True) for p in (sets[0][0], sets[2][0])]
        sets.append([*added, last])
        engine = PatchEngine(lm, BASE, tap)
        found = all_rows(engine, sets, batch_tokens=50)
        expected = torch.stack([patched_logits(lm, BASE, one) for one in sets])
    allowed = 1e-10 if lm.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=allowed)
    moved = (expected - engine.logits).abs().amax(dim=1)
    # A row of pattern at the first token has one key: nothing else could be there.
    first = [i for i, (n, p) in enumerate(places) if n.site in ("q", "pattern") and p == 0]
    assert (moved[first] < 1e-5).all() and (moved > 0).sum() > 0.6 * len(sets)
    assert all("forward" not in block.__dict__ for block in lm.blocks)


def test_patching_everything_gives_the_source(tiny_lm: Make) -> None:
    lm = double(tiny_lm, "llama")
    places = [(Node("resid_pre", 0), t) for t in range(len(BASE))]
    values, logits = read_values(lm, SOURCE, places)
    whole = [Patch(n, p, v) for (n, p), v in zip(places, values, strict=True)]
    torch.testing.assert_close(all_rows(PatchEngine(lm, BASE), [whole])[0], logits,
                               rtol=0, atol=1e-12)  # fmt: skip
    # The last block's output at the last token is all that the logits see.
    values, _ = read_values(lm, SOURCE, [(Node("resid_post", 3), 20)])
    last = [[Patch(Node("resid_post", 3), 20, values[0])]]
    torch.testing.assert_close(all_rows(PatchEngine(lm, BASE), last)[0], logits, rtol=0, atol=1e-12)


def test_batches_share_a_first_token_and_are_sorted_by_block() -> None:
    places = [[(layer, token)] for token in (4, 2) for layer in (3, 0, 2, 1)]
    batches = plan_batches([*places, [(3, 4), (0, 3)]], 5, batch_tokens=6)
    assert [(b.start, b.first, len(b.sets)) for b in batches] == [
        (2, 0, 2), (2, 2, 2), (3, 0, 1), (4, 0, 4),
    ]  # fmt: skip
    assert batches[0].sets == (5, 7) and batches[-1].sets == (1, 3, 2, 0)
    assert sum(b.work(4) for b in batches) == 2 * 3 * 4 + 2 * 3 * 2 + 2 * 4 + 4 * 4


def test_an_exception_restores_the_blocks(tiny_lm: Make) -> None:
    lm = wrap_model(*tiny_lm("gpt2"))
    engine = PatchEngine(lm, BASE)
    bad = [[Patch(Node("resid_post", 2), 20, torch.full((32,), torch.nan))]]
    with pytest.raises(NonFiniteError, match=r"NaN .* after patches from block 2 on in float32"):
        list(engine.run(bad))
    assert all("forward" not in block.__dict__ for block in lm.blocks)
