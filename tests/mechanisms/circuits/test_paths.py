"""Path patching in one token equals both whole runs, with every other head frozen, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.circuits.paths import path_effects
from saesteer.mechanisms.data.encoding import encode_pairs
from saesteer.mechanisms.data.pairs import Pair
from saesteer.mechanisms.patching.reference import patched_logits
from saesteer.mechanisms.patching.sites import Node, Patch, make_nodes, read_values
from saesteer.sae.model.attention import head_tap
from saesteer.sae.model.language_model import LanguageModel, uncompiled, wrap_model

Make = Callable[..., tuple[Any, Any]]
BASE = [int(x) for x in torch.arange(9) * 17 % 390 + 3]
SOURCE = [int(x) for x in torch.arange(11) * 29 % 390 + 5]


def measure(logits: Tensor) -> Tensor:
    return logits[:, 7].double() - logits[:, 30].double()


def two_runs(
    lm: LanguageModel, sender: Node, receivers: list[Node] | None, at: int, source_at: int
) -> float:
    """Whole rows: every head frozen from the sender's token on, then the receivers' inputs put
    into a free run."""
    every = [(node, t) for node in make_nodes(lm, ["z"]) for t in range(at, len(BASE))]
    with head_tap(lm) as tap:
        frozen, plain = read_values(lm, BASE, every, tap)
        sent, _ = read_values(lm, SOURCE, [(sender, source_at)], tap)
        held = [Patch(n, t, v) for (n, t), v in zip(every, frozen, strict=True)
                if (n, t) != (sender, at)]  # fmt: skip
        held.append(Patch(sender, at, sent[0]))
        if receivers is None:
            after = patched_logits(lm, BASE, held)
        else:
            seen: dict[Node, Tensor] = {}
            for node in receivers:

                def read(values: Tensor, node: Node = node) -> None:
                    seen[node] = values[0, node.head, at].clone()

                # The outer tap reads what the inner one, of `patched_logits`, computes.
                tap.edits[node.layer, node.site] = read
                patched_logits(lm, BASE, held)
                tap.edits.clear()
            after = patched_logits(lm, BASE, [Patch(n, at, v) for n, v in seen.items()])
    return float(measure(after[None])[0] - measure(plain[None])[0])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "gpt2"])
def test_one_token_is_enough(tiny_lm: Make, family: str) -> None:
    model, tokenizer = tiny_lm(family)
    lm = wrap_model(model.double(), tokenizer)
    senders = [Node("z", layer, head) for layer in (0, 2) for head in (0, 3)]
    cases: list[tuple[list[Node] | None, int]] = [
        (None, 8),
        ([Node("q", 2, 1), Node("q", 3, 2)], 8),
        ([Node("v", 3, 0)], 5),
        ([Node("k", 1, 3)], 5),
    ]
    with head_tap(lm) as tap:
        for receivers, at in cases:
            found = path_effects(lm, BASE, SOURCE, senders, receivers, at, 6, measure, tap)
            expected = [two_runs(lm, sender, receivers, at, 6) for sender in senders]
            torch.testing.assert_close(
                found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9
            )
            assert (found[:2] != 0).all()
            if receivers == [Node("k", 1, 3)]:
                assert (found[2:] == 0).all()  # block 2 comes after its receiver
    assert not uncompiled(lm.model).training


def test_the_hand_built_paths(toy: LanguageModel, scenes: list[Pair]) -> None:
    (pair,), _ = encode_pairs(toy, scenes[:1])
    senders = make_nodes(toy, ["z"])

    def answer(logits: Tensor) -> Tensor:
        return logits[:, pair.answer].double()

    with head_tap(toy) as tap:
        last = path_effects(toy, pair.clean, pair.corrupt, senders, None, *pair.place("last"),
                            answer, tap)  # fmt: skip
        fetcher = {site: [Node(site, 1, 1)] for site in ("q", "k", "v")}
        by = {
            site: path_effects(toy, pair.clean, pair.corrupt, senders, nodes,
                               *pair.place("last" if site == "q" else "object"), answer, tap)
            for site, nodes in fetcher.items()
        }  # fmt: skip
        with pytest.raises(UsageError, match="from the last token alone, .* got token 3"):
            path_effects(toy, pair.clean, pair.corrupt, senders, None, 3, 3, answer, tap)
    direct = {(n.layer, n.head): float(e) for n, e in zip(senders, last, strict=True)}
    assert direct.pop((1, 1)) < -9 and set(direct.values()) == {0.0}
    keys = {(n.layer, n.head): float(e) for n, e in zip(senders, by["k"], strict=True)}
    assert keys.pop((0, 0)) < -9 and set(keys.values()) == {0.0}
    assert (by["q"].abs() < 1e-4).all() and (by["v"].abs() < 1e-4).all()
