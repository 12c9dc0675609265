"""Scores against the truth equal SAELens', and the true features themselves score 1."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.measuring.ground_truth import score_truth
from saesteer.sae.synthetic.config import SyntheticConfig
from saesteer.sae.synthetic.features import SCORING, SyntheticFeatures

CONFIG = SyntheticConfig(
    d_model=24, features=20, roots=2, branching=2, depth=2, lowest_rate=0.05, correlation_rank=2
)


def detector(features: SyntheticFeatures, order: torch.Tensor) -> SAE:
    """Reads orthogonal features off, each by its own direction."""
    rows = features.directions[order]
    spec = SAESpec(architecture="jumprelu", d_model=24, d_sae=len(rows))
    return SAE(
        spec, rows.T.contiguous(), -rows @ features.bias, rows, features.bias,
        threshold=torch.full((len(rows),), 1e-4),
    )  # fmt: skip


def test_the_features_themselves() -> None:
    features = SyntheticFeatures.draw(CONFIG)
    found = score_truth(detector(features, torch.randperm(20)), features, samples=4000)
    for name in ("f1", "precision", "recall", "mcc", "uniqueness"):
        assert found[name] == pytest.approx(1.0, abs=2e-3), name
    assert found["explained_variance"] == pytest.approx(1.0, abs=1e-6)
    assert found["l0"] == pytest.approx(found["true_l0"], rel=1e-3)
    assert found["relative_norm"] == pytest.approx(1.0, abs=1e-3) and found["dead_latents"] == 0
    # Half of them, one twice: the others are found as before.
    some = torch.tensor([0, 1, 2, 3, 3, 4])
    found = score_truth(detector(features, some), features, samples=4000)
    assert found["uniqueness"] == pytest.approx(5 / 6) and found["f1"] > 0.99


@torch.no_grad()
def test_scores_equal_saelens() -> None:
    theirs = pytest.importorskip("sae_lens.synthetic.evals")
    features = SyntheticFeatures.draw(replace(CONFIG, features=60))
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 24, generator=rng)
    spec = SAESpec(architecture="topk", d_model=24, d_sae=30, k=4)
    sae = SAE(spec, rows.T.contiguous(), torch.zeros(30), 0.1 * rows, features.bias)
    found = score_truth(sae, features, samples=2000, seed=3)
    sample = features.sample(2000, SCORING + 3, 0)
    latents = sae.encode(sample.x)
    judged = theirs.compute_classification_metrics(
        latents, sample.acts, sae.W_dec, features.directions
    )
    variance = theirs.ExplainedVarianceCalculator()
    variance.add_batch(sae.decode(latents), sample.x)
    shrinkage = theirs.ShrinkageCalculator()
    shrinkage.add_batch(sae.decode(latents), sample.x)
    expected = {
        "f1": judged.f1_score,
        "precision": judged.precision,
        "recall": judged.recall,
        "mcc": theirs.mean_correlation_coefficient(sae.W_dec, features.directions),
        "uniqueness": theirs.feature_uniqueness(sae.W_dec, features.directions),
        "explained_variance": variance.compute(),
        "relative_norm": shrinkage.compute(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert 0 < found["f1"] < 0.9, "not a trivial case"


def test_what_does_not_fit(tmp_path: Path) -> None:
    features = SyntheticFeatures.draw(CONFIG)
    sae = detector(features, torch.arange(20))
    with pytest.raises(UserError, match="has d_model 24, `truth` has 8: give an SAE"):
        score_truth(sae, SyntheticFeatures.draw(replace(CONFIG, d_model=8)), samples=10)
    with pytest.raises(UserError, match="`truth` .* holds no truth"):
        score_truth(sae, tmp_path)
    with pytest.raises(UsageError, match="`samples` must be at least 2, got 1"):
        score_truth(sae, features, samples=1)
