"""Attention that is cut: as a mask says, and as the hand-built circuit must lose it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.config import PatchConfig
from saesteer.mechanisms.data.pairs import Pair
from saesteer.mechanisms.patching.knockout import knock_out
from saesteer.sae.model.attention import head_tap
from saesteer.sae.model.language_model import LanguageModel, wrap_model

Make = Callable[..., tuple[Any, Any]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cut_in_all_blocks_is_a_mask(tiny_lm: Make, family: str) -> None:
    model, tokenizer = tiny_lm(family)
    lm = wrap_model(model.double(), tokenizer)
    text = "The name of the class is"
    spans_of = {"name": ((4, 8), (2, 6)), "class": ((16, 21), (14, 18))}
    pair = Pair(text, "A name of the type is", " in", " of", spans_of)
    result = knock_out(lm, [pair], [("name", "class"), ("name", "last")],
                       PatchConfig(check_chance=False))  # fmt: skip
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    spans = {name: _span(tokenizer, text, *pair.positions[name][0]) for name in pair.positions}
    last = range(ids.shape[1] - 1, ids.shape[1])
    answer, wrong = (tokenizer(text + x)["input_ids"][ids.shape[1]] for x in (" in", " of"))
    plain = _difference(lm, ids, None, answer, wrong)
    for edge, targets in (("name:class", spans["class"]), ("name:last", last)):
        size = ids.shape[1]
        mask = torch.zeros(1, 1, size, size, dtype=torch.float64)
        mask.masked_fill_(~torch.ones(size, size, dtype=torch.bool).tril(), float("-inf"))
        for t in targets:
            mask[0, 0, t, list(spans["name"])] = float("-inf")
        expected = _difference(lm, ids, mask, answer, wrong) - plain
        found = {(c.at, c.node.layer): e for c, e in zip(result.cells, result.effects[0],
                                                         strict=True)}  # fmt: skip
        assert found[edge, lm.n_layers - 1] == pytest.approx(expected, abs=1e-10)
        assert expected != 0


def _span(tokenizer: Any, text: str, start: int, end: int) -> range:
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    return range(inside[0], inside[-1] + 1)


def _difference(
    lm: LanguageModel, ids: torch.Tensor, mask: torch.Tensor | None, answer: int, wrong: int
) -> float:
    with torch.no_grad(), head_tap(lm):  # in float64, which eager attention is not
        logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, -1]
    return float(logits[answer] - logits[wrong])


def test_the_hand_built_circuit_loses_its_edges(toy: LanguageModel, scenes: list[Pair]) -> None:
    result = knock_out(toy, scenes, [("object", "last"), ("label", "object"), ("label", "last")])
    found = {(row["at"], row["layer"]): row["effect"] for row in result.summary}
    # The fetcher, in block 1, looks from the last token at the object.
    assert found["object:last", 0] == pytest.approx(0, abs=1e-4)
    assert found["object:last", 1] < -5
    # The mover, in block 0, looks from the object at the label before it.
    assert found["label:object", 0] < -5
    assert found["label:last", 1] == pytest.approx(0, abs=1e-3)
    assert result.summary[0]["name"] == "cut 0 to 0 at object:last"
    assert np.isfinite(result.effects).all() and result.maps()[0][3].shape == (2, 3)


def test_what_cannot_be_cut(toy: LanguageModel, scenes: list[Pair]) -> None:
    with pytest.raises(UsageError, match="`edges` last:object: the first must lie before"):
        knock_out(toy, scenes, [("last", "object")])
    with pytest.raises(UsageError, match="`at` must be one of first, last"):
        knock_out(toy, scenes, [("thing", "last")])
    with pytest.raises(UsageError, match="`edges` names none"):
        knock_out(toy, scenes, [])
