"""Sums go to the document they are of, and intervals resample documents."""

import numpy as np
import torch

from saesteer.sae.measuring.tally import Tally

COLUMNS = ("first", "second")


def grid(shift: int = 0) -> dict[str, torch.Tensor]:
    return {name: torch.arange(6.0).reshape(2, 3) + at for at, name in enumerate(COLUMNS)}


def test_sums_are_grouped_by_document() -> None:
    tally = Tally(COLUMNS)
    owners = torch.tensor([[0, 0, 1], [1, 1, 2]])
    scored = torch.tensor([[True, True, True], [True, False, True]])
    tally.add(owners, scored, grid())
    tally.add(owners + 3, scored, grid())
    assert tally.documents == 6
    # Documents 1 and 4 lie in two contexts each; fewer than ten documents: contexts are units.
    assert sorted(tally.table()[:, 0].tolist()) == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 5.0, 5.0]
    for shift in range(6, 30, 3):
        tally.add(owners + shift, scored, grid())
    table = tally.table()
    assert len(table) == tally.documents == 30
    assert sorted(set(table[:, 0].tolist())) == [1.0, 5.0], "0 + 1, 2 + 3 and 5"


def test_intervals_are_of_ratios_of_sums() -> None:
    """A figure is made of resampled sums, not averaged over documents."""
    tally = Tally(COLUMNS)
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.random((2, 40, 1)) + 0.1)
    owners = torch.arange(40)[:, None]
    tally.add(
        owners, torch.ones(40, 1, dtype=torch.bool), {"first": values[0], "second": values[1]}
    )
    found = tally.summary(lambda sums: {"ratio": sums["first"] / sums["second"]}, 500, 3)["ratio"]
    assert found["value"] == float(values[0].sum() / values[1].sum())
    draws = np.random.default_rng(3).integers(40, size=(500, 40))
    slow = [float(values[0, d].sum() / values[1, d].sum()) for d in draws]
    np.testing.assert_allclose([found["low"], found["high"]], np.percentile(slow, [2.5, 97.5]))
