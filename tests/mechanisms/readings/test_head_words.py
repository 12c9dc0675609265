"""q and k of words are the model's own, planes are its rotation, and counts are by hand."""

import numpy as np
import pytest
import torch

from saesteer.mechanisms.reading_config import DiffConfig
from saesteer.mechanisms.readings.head_words import (
    head_words,
    pair_counts,
    planes,
    queries_and_keys,
    related_words,
    word_embeddings,
)
from saesteer.sae.model.attention import head_tap

from ..families import EVERY, Make, double

WORDS = ["the", "value", "of", "class", "object"]


def test_words_are_read_as_the_model_would(tiny_lm: Make) -> None:
    """A whole pass in which a word stands alone before block 0 gives the same q and k there."""
    lm = double(tiny_lm, "llama")
    ids = lm.tokenizer(" the", add_special_tokens=False)["input_ids"]
    q, k = queries_and_keys(lm, word_embeddings(lm, ["the"]))
    seen = {}
    with head_tap(lm) as tap, torch.no_grad():
        tap.edits[0, "q"] = lambda x: seen.update(q=x[0, :, 0])
        tap.edits[0, "k"] = lambda x: seen.update(k=x[0, :, 0])
        lm.model(input_ids=torch.tensor([ids[:1]]))
    assert len(ids) == 1
    assert torch.allclose(q[0, 0], seen["q"].float(), atol=1e-5)
    assert torch.allclose(k[0, 0], seen["k"].float(), atol=1e-5)


@pytest.mark.parametrize("family", EVERY)
def test_planes_are_the_models_rotation(tiny_lm: Make, family: str) -> None:
    """The sum over planes by the formula is the model's own q k at a distance."""
    if family in ("gpt2", "phi", "gpt_neox"):  # no rotation, or of a part of each head
        return
    lm = double(tiny_lm, family)
    embeddings = word_embeddings(lm, WORDS)
    q, k = queries_and_keys(lm, embeddings)
    turned, _ = queries_and_keys(lm, embeddings, 3)
    turning = planes(turned, q)
    a, b = (torch.tensor(one) for one in zip(*turning, strict=True))
    layer, head = 1, 2
    q0, k0, q3 = q[layer, :, head], k[layer, :, head], turned[layer, :, head]
    angle = torch.atan2(q3[0, b], q3[0, a]) - torch.atan2(q0[0, b], q0[0, a])
    even = q0[:, None, a] * k0[None, :, a] + q0[:, None, b] * k0[None, :, b]
    odd = q0[:, None, a] * k0[None, :, b] - q0[:, None, b] * k0[None, :, a]
    by_planes = (even * angle.cos() + odd * angle.sin()).sum(-1)
    assert torch.allclose(by_planes, q3 @ k0.T, atol=1e-3)


def test_counts_by_hand() -> None:
    q = np.array([[3.0, -2.0], [0.1, 0.1], [-2.0, 0.2]])
    k = np.array([[2.0, -3.0], [1.5, 1.0], [0.0, 0.0]])
    every = np.ones((3, 3), dtype=bool)
    # Dimension 0: q words 0 and 2, k words 0 and 1; dimension 1: q 0 and 2, k 0 and 1.
    expected = np.zeros((3, 3))
    expected[0, 0] += 1  # 3 x 2
    expected[0, 1] += 1  # 3 x 1.5
    expected[0, 0] += 1  # -2 x -3
    expected[2, 1] += 1  # .2 x 1
    assert pair_counts(q, k, every, 2, None).tolist() == expected.tolist()
    some = every.copy()
    some[0, 0] = False
    assert pair_counts(q, k, some, 2, None)[0, 0] == 0
    # One plane: q words 0 and 2 by length, k words 0 and 1; products 12, 2.5, -4.6, -2.8.
    assert pair_counts(q, k, every, 2, [(0, 1)]).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_related_words_are_those_that_stand_out() -> None:
    drawn = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 40, generator=drawn)
    rows[1] = rows[0] + 0.1 * torch.randn(40, generator=drawn)
    found = related_words(rows, DiffConfig())
    assert found[0, 1] and found[1, 0] and not found.diagonal().any()
    assert 0.005 < found.mean() < 0.08
    assert related_words(rows, DiffConfig(related="none")).sum() == 60 * 59


def test_each_word_is_counted_by_head(tiny_lm: Make) -> None:
    lm = double(tiny_lm, "llama")
    config = DiffConfig(related="none", most=3)
    related = related_words(word_embeddings(lm, WORDS), config)
    found = head_words(lm, WORDS, related, config)
    assert found.shape == (4, 4, 5) and found.sum() % 2 == 0 and found.any()
    # Another distance adds pairs of planes.
    more = head_words(lm, WORDS, related, DiffConfig(related="none", most=3, distance=(0, 2)))
    assert (more >= found).all() and more.sum() > found.sum()
