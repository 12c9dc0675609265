"""Pairs are those with the largest sum, and two SAEs are compared by them."""

import itertools

import pytest
import torch

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.measuring import matching
from saesteer.sae.measuring.matching import match, stability, unit_rows


def sae_of(W_dec: torch.Tensor) -> SAE:
    d_sae, d_model = W_dec.shape
    spec = SAESpec(architecture="standard", d_model=d_model, d_sae=d_sae)
    return SAE(spec, W_dec.T.clone(), torch.zeros(d_sae), W_dec, torch.zeros(d_model), source="it")


def test_the_best_of_all_permutations() -> None:
    similarity = torch.rand(6, 4, generator=torch.Generator().manual_seed(1))
    pairs = match(similarity)
    best = max(
        sum(float(similarity[i, j]) for j, i in enumerate(chosen))
        for chosen in itertools.permutations(range(6), 4)
    )
    assert float(pairs.similarity.sum()) == pytest.approx(best)
    assert len(set(pairs.first.tolist())) == len(set(pairs.second.tolist())) == 4
    assert torch.equal(similarity[pairs.first, pairs.second], pairs.similarity)


def test_stability_of_two_saes() -> None:
    rng = torch.Generator().manual_seed(2)
    rows = unit_rows(torch.randn(5, 64, generator=rng))
    # Two latents are the same, one is turned half away, one points the other way, one is split.
    half = unit_rows((rows[2] + unit_rows(torch.randn(1, 64, generator=rng))[0])[None])[0]
    other = torch.stack([7 * rows[1], 0.1 * rows[0], half, -rows[3], rows[4], rows[4]])
    found = stability(sae_of(rows), sae_of(other))
    cosines = unit_rows(rows) @ unit_rows(other).T
    assert found["pairs"] == 5 and found["d_sae"] == 6 and found["source"] == "it"
    assert found["best_cosine"] == pytest.approx(float(cosines.amax(dim=1).mean()))
    assert found["matched_cosine"] == pytest.approx(float(match(cosines).similarity.mean()))
    assert found["matched_share"] == pytest.approx(
        float((match(cosines).similarity > 0.7).float().mean())
    )
    assert 0.5 < found["matched_share"] < 0.9, "-rows[3] is another direction"
    same = stability(sae_of(rows), sae_of(rows.flip(0)))
    assert same["matched_cosine"] == pytest.approx(1.0) and same["matched_share"] == 1.0


def test_what_cannot_be_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="`against` it writes rows of width 4, the SAE it of width"):
        stability(sae_of(torch.eye(3)), sae_of(torch.eye(4)))
    monkeypatch.setattr(matching, "MOST_ROWS", 3)
    with pytest.raises(UserError, match="up to 3 rows of the smaller set, got 4"):
        stability(sae_of(torch.eye(4)), sae_of(torch.eye(4)))
