"""Detection scores against loops over samples and, where it is installed, scipy."""

import math
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from saesteer.steering.ranking.detection_scores import (
    LARGEST,
    NO_VARIANT,
    Texts,
    TextsBuilder,
    detect,
    mcnemar,
    significance_of,
)

D_SAE = 12
CONTENTS = 9
VARIANTS = 3

Array = NDArray[np.float64]


def made(seed: int = 0) -> tuple[Texts, Array, list[tuple[bool, int, int, bool]]]:
    """Random texts: zero-inflated, with ties, some latents silent, always on, or in one class."""
    rng = np.random.default_rng(seed)
    facts = [(False, content, NO_VARIANT, False) for content in range(CONTENTS)]
    facts += [
        (True, content, variant, bool(rng.random() < 0.7))
        for variant in range(VARIANTS)
        for content in range(CONTENTS - (variant == 2))  # one pair is missing
    ]
    facts = [facts[i] for i in rng.permutation(len(facts))]
    acts = np.round(rng.exponential(1.0, (len(facts), D_SAE)), 1)
    acts[rng.random(acts.shape) < np.linspace(0.05, 0.95, D_SAE)] = 0
    positive = np.array([fact[0] for fact in facts])
    acts[positive, 1] += 1
    acts[:, 2] = 0
    acts[~positive, 3] = 0
    acts[:, 4] += 0.5
    acts[positive, 5] = 0
    builder = TextsBuilder(D_SAE)
    for row, (with_it, content, variant, success) in zip(acts, facts, strict=True):
        builder.add(
            torch.from_numpy(row), positive=with_it, content=content, variant=variant,
            success=success,
        )  # fmt: skip
    return builder.build(), acts, facts


def slow_scores(acts: Array, facts: Sequence[tuple[bool, int, int, bool]]) -> dict[str, Array]:
    """Every score of every latent, one latent and one sample at a time."""
    names = ("saif", "rate", "logodds", "mcnemar", "meandiff", "cohen", "welch", "paired-t",
             "auroc", "mi", "corr")  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in names}
    for j in range(acts.shape[1]):
        one = [a[j] for a, f in zip(acts, facts, strict=True) if f[0]]
        uninstructed = [a[j] for a, f in zip(acts, facts, strict=True) if not f[0]]
        plain = {f[1]: a[j] for a, f in zip(acts, facts, strict=True) if not f[0]}
        pairs = [(a[j], plain[f[1]], f[1]) for a, f in zip(acts, facts, strict=True) if f[0]]
        n1, n0 = len(one), len(uninstructed)
        on1, on0 = sum(x > 0 for x in one), sum(x > 0 for x in uninstructed)
        b = sum(x > 0 and y == 0 for x, y, _ in pairs)
        c = sum(x == 0 and y > 0 for x, y, _ in pairs)
        m1, m0 = math.fsum(one) / n1, math.fsum(uninstructed) / n0
        v1 = math.fsum((x - m1) ** 2 for x in one) / (n1 - 1)
        v0 = math.fsum((x - m0) ** 2 for x in uninstructed) / (n0 - 1)
        found["saif"].append(b / len(pairs))
        found["rate"].append(on1 / n1 - on0 / n0)
        odds = (on1 + 0.5) * (n0 - on0 + 0.5) / ((n1 - on1 + 0.5) * (on0 + 0.5))
        found["logodds"].append(math.log(odds) if on1 / n1 != on0 / n0 else 0.0)
        found["mcnemar"].append(math.copysign((b - c) ** 2 / (b + c), b - c) if b + c else 0.0)
        found["meandiff"].append(m1 - m0)
        pooled = ((n1 - 1) * v1 + (n0 - 1) * v0) / (n1 + n0 - 2)
        found["cohen"].append((m1 - m0) / math.sqrt(pooled) if pooled else 0.0)
        error = math.sqrt(v1 / n1 + v0 / n0)
        found["welch"].append((m1 - m0) / error if error else 0.0)
        deltas = []
        for content in sorted(plain):
            mine = [x - y for x, y, which in pairs if which == content]
            deltas.append(math.fsum(mine) / len(mine))
        mean = math.fsum(deltas) / len(deltas)
        spread = math.fsum((d - mean) ** 2 for d in deltas) / (len(deltas) - 1)
        found["paired-t"].append(mean / math.sqrt(spread / len(deltas)) if spread else 0.0)
        won = sum((x > y) + (x == y) / 2 for x in one for y in uninstructed)
        found["auroc"].append(won / (n1 * n0))
        total = 0.0
        for kind, share in ((one, n1), (uninstructed, n0)):
            for on in (True, False):
                joint = sum((x > 0) == on for x in kind) / (n1 + n0)
                everywhere = sum((x > 0) == on for x in one + uninstructed) / (n1 + n0)
                apart = everywhere * share / (n1 + n0)
                total += joint * math.log(joint / apart) if joint else 0.0
        found["mi"].append(math.copysign(total, on1 / n1 - on0 / n0))
        y = [float(f[3]) for f in facts]
        x = [float(a[j]) for a in acts]
        mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
        cov = math.fsum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
        scale = math.sqrt(math.fsum((p - mx) ** 2 for p in x) * sum((q - my) ** 2 for q in y))
        found["corr"].append(cov / scale if scale else 0.0)
    return {name: np.array(column) for name, column in found.items()}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_score_is_that_of_loops(seed: int) -> None:
    texts, acts, facts = made(seed)
    found, wanted = detect(texts).scores, slow_scores(acts, facts)
    assert set(found) == set(wanted)
    for name, column in wanted.items():
        # Float64 sums in another order, at most a few dozen terms.
        np.testing.assert_allclose(found[name], column, rtol=1e-11, atol=1e-13, err_msg=name)
    assert np.abs(wanted["paired-t"]).max() > 1  # the samples say something


def test_p_values_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    texts, acts, facts = made()
    p = detect(texts).p
    positive = np.array([fact[0] for fact in facts])
    content = np.array([fact[1] for fact in facts])
    success = np.array([fact[3] for fact in facts])
    for j in range(D_SAE):
        one, uninstructed = acts[positive, j], acts[~positive, j]
        if not acts[:, j].any():
            assert all(column[j] == 1 for name, column in p.items() if name != "logodds")
            continue
        welch = stats.ttest_ind(one, uninstructed, equal_var=False)
        assert p["welch"][j] == pytest.approx(welch.pvalue, rel=1e-8)
        means = [acts[positive & (content == i), j].mean() for i in range(CONTENTS)]
        alone = [float(acts[~positive & (content == i), j][0]) for i in range(CONTENTS)]
        paired = stats.ttest_rel(means, alone)
        assert p["paired-t"][j] == pytest.approx(paired.pvalue, rel=1e-8)
        whitney = stats.mannwhitneyu(one, uninstructed, method="asymptotic")
        assert p["auroc"][j] == pytest.approx(whitney.pvalue, rel=1e-8)
        assert detect(texts).scores["auroc"][j] * len(one) * len(uninstructed) == pytest.approx(
            whitney.statistic
        )
        correlation = stats.pearsonr(acts[:, j], success)
        assert p["corr"][j] == pytest.approx(correlation.pvalue, rel=1e-8)
        table = np.array([[(one > 0).sum(), (one == 0).sum()],
                          [(uninstructed > 0).sum(), (uninstructed == 0).sum()]])  # fmt: skip
        if table.sum(axis=0).all():
            g = stats.chi2_contingency(table, correction=False, lambda_="log-likelihood")
            assert p["mi"][j] == pytest.approx(g.pvalue, rel=1e-8)


def test_a_latent_that_never_fires_says_nothing() -> None:
    found = detect(made()[0])
    silent = {name: column[2] for name, column in found.scores.items()}
    assert silent == {name: 0.5 if name == "auroc" else 0.0 for name in silent}


def test_a_difference_without_spread_is_finite() -> None:
    builder = TextsBuilder(2)
    for content in range(4):
        builder.add(torch.tensor([0.0, 1.0]), positive=False, content=content,
                    variant=NO_VARIANT, success=False)  # fmt: skip
        builder.add(torch.tensor([2.0, 1.0]), positive=True, content=content, variant=0,
                    success=True)  # fmt: skip
    found = detect(builder.build()).scores
    for name in ("cohen", "welch", "paired-t"):
        assert found[name].tolist() == pytest.approx([LARGEST, 0.0])
    assert found["auroc"].tolist() == [1.0, 0.5]


def test_without_spread_welch_is_sure_of_a_difference_and_of_none() -> None:
    """The first differs, the second is on alike, the third is off, the fourth varies."""
    builder = TextsBuilder(4)
    for content in range(4):
        for positive in (False, True):
            builder.add(
                torch.tensor([2.5 * positive, 1.0, 0.0, float(content)]), positive=positive,
                content=content, variant=0 if positive else NO_VARIANT, success=positive,
            )  # fmt: skip
    found = detect(builder.build())
    assert found.scores["welch"].tolist() == [LARGEST, 0.0, 0.0, 0.0]
    assert found.p["welch"].tolist() == [0.0, 1.0, 1.0, 1.0]
    # One discovery among four: q is p * 4 / rank.
    assert stats.false_discovery_control(found.p["welch"]).tolist() == [0.0, 1.0, 1.0, 1.0]


def test_only_what_is_asked_for_is_the_same() -> None:
    texts = made()[0]
    everything = detect(texts)
    for name, column in everything.scores.items():
        np.testing.assert_array_equal(detect(texts, [name]).scores[name], column)
    assert significance_of("cohen") == "welch"
    assert significance_of("causal") == "paired-t"


def test_the_order_of_texts_changes_nothing() -> None:
    texts, acts, facts = made()
    builder = TextsBuilder(D_SAE)
    for i in reversed(range(len(facts))):
        with_it, content, variant, success = facts[i]
        builder.add(torch.from_numpy(acts[i]), positive=with_it, content=content,
                    variant=variant, success=success)  # fmt: skip
    for name, column in detect(builder.build()).scores.items():
        np.testing.assert_allclose(column, detect(texts).scores[name], rtol=1e-12, atol=1e-14)


def test_texts_can_be_chosen() -> None:
    texts, acts, facts = made()
    chosen = texts.content < 6
    found = detect(texts.select(chosen)).scores
    kept = [i for i, fact in enumerate(facts) if fact[1] < 6]
    wanted = slow_scores(acts[kept], [facts[i] for i in kept])
    for name, column in wanted.items():
        np.testing.assert_allclose(found[name], column, rtol=1e-11, atol=1e-13)
    small, ids = texts.compact()
    assert 2 not in ids
    np.testing.assert_array_equal(detect(small).scores["auroc"], detect(texts).scores["auroc"][ids])


def test_a_million_latents_fit() -> None:
    """Memory grows with the number of latents, a dozen columns or two, and not with the texts."""
    d_sae, texts_in_all = 2**20, 260
    builder = TextsBuilder(d_sae)
    rng = np.random.default_rng(0)
    acts = torch.zeros(d_sae)
    tracemalloc.start()
    for i in range(texts_in_all):
        ids = torch.from_numpy(rng.choice(d_sae, 64, replace=False))
        acts[ids] = torch.from_numpy(rng.exponential(size=64)).float()
        builder.add(acts, positive=i >= 20, content=i % 20,
                    variant=i // 20 - 1 if i >= 20 else NO_VARIANT, success=i >= 20)  # fmt: skip
        acts[ids] = 0
    texts = builder.build()
    reading = tracemalloc.get_traced_memory()[1]
    found = detect(texts, ["saif", "auroc", "paired-t"]).scores
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    column = 8 * d_sae
    assert all(len(scores) == d_sae for scores in found.values())
    assert reading < column  # 260 texts of 64 active latents, not 260 rows of a million
    # A few dozen float64 columns; all texts in full would be 260 of them.
    assert peak < 45 * column


def test_mcnemar_is_exact_for_few_pairs_and_chi_squared_for_many() -> None:
    for b, c in ((0, 0), (5, 0), (0, 5), (3, 9), (12, 12), (7, 17)):
        n, low = b + c, min(b, c)
        exact = min(1.0, 2 * sum(math.comb(n, i) for i in range(low + 1)) / 2**n)
        assert mcnemar(np.array([float(b)]), np.array([float(c)]))[0] == pytest.approx(exact)
    for b, c in ((40, 20), (25, 0), (11, 14)):
        found = mcnemar(np.array([float(b)]), np.array([float(c)]))[0]
        assert found == pytest.approx(math.erfc(math.sqrt(((b - c) ** 2 / (b + c)) / 2)))


def test_one_content_is_no_test_of_a_paired_difference() -> None:
    builder = TextsBuilder(2)
    for positive in (False, True):
        variant = 0 if positive else NO_VARIANT
        acts = torch.tensor([1.0, 2.0]) * positive
        builder.add(acts, positive=positive, content=0, variant=variant, success=positive)
    assert detect(builder.build()).p["paired-t"].tolist() == [1.0, 1.0]
