"""Attributions against a loop, captum, completeness and the frozen sum."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.data.instructed import InstructedPrompt, read_instructed, task_prompts
from saesteer.mechanisms.reading_config import AttributeConfig
from saesteer.mechanisms.readings.attribution import (
    _logits,
    attribute,
    input_output,
    mean_embedding,
    reply_logprobs,
)
from saesteer.mechanisms.readings.attribution_result import compare_attributions, welch
from saesteer.mechanisms.reports.saving import save_reading
from saesteer.mechanisms.routes.frozen import FrozenNetwork

from ..families import EVERY, Make, double

PROMPT, REPLY = [5, 9, 77, 123, 42], [8, 200, 31, 7, 11, 60, 3, 90, 12]
QUICK = AttributeConfig(chat=False, max_new_tokens=6)


@pytest.mark.parametrize("family", EVERY)
def test_chunks_equal_a_loop(tiny_lm: Make, family: str) -> None:
    lm = double(tiny_lm, family)
    found = input_output(lm, PROMPT, REPLY, QUICK)
    ids = torch.tensor([[*PROMPT, *REPLY]])
    start = lm.model.get_input_embeddings()(ids).detach().requires_grad_(True)
    logprobs = _logits(lm, ids, start).log_softmax(-1)
    for m in (0, 4, 8):
        value = logprobs[len(PROMPT) - 1 + m, REPLY[m]]
        (grad,) = torch.autograd.grad(value, start, retain_graph=True)
        expected = (grad * start)[0, : len(PROMPT)].sum(-1).detach().numpy()
        assert found[:, m] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_probabilities_are_scaled_columns_and_some_outputs_are_some(tiny_lm: Make) -> None:
    lm = double(tiny_lm, "llama")
    plain = input_output(lm, PROMPT, REPLY, QUICK)
    scaled = input_output(lm, PROMPT, REPLY, replace(QUICK, target="prob"))
    p = scaled.sum(0) / plain.sum(0)
    assert np.allclose(scaled, plain * p, atol=1e-6) and (p > 0).all() and (p < 1).all()
    assert np.allclose(input_output(lm, PROMPT, REPLY, QUICK, [2, 5]), plain[:, [2, 5]])


def test_the_frozen_sum_is_exact(tiny_lm: Make) -> None:
    """Tokens of prompt and reply add up to the logit minus the mean logit: Llama has no biases."""
    lm = double(tiny_lm, "llama")
    whole = [*PROMPT, *REPLY]
    everything = input_output(lm, whole, [4], replace(QUICK, method="frozen"))
    logits = FrozenNetwork(lm, whole).logits
    assert everything.sum() == pytest.approx(float(logits[4] - logits.mean()), abs=1e-12)


def test_integrated_gradients_are_complete(tiny_lm: Make) -> None:
    lm = double(tiny_lm, "llama")
    found = input_output(lm, PROMPT, REPLY, replace(QUICK, method="ig", ig_steps=64))
    ids = torch.tensor([[*PROMPT, *REPLY]])
    embeddings = lm.model.get_input_embeddings()(ids).detach()
    empty = embeddings.clone()
    empty[:, : len(PROMPT)] = mean_embedding(lm)
    ends = [_logits(lm, ids, point).log_softmax(-1) for point in (embeddings, empty)]
    at = torch.arange(len(REPLY)) + len(PROMPT) - 1
    gap = (ends[0] - ends[1])[at, torch.tensor(REPLY)]
    # The path's midpoint rule; the library's norms compute in float32.
    assert found.sum(0) == pytest.approx(gap.detach().numpy(), abs=2e-2)


def test_captum_gives_the_same(tiny_lm: Make) -> None:
    captum = pytest.importorskip("captum.attr", reason="captum is not installed")
    lm = double(tiny_lm, "llama")
    ids = torch.tensor([[*PROMPT, *REPLY]])
    embeddings = lm.model.get_input_embeddings()(ids).detach()
    mean = embeddings.clone()
    mean[:, : len(PROMPT)] = mean_embedding(lm)

    def value(start: torch.Tensor) -> torch.Tensor:
        rows = [_logits(lm, ids, one[None]).log_softmax(-1)[len(PROMPT) + 1, REPLY[2]]
                for one in start]  # fmt: skip
        return torch.stack(rows)

    ours = input_output(lm, PROMPT, REPLY, QUICK, [2])[:, 0]
    theirs = captum.InputXGradient(value).attribute(embeddings.requires_grad_(True))
    assert ours == pytest.approx(theirs[0, : len(PROMPT)].sum(-1).detach().numpy(), abs=1e-9)
    ours = input_output(lm, PROMPT, REPLY, replace(QUICK, method="ig", ig_steps=8), [2])[:, 0]
    theirs = captum.IntegratedGradients(value).attribute(
        embeddings, baselines=mean, n_steps=8, method="riemann_middle", internal_batch_size=8
    )
    assert ours == pytest.approx(theirs[0, : len(PROMPT)].sum(-1).detach().numpy(), abs=1e-6)


def test_ablating_nothing_costs_nothing(tiny_lm: Make) -> None:
    lm = double(tiny_lm, "llama")
    whole, same, less = reply_logprobs(lm, PROMPT, REPLY, [[], [], [1, 2]])
    assert whole == same != less


def test_prompts_are_scored_and_two_models_compared(tiny_lm: Make, tmp_path: Path) -> None:
    lm = double(tiny_lm, "llama")
    found = attribute(lm, "french", QUICK, n=3)
    assert len(found.prompts) == 3 and found.short == 0
    for one in found.prompts:
        words = "".join(one.tokens[slice(*one.span)]).replace("Ġ", " ")
        assert "Translate the sentence to French." in words
        assert one.scores.shape == (len(one.tokens), len(one.reply_ids))
        assert 0 <= one.score and one.followed is False
    document = save_reading(tmp_path, found)
    assert document["summary"]["score"]["low"] is None  # three prompts have no interval
    assert "text-decoration:underline" in (tmp_path / "report.html").read_text()
    other = double(lambda family: tiny_lm(family, seed=1), "llama")
    replies = [one.reply_ids for one in found.prompts]
    again = attribute(other, task_prompts("french", 3, 0), QUICK, replies=replies)
    compared = compare_attributions(found, again)
    assert compared["n"] == 3 == compared["above"] + compared["below"]
    assert compared["reply_tokens"] == [6.0, 6.0]
    same = compare_attributions(found, found)
    assert same["difference"] == 0 and same["sign_p"] == 1


def test_gold_replies_and_short_ones(tiny_lm: Make, tmp_path: Path) -> None:
    lm = double(tiny_lm, "llama")
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "Say it. Sky", "instruction": "Say it.", "reply": "the sky is all blue today"},
        {"prompt": "Say it. Sea", "instruction": [0, 7], "reply": "x", "followed": True},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_instructed(file)[0].span == read_instructed(file)[1].span == (0, 7)
    found = attribute(lm, file, replace(QUICK, outputs=2))
    assert found.short == 1 and len(found.prompts) == 1 and len(found.prompts[0].outputs) == 2
    with pytest.raises(UserError, match="none of 1 replies has 5 tokens"):
        attribute(lm, [InstructedPrompt("Say it.", (0, 3), "x")], QUICK)
    with pytest.raises(UsageError, match="over `budget_minutes` 1e-07"):
        attribute(lm, file, replace(QUICK, budget_minutes=1e-7))
    file.write_text('{"prompt": "a", "instruction": "b"}\n')
    with pytest.raises(UserError, match="line 1: instruction must be"):
        read_instructed(file)


def test_welch_needs_two_that_vary() -> None:
    assert welch([1.0], [2.0, 3.0]) is None and welch([1.0, 1.0], [1.0, 1.0]) is None
    assert welch([5.0, 6.0, 7.0], [1.0, 2.0, 3.0]) < 0.02  # type: ignore[operator]
