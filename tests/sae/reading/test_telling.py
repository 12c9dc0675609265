"""Telling tokens are those of the log-odds, computed one by one."""

import math

import numpy as np
import pytest
import torch

from saesteer.sae.reading.telling import LEAST, PRIOR, telling_tokens

from .made_up_text import LATENTS, collected, made_up


def twin(fires: torch.Tensor, tokens: list[int]) -> list[tuple[float, int, int, int]]:
    """(z, token, fired, rows) of the tokens of one latent, best first."""
    total, fired, found = len(tokens), int(fires.sum()), []
    for token in sorted(set(tokens)):
        rows = tokens.count(token)
        on = sum(bool(f) for f, t in zip(fires, tokens, strict=True) if t == token)
        if not on:
            continue
        prior = PRIOR * rows / total
        odds = (on + prior) / (fired + PRIOR - on - prior)
        others = (rows - on + prior) / (total - fired + PRIOR - (rows - on) - prior)
        deviation = math.sqrt(1 / (on + prior) + 1 / (rows - on + prior))
        found.append(((math.log(odds) - math.log(others)) / deviation, token, on, rows))
    return sorted(found, key=lambda one: -one[0])


def test_they_equal_a_loop_over_all_tokens() -> None:
    text = made_up()
    rows = collected(text).rows
    found = telling_tokens(rows.matrix(), rows.tokens(), list(range(LATENTS)), 5)
    tokens = text.batch.token_ids[text.keep].tolist()
    fires = text.acts[text.keep] != 0
    for latent in range(LATENTS):
        expected = [one for one in twin(fires[:, latent], tokens)[:5] if one[0] >= LEAST]
        got = [(one.z, one.token, one.fired, one.rows) for one in found[latent]]
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected, strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=1e-9) and ours[1:] == theirs[1:]
    # Latent 1 fires on word 7, and nowhere else.
    (only,) = found[1]
    assert only.token == 7 and only.fired == only.rows == tokens.count(7)
    assert found[3] == []


def test_a_text_of_one_token_tells_nothing() -> None:
    from scipy.sparse import csr_array

    fires = csr_array(np.array([[1], [0], [1]]))
    assert telling_tokens(fires, np.array([5, 5, 5], dtype=np.int32), [0], 3) == [[]]
