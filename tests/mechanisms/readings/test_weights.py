"""Weights of two models: subspaces, words, noise of equal norm, and what is refused."""

import json

import numpy as np
import pytest
import torch

from saesteer.checkpoints.errors import UserError
from saesteer.mechanisms.reading_config import DiffConfig
from saesteer.mechanisms.readings.concepts import (
    direction_words,
    field_shares,
    largest_angle,
    leading_directions,
    neuron_rows,
    overlap,
)
from saesteer.mechanisms.readings.weights import compare_words, diff, noise_like
from saesteer.mechanisms.readings.word_lists import INSTRUCTION_VERBS, matched_verbs
from saesteer.mechanisms.reports.saving import render_reading
from saesteer.sae.model.language_model import LanguageModel, wrap_model

from ..families import EVERY, Make, double


@pytest.mark.parametrize("family", EVERY)
def test_neuron_rows_are_what_the_mlp_writes(tiny_lm: Make, family: str) -> None:
    lm = double(tiny_lm, family)
    if family == "mixtral":
        with pytest.raises(UserError, match="no one matrix"):
            neuron_rows(lm, 1)
        return
    rows = neuron_rows(lm, 1)
    names = {"gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h", "phi": "mlp.fc2"}
    module = lm.blocks[1].get_submodule(names.get(family, "mlp.down_proj"))
    neuron = torch.zeros(rows.shape[0], dtype=torch.float64)
    neuron[3] = 1
    with torch.no_grad():
        written = module(neuron[None])[0] - module(torch.zeros_like(neuron)[None])[0]
    assert torch.allclose(written, rows[3], atol=1e-12)


def test_subspaces_by_hand() -> None:
    drawn = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=drawn).double())[0]
    scores = torch.randn(400, 3, generator=drawn).double() * torch.tensor([9.0, 3.0, 1.0])
    found, share = leading_directions(scores @ basis[:, :3].T + 5, 3)
    assert overlap(found, basis[:, :3]) == pytest.approx(1)
    assert float(share.sum()) == pytest.approx(1) and share[0] > 0.8
    assert overlap(basis[:, :3], basis[:, 3:6]) == pytest.approx(0, abs=1e-12)
    turned = basis[:, :3].clone()
    turned[:, 0] = np.cos(0.5) * basis[:, 0] + np.sin(0.5) * basis[:, 9]
    assert overlap(basis[:, :3], turned) == pytest.approx((2 + np.cos(0.5) ** 2) / 3)
    assert largest_angle(basis[:, :3], turned) == pytest.approx(np.degrees(0.5))


def test_words_of_a_direction(tiny_lm: Make) -> None:
    lm = double(tiny_lm, "llama")
    row = lm.unembed.weight[150].detach()
    ((plus, minus),) = direction_words(lm, (row / row.norm())[:, None], 5)
    assert plus[0] == lm.tokenizer.convert_ids_to_tokens(150) and len(minus) == 5
    shares = field_shares([(["Ġcode", "x"], ["Code", "y"])] * 3, {"code": ["code"], "a": ["b"]}, 0)
    assert shares["code"] == {"value": 0.5, "low": 0.5, "high": 0.5} and shares["a"]["value"] == 0


def test_noise_has_the_norm_of_the_change(tiny_lm: Make) -> None:
    one, two = double(tiny_lm, "llama"), _moved(tiny_lm, 0.1)
    noised = noise_like(one, two, 0)
    after, base = dict(two.model.named_parameters()), dict(one.model.named_parameters())
    for name, parameter in noised.model.named_parameters():
        assert float((parameter - base[name]).norm()) == pytest.approx(
            float((after[name] - base[name]).norm()), rel=1e-5
        )
    assert not torch.allclose(noised.unembed.weight, after["lm_head.weight"], atol=1e-3)


def test_words_that_gain_pairs_are_found() -> None:
    words = [f"v{i}" for i in range(12)] + [f"o{i}" for i in range(12)]
    drawn = np.random.default_rng(0)
    base = drawn.integers(3, 9, (9, 4, 24))
    noise = base + drawn.choice([-1, 1], base.shape)
    tuned = base + drawn.choice([-1, 1], base.shape)
    tuned[:8, :, :12] = base[:8, :, :12] + drawn.choice([-1, 1, 1, 1], (8, 4, 12))
    low, high = compare_words([base, tuned, noise], words, words[:12], words[12:], 0)
    assert low["blocks"] == [0, 7] and high["blocks"] == [8, 8]
    assert low["tuned"]["verbs"] > 0.65 > low["tuned"]["others"]
    assert low["tuned"]["p_adjusted"] < 0.01 < low["noise"]["p_adjusted"]


def test_two_models(tiny_lm: Make) -> None:
    one, two = double(tiny_lm, "llama"), _moved(tiny_lm, 0.05)
    found = diff(one, two, DiffConfig(k=6, most=15, top=5), words=["dog", "cat", "house"])
    assert len(found.concepts) == 4 and len(found.heads) == 1 and len(found.pairs[0]) == 4
    for row in found.concepts:
        assert 0.3 < row["overlap"] < 1 and row["unrelated"] == pytest.approx(6 / 32)
    assert found.concepts[0]["between_blocks"] is None
    page = render_reading(found)
    assert "What MLPs write" in page and "Word pairs of heads" in page
    json.dumps(found.document())
    assert len(found.to_frame()) == 4 and "block" in repr(found)


def test_models_that_cannot_be_compared(tiny_lm: Make) -> None:
    one = double(tiny_lm, "llama")
    with pytest.raises(UserError, match="nothing to see"):
        diff(one, double(tiny_lm, "llama"))
    with pytest.raises(UserError, match="is not of the form"):
        diff(one, double(tiny_lm, "gpt2"))


def test_verbs_are_matched_by_frequency() -> None:
    others = matched_verbs(["write", "summarize"], ["open", "slither", "work", "write"])
    assert len(set(others)) == 2 and "write" not in others
    assert len(INSTRUCTION_VERBS) == len(set(INSTRUCTION_VERBS))


def _moved(tiny_lm: Make, size: float) -> LanguageModel:
    model, tokenizer = tiny_lm("llama")
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=drawn)
    return wrap_model(model.double(), tokenizer, "tuned")
