"""A learned mask picks the head that carries the answer, and says when there is none."""

import random

import pytest
import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.circuits.masks import _Exchange, learn_mask
from saesteer.mechanisms.config import MaskConfig
from saesteer.mechanisms.data.encoding import encode_pairs
from saesteer.mechanisms.data.pairs import Pair
from saesteer.mechanisms.patching.reference import patched_logits
from saesteer.mechanisms.patching.sites import Node, Patch, read_values
from saesteer.mechanisms.toys.hand_built import hand_built_desiderata, hand_built_scenes
from saesteer.sae.model.language_model import LanguageModel


def test_the_head_that_carries_the_object(toy: LanguageModel) -> None:
    pairs, _ = encode_pairs(toy, hand_built_scenes(48, 2))
    mask = learn_mask(toy, pairs, "last", MaskConfig(seeds=2))
    assert mask.heads == ((1, 1),) and mask.by_seed == (((1, 1),),) * 2 and mask.jaccard == 1
    assert mask.accuracy.value == mask.every.value == 1 and mask.random.value == 0
    assert mask.n_test >= 10
    elsewhere = learn_mask(toy, pairs, "label", MaskConfig(seeds=1))
    assert elsewhere.heads == () and elsewhere.accuracy.value == 0


def test_position_and_label_are_carried_by_no_head(toy: LanguageModel) -> None:
    """The model looks a letter up where it stands: no head holds a place, nor the letter asked for
    at the last token; the object is carried by (1,1)."""
    config = MaskConfig(seeds=1)
    found = {}
    for kind in ("object", "position", "label"):
        pairs, _ = encode_pairs(toy, hand_built_desiderata(kind, 48, 3))
        found[kind] = learn_mask(toy, pairs, "last", config, wanted=kind)
        assert found[kind].wanted == kind
    assert found["object"].heads == ((1, 1),) and found["object"].accuracy.value == 1
    assert found["position"].heads == found["label"].heads == ()
    assert found["position"].every.value < 0.2 and found["label"].every.value < 0.2


def test_an_exchange_is_patches_made_one_by_one(toy: LanguageModel) -> None:
    """At any mask, z of the base is mixed with that of the pair's own source."""
    pairs, _ = encode_pairs(toy, hand_built_desiderata("object", 12, 5))
    work = _Exchange(toy, pairs, "object", own_answers=False)
    order = list(pairs)
    random.Random(0).shuffle(order)
    mask = torch.ones(work.shape)
    mask[0, 0] = 0.25
    logits = work.logits(mask, work.parts[2])
    for row, (base, source) in enumerate(work.parts[2]):
        pair = order[base]
        assert source == base + 12 and int(work.wanted[source]) == pair.answer
        node = Node("z", 0, 0)
        (theirs,), _ = read_values(toy, pair.corrupt, [(node, pair.place("object")[1])])
        (own,), _ = read_values(toy, pair.clean, [(node, pair.place("object")[0])])
        mixed = Patch(node, pair.place("object")[0], 0.25 * own + 0.75 * theirs)
        expected = patched_logits(toy, pair.clean, [mixed])
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-4)


def test_what_cannot_be_learned_on(toy: LanguageModel, scenes: list[Pair]) -> None:
    pairs, _ = encode_pairs(toy, scenes)
    with pytest.raises(UserError, match="a mask needs 12 pairs or more, got 11"):
        learn_mask(toy, pairs[:11])
    other, _ = encode_pairs(toy, [Pair("boxes A ball . A", "boxes C cup . D", " ball", " cup")])
    with pytest.raises(UsageError, match="prompts of one length"):
        learn_mask(toy, [*pairs, *other])
    for settings in ({"seeds": 0}, {"lr": 0.0}, {"lam": -1.0}):
        with pytest.raises(UsageError, match=f"`{next(iter(settings))}` must be"):
            MaskConfig(**settings)  # type: ignore[arg-type]
