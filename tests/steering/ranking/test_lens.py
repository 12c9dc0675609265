"""The logit lens against its formula, in every kind of final norm."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.ranking.rank import lens_tokens

from ..ranking_by_hand import random_sae


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2"])
def test_lens_tokens_are_those_the_direction_raises(
    family: str, lm_of: Callable[..., LanguageModel]
) -> None:
    lm = lm_of(family)
    head = lm.model.get_output_embeddings().weight
    if family == "qwen2":  # its vocabulary is padded: make the untrained rows tempting
        with torch.no_grad():
            head[len(lm.tokenizer) :] *= 100
    W_U = head.double().numpy()
    norm = lm.final_norm
    assert norm is not None
    weight = norm.weight.double().numpy()  # type: ignore[operator, union-attr]
    for d in random_sae().W_dec[:3]:
        x = d.double().numpy()
        if family == "gpt2":
            normed = (x - x.mean()) / x.std() * weight
            normed = normed + norm.bias.double().numpy()  # type: ignore[operator, union-attr]
        else:
            gain = 1 + weight if family == "gemma2" else weight
            normed = x / np.sqrt((x**2).mean()) * gain
        logits = (W_U @ normed)[: len(lm.tokenizer)]
        wanted = [lm.tokenizer.decode([int(i)]) for i in np.argsort(-logits)[:5]]
        assert lens_tokens(lm, d, 5) == wanted
        assert lens_tokens(lm, d * 1e-3, 5) == wanted  # a direction's length means nothing
