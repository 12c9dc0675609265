"""Filters, duplicates and fusion, by hand."""

import torch

from saesteer.steering.ranking.reading import ControlRates
from saesteer.steering.ranking.selection import best_first, duplicates, filter_masks, fuse


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_order_is_by_score_then_mu_then_number() -> None:
    score = column(0.5, 0.9, 0.5, float("nan"), 0.5, -1.0)
    mu = column(1.0, 0.0, 2.0, 9.0, 2.0, 0.0)
    assert best_first(score, mu).tolist() == [1, 2, 4, 0, 5, 3]


def test_filters_know_dense_template_and_chance() -> None:
    control = ControlRates(5)
    on = torch.zeros(10, 5, dtype=torch.bool)
    other = torch.tensor([True] * 2 + [False] * 8)
    on[2:4, 0] = True  # on at 2 of 8 tokens of text: dense
    on[2:3, 1] = True  # at 1 of 8
    on[:2, 2] = True  # at the template alone
    on[:1, 3] = True  # at half of the template and 1 of 8 tokens of text
    on[5:6, 3] = True
    control.add(on, other)
    found = filter_masks(control, column(0.04, 0.05, 0.06, 1.0, 0.0), max_fdr=0.05)
    assert found["dense"].tolist() == [True, False, False, False, False]
    assert found["template"].tolist() == [False, False, True, False, False]
    assert found["fdr"].tolist() == [False, False, True, True, False]


def test_control_rates_add_up() -> None:
    control = ControlRates(1)
    for on in (True, False):
        control.add(torch.tensor([[on], [True]]), torch.tensor([False, True]))
    assert (control.text.item(), control.other.item()) == (0.5, 1.0)


def test_a_duplicate_names_the_better_latent() -> None:
    a, b = torch.eye(3)[0], torch.eye(3)[1]
    between = torch.tensor([1.0, 0.44, 0.0])  # cosine to a about .915, to the next about .88
    further = torch.tensor([1.0, 1.2, 0.0])  # near `between` (.93), which is gone itself
    rows = torch.stack([5 * a, b, between, -a, further])
    assert duplicates([40, 3, 7, 1, 9], rows) == {7: 40}


def test_fusion_is_a_sum_of_reciprocal_ranks() -> None:
    mu = column(0, 0, 0, 0)
    found = fuse(
        {"saif": column(0.9, 0.5, 0.0, -1.0), "output": column(float("nan"), 0.2, 0.4, -0.1)}, mu
    )
    assert found.tolist() == [1 / 61, 1 / 62 + 1 / 62, 1 / 61, 0.0]
    # Half is neutral for the area under the curve.
    assert fuse({"auroc": column(0.7, 0.5, 0.4, 0.6)}, mu).tolist() == [1 / 61, 0.0, 0.0, 1 / 62]
