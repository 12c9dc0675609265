"""Agreement of rankings over parts of the texts."""

import numpy as np
import pytest
import torch
from scipy import stats

from saesteer.steering.ranking.detection_scores import NO_VARIANT, TextsBuilder, detect
from saesteer.steering.ranking.stability import compare, stability
from saesteer.steering.tasks.task import Task, Variant

TASK = Task(
    name="lists",
    instruction="Use a list",
    variants=(Variant("Make it a list"), Variant("Faites une liste", "fr")),
    contents={"train": tuple("abcdefgh")},
)


def test_rank_correlation_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    rows = np.round(rng.standard_normal((3, 40)), 1)
    found = compare(("a", "b", "c"), rows, 5, "saif")
    rho = [stats.spearmanr(rows[i], rows[j]).statistic for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found.spearman == pytest.approx(np.mean(rho))
    assert found.spearman_lowest == pytest.approx(min(rho))


def test_a_part_that_does_not_vary_correlates_with_nothing() -> None:
    found = compare(("a", "b"), np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), 2, "saif")
    assert found.spearman_pairs[0][1] == found.spearman == 0.0


def test_jaccard_counts_what_tops_share() -> None:
    rows = np.array([[9.0, 8, 7, 0, 0], [0, 8, 7, 9, 0], [9, 8, 0, 0, 0]])
    found = compare(("a", "b", "c"), rows, 3, "saif")
    # {0,1,2} {1,2,3} {0,1}: the third has no third latent above neutral.
    assert found.jaccard == pytest.approx((2 / 4 + 2 / 3 + 1 / 4) / 3)
    assert found.jaccard_lowest == 1 / 4
    assert found.jaccard_pairs == ((1, 2 / 4, 2 / 3), (2 / 4, 1, 1 / 4), (2 / 3, 1 / 4, 1))
    assert [row[i] for i, row in enumerate(found.spearman_pairs)] == pytest.approx([1, 1, 1])
    assert found.spearman_pairs[0][1] == found.spearman_pairs[1][0]


def test_parts_are_scored_alone() -> None:
    """Latent 7 follows the meaning, 2 one wording, 5 the English ones; 4 is never on."""
    on = {7: (0, 1, 2), 2: (1,), 5: (0, 1)}
    builder = TextsBuilder(9)
    for content in range(8):
        builder.add(torch.zeros(9), positive=False, content=content, variant=NO_VARIANT,
                    success=False)  # fmt: skip
        for variant in range(3):
            acts = torch.zeros(9)
            for latent, wordings in on.items():
                acts[latent] = float(variant in wordings)
            builder.add(acts, positive=True, content=content, variant=variant, success=True)
    texts = builder.build()
    found = stability("saif", texts, TASK, k=1)
    assert found.latents.tolist() == [2, 5, 7]
    parts, scores = found.parts["variants"]
    assert parts == ("Use a list", "Make it a list", "Faites une liste")
    assert scores.tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 1]]
    for row, variant in zip(scores, range(3), strict=True):
        alone = texts.select((texts.variant == variant) | ~texts.positive)
        np.testing.assert_array_equal(row, detect(alone).scores["saif"][[2, 5, 7]])
    assert found.parts["languages"][0] == ("en", "fr")
    assert found.of(7)["variants"] == {"lowest": 1, "highest": 1, "in_top": 1 / 3}
    assert found.of(5)["languages"] == {"lowest": 0, "highest": 1, "in_top": 1 / 2}
    assert found.of(4) == {}
    assert len(found.parts["contents"][0]) == 4
    assert found.agreement["contents"].jaccard == 1
    assert set(found.summary()) == {"by", "k", "variants", "languages", "contents"}


def test_one_part_is_compared_with_nothing() -> None:
    builder = TextsBuilder(2)
    builder.add(torch.zeros(2), positive=False, content=0, variant=NO_VARIANT, success=False)
    builder.add(torch.ones(2), positive=True, content=0, variant=0, success=True)
    found = stability("rate", builder.build(), TASK, k=15)
    assert found.agreement == {}
    assert found.of(0) == {}
