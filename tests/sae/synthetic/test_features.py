"""Synthetic features have the directions, rates, trees and correlations that were asked for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saesteer.checkpoints.errors import UserError
from saesteer.sae.synthetic.config import SyntheticConfig
from saesteer.sae.synthetic.features import SCORING, TRAINING, SyntheticFeatures

PLAIN = SyntheticConfig(
    d_model=16, features=80, roots=0, correlation_rank=0, lowest_rate=0.02, magnitude_spread=0.0
)
TREES = replace(PLAIN, roots=4, branching=3, depth=2, exclusive=False)
ROWS = 40_000


def measured(config: SyntheticConfig) -> tuple[SyntheticFeatures, torch.Tensor]:
    features = SyntheticFeatures.draw(config)
    return features, features.sample(ROWS, TRAINING, 0).acts > 0


def test_directions() -> None:
    orthogonal = SyntheticFeatures.draw(replace(PLAIN, features=12)).directions
    torch.testing.assert_close(orthogonal @ orthogonal.T, torch.eye(12), atol=1e-5, rtol=0)
    rows = SyntheticFeatures.draw(PLAIN).directions
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(80))
    # The least possible for 80 unit rows in 16 dimensions.
    assert float((rows @ rows.T).square().sum()) == pytest.approx(80**2 / 16, rel=1e-3)


def test_rates_follow_zipf() -> None:
    features, fires = measured(PLAIN)
    rates = features.rates
    assert float(rates[0]) == pytest.approx(0.4) and float(rates[-1]) == pytest.approx(0.02)
    assert bool((rates.diff() < 0).all())
    # Five standard deviations of a share of 40,000 samples.
    bound = 5 * (rates * (1 - rates) / ROWS).sqrt()
    assert bool(((fires.float().mean(dim=0) - rates).abs() < bound).all())


def test_a_feature_fires_only_under_its_parent_and_as_often_as_asked() -> None:
    features, fires = measured(TREES)
    assert features.parents[:4].tolist() == [-1] * 4
    assert features.parents[4:16].tolist() == [n // 3 for n in range(12)]
    assert features.parents[16:19].tolist() == [4] * 3 and features.parents[52:].max() == -1
    children = (features.parents >= 0).nonzero()[:, 0]
    assert len(children) == 48
    assert not bool((fires[:, children] & ~fires[:, features.parents[children]]).any())
    bound = 5 * (features.rates * (1 - features.rates) / ROWS).sqrt()
    assert bool(((fires.float().mean(dim=0) - features.rates).abs() < bound).all())


def test_siblings_exclude_each_other() -> None:
    features, fires = measured(replace(TREES, exclusive=True))
    crowded, before = 0, measured(TREES)[1]
    for parent in features.parents[features.parents >= 0].unique():
        siblings = fires[:, features.parents == parent]
        assert int(siblings.sum(dim=1).max()) == 1
        assert bool((siblings.float().mean(dim=0) > 0).all()), "each of them has its turn"
        crowded += int((before[:, features.parents == parent].sum(dim=1) > 1).sum())
    assert crowded > 1000, "otherwise there was nothing to exclude"


def test_features_with_common_causes_fire_together() -> None:
    features, fires = measured(replace(PLAIN, correlation_rank=1, correlation=0.6))
    rates = fires.float().mean(dim=0)
    bound = 5 * (features.rates * (1 - features.rates) / ROWS).sqrt()
    assert bool(((rates - features.rates).abs() < bound).all())
    found = torch.corrcoef(fires.T.float())
    expected = features.causes @ features.causes.T
    pairs = torch.triu(expected.abs() > 0.3, diagonal=1)
    assert int(pairs.sum()) > 50
    assert bool((found[pairs].sign() == expected[pairs].sign()).all())


def test_samples_are_made_of_the_features(tmp_path: Path) -> None:
    config = replace(TREES, magnitude_spread=0.3, correlation_rank=2)
    features = SyntheticFeatures.draw(config)
    rows = features.sample(300, TRAINING, 5)
    torch.testing.assert_close(rows.x, rows.acts @ features.directions + features.bias)
    assert float(features.bias.norm()) == pytest.approx(2.0)
    features.save(tmp_path)
    again = SyntheticFeatures.load(tmp_path)
    assert again.config == config
    assert torch.equal(again.sample(300, TRAINING, 5).x, rows.x)
    for kind, number in ((TRAINING, 6), (SCORING, 5)):
        assert not torch.equal(features.sample(300, kind, number).x, rows.x)
    other = SyntheticFeatures.draw(replace(config, seed=1))
    assert not torch.equal(other.directions, features.directions)
    with pytest.raises(UserError, match=r"holds no truth\.safetensors: give a folder made by"):
        SyntheticFeatures.load(tmp_path / "elsewhere")
