"""The proxy equals a sort of all projections, and is smallest for the true directions."""

import pytest
import torch

from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.measuring.decoder_projection import decoder_projection
from saesteer.sae.measuring.matching import unit_rows


def sae_of(W_dec: torch.Tensor, b_dec: torch.Tensor) -> SAE:
    d_sae, d_model = W_dec.shape
    spec = SAESpec(architecture="standard", d_model=d_model, d_sae=d_sae)
    return SAE(spec, W_dec.T.clone(), torch.zeros(d_sae), W_dec, b_dec)


def test_equals_a_sort() -> None:
    rng = torch.Generator().manual_seed(0)
    x, b_dec = torch.randn(41, 8, generator=rng), torch.randn(8, generator=rng)
    W_dec = 3 * torch.randn(20, 8, generator=rng)
    products = (x - b_dec) @ (W_dec / W_dec.norm(dim=1, keepdim=True)).T
    ordered = products.flatten().sort(descending=True).values
    for n in (1, 7, 19):
        found = decoder_projection(sae_of(W_dec, b_dec), x, n)
        assert found == {"n": n, "rows": 41, "value": pytest.approx(float(ordered[n * 41]))}
    assert decoder_projection(sae_of(W_dec, b_dec), x)["n"] == 10


def test_mixtures_of_features_project_further() -> None:
    """Rows that mix features lie on more inputs than the features themselves do."""
    rng = torch.Generator().manual_seed(1)
    features = torch.linalg.qr(torch.randn(32, 32, generator=rng)).Q
    x = ((torch.rand(400, 32, generator=rng) < 0.05) * 1.0) @ features
    mixed = unit_rows(features + 0.5 * features.roll(1, dims=0))
    right = decoder_projection(sae_of(features, torch.zeros(32)), x, 3)["value"]
    wrong = decoder_projection(sae_of(mixed, torch.zeros(32)), x, 3)["value"]
    assert right < 1e-5 and wrong > 0.1
