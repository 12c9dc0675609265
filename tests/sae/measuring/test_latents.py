"""Counts of firings, in any cut of the rows, equal counts by hand."""

import numpy as np
import torch

from saesteer.sae.measuring.latents import LatentTally


def test_counts_by_hand() -> None:
    rng = torch.Generator().manual_seed(0)
    rates = torch.tensor([0.0, 0.0, 1.0, 0.5, 0.2, 0.05, 0.004])
    latents = (torch.rand(5000, 7, generator=rng) < rates).float() * -2.0  # negative values fire
    tally = LatentTally(7, torch.device("cpu"))
    for part in latents.split(777):
        tally.add(part)
    found = tally.summary()
    active = latents != 0
    assert tally.rows == 5000
    assert found["dead_latents"] == 2 and found["dead_fraction"] == 1 - 5 / 7
    assert found["dense_latents"] == {"above_0.1": 3, "above_0.01": 4}
    l0 = active.sum(dim=1).numpy()
    for name, value in found["l0_quantiles"].items():
        share = int(name[1:]) / 100
        assert value == np.quantile(l0, share, method="inverted_cdf"), name
    histogram = found["density_histogram"]
    density = active.double().mean(dim=0)
    edges = [*histogram["log10_from"], 1e-9]
    expected, _ = np.histogram(np.log10(density[density > 0].numpy()), bins=edges)
    assert histogram["latents"] == expected.tolist() and sum(expected) == 5


def test_no_rows() -> None:
    found = LatentTally(3, torch.device("cpu")).summary()
    assert found["dead_latents"] == 3 and set(found["l0_quantiles"].values()) == {0}
    assert sum(found["density_histogram"]["latents"]) == 0
