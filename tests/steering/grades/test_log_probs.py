"""Nats per token in padded batches, against single runs."""

import pytest
import torch

from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.grades.log_probs import cross_entropies, nats_after


def test_cross_entropies_of_a_batch_are_those_of_single_rows(lm: LanguageModel) -> None:
    rows = [[5, 9, 300], [], [17], [40, 41, 42, 43, 44, 45, 46]]
    found = cross_entropies(lm, rows)
    assert found[1] is None
    for row, value in zip(rows, found, strict=True):
        if not row:
            continue
        ids = torch.tensor([[lm.tokenizer.bos_token_id, *row]])
        with torch.inference_mode():
            loss = lm.model(input_ids=ids, labels=ids).loss
        # float32, other shapes of the same products
        assert value == pytest.approx(float(loss), rel=1e-4)


def test_nats_after_prompts_are_those_of_single_rows(lm: LanguageModel) -> None:
    before = [[3, 4, 5, 6], [9], [7, 8]]
    rows = [[5, 9], [40, 41, 42, 43, 44], []]
    found = nats_after(lm, before, rows)
    assert found[2] is None
    for head, row, value in zip(before, rows, found, strict=True):
        if not row:
            continue
        with torch.inference_mode():
            logits = lm.model(input_ids=torch.tensor([[*head, *row]])).logits[0].double()
        total = 0.0
        for place, token in enumerate(row):  # each token from the position before it
            total -= float(torch.log_softmax(logits[len(head) + place - 1], dim=-1)[token])
        # float32, other shapes of the same products
        assert value == pytest.approx(total / len(row), rel=1e-4)
