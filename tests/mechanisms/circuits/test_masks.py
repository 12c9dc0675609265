"""A learned mask picks the head that carries the answer, and says when there is none."""

import pytest

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.circuits.masks import learn_mask
from saesteer.mechanisms.config import MaskConfig
from saesteer.mechanisms.data.encoding import encode_pairs
from saesteer.mechanisms.data.pairs import Pair
from saesteer.mechanisms.toys.hand_built import hand_built_scenes
from saesteer.sae.model.language_model import LanguageModel


def test_the_head_that_carries_the_object(toy: LanguageModel) -> None:
    pairs, _ = encode_pairs(toy, hand_built_scenes(48, 2))
    mask = learn_mask(toy, pairs, "last", MaskConfig(seeds=2))
    assert mask.heads == ((1, 1),) and mask.by_seed == (((1, 1),),) * 2 and mask.jaccard == 1
    assert mask.accuracy.value == mask.every.value == 1 and mask.random.value == 0
    assert mask.n_test >= 10
    elsewhere = learn_mask(toy, pairs, "label", MaskConfig(seeds=1))
    assert elsewhere.heads == () and elsewhere.accuracy.value == 0


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
