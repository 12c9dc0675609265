"""A planted interaction is found, an additive code is not."""

import numpy as np

from saesteer.mechanisms.routes.superadditivity import interaction_tests

SETS = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]


def effects(interaction: float, n: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed)
    single = drawn.normal(1, 0.5, (n, 3))
    pairs = [single[:, a] + single[:, b] + drawn.normal(0, 0.3, n) for a, b in SETS[3:]]
    pairs[0] += interaction
    return np.column_stack([single, *pairs])


def test_planted_and_additive() -> None:
    groups = [str(i) for i in range(40)]
    found = interaction_tests(effects(1.0, 40, 0), SETS, [3, 4, 5], range(40), groups, SETS, 0)
    planted, *others = found
    assert planted["layers"] == [0, 1] and planted["p_adjusted"] < 1e-6 and planted["low"] > 0.7
    assert all(row["p_adjusted"] > 0.05 for row in others)
    # Subadditive is no finding: the test is one-sided.
    under = interaction_tests(effects(-1.0, 40, 0), SETS, [3], range(40), groups, SETS, 0)
    assert under[0]["p_adjusted"] > 0.99 and under[0]["above"] + under[0]["below"] == 40


def test_the_null_is_rejected_as_often_as_said() -> None:
    runs = 120
    hits = sum(
        interaction_tests(
            effects(0.0, 21, seed), SETS, [3], range(21), list(map(str, range(21))), SETS, 0
        )[0]["p_adjusted"] < 0.05
        for seed in range(runs)
    )  # fmt: skip
    assert hits <= 14  # P(Binomial(120, .05) > 14) < .001


def test_few_groups_have_no_interval_and_rows_choose() -> None:
    table = effects(1.0, 12, 1)
    found = interaction_tests(table, SETS, [3], range(6), list("abcdef"), SETS, 0)
    assert found[0]["low"] is None and found[0]["above"] == 6
    assert interaction_tests(table, SETS, [], range(6), list("abcdef"), SETS, 0) == []
