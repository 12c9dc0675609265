"""Rows are thinned evenly when they would not fit, and nothing else is lost."""

import torch

from saesteer.sae.reading.sampled_rows import SampledRows


def rows(most: int) -> tuple[SampledRows, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    fires = torch.rand(100, 9, generator=rng) < 0.3
    fires[17] = False
    kept = SampledRows(9, most)
    for first in range(0, 100, 7):
        part = fires[first : first + 7]
        row, latent = part.nonzero(as_tuple=True)
        numbers = torch.arange(first, first + len(part))
        kept.add(row, latent, 3 * numbers, numbers % 2 == 1)
    return kept, fires


def test_every_row_is_kept_where_they_fit() -> None:
    kept, fires = rows(10_000)
    assert kept.stride == 1 and kept.rows == 100
    assert kept.matrix().toarray().tolist() == fires.int().tolist()
    assert kept.tokens().tolist() == [3 * i for i in range(100)]
    assert kept.held_out().tolist() == [i % 2 == 1 for i in range(100)]


def test_else_every_second_fourth_and_so_on() -> None:
    kept, fires = rows(100)
    assert kept.stride == 4 and kept.rows == 25
    assert kept.matrix().toarray().tolist() == fires[::4].int().tolist()
    assert kept.tokens().tolist() == [3 * i for i in range(0, 100, 4)]
    assert kept.matrix().nnz <= 100


def test_nothing_read_is_nothing_kept() -> None:
    assert SampledRows(9).matrix().shape == (0, 9)
