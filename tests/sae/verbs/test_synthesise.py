"""Synthetic shards are trained on like harvested ones, and training finds features."""

from pathlib import Path

import pytest
import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.shards import ShardReader
from saesteer.sae.config import TrainConfig
from saesteer.sae.measuring.ground_truth import score_truth
from saesteer.sae.synthetic.config import SyntheticConfig
from saesteer.sae.synthetic.features import TRAINING, SyntheticFeatures
from saesteer.sae.verbs.synthesise import synthesise
from saesteer.sae.verbs.train import train

CONFIG = SyntheticConfig(
    d_model=16, features=40, roots=2, branching=2, depth=2, lowest_rate=0.01, highest_rate=0.2
)


def test_from_shards_to_scores(tmp_path: Path) -> None:
    seen: list[int] = []
    manifest = synthesise(
        tmp_path / "rows", CONFIG, tokens=9000, shard_tokens=4000, store_dtype="float32",
        progress=lambda stage, done, total, note: seen.append(done),
    )  # fmt: skip
    assert manifest["tokens"] == 9000 == seen[-1] and manifest["complete"]
    reader = ShardReader(tmp_path / "rows")
    rows = torch.cat([reader.shard(i)[0] for i in range(len(reader))])
    features = SyntheticFeatures.load(tmp_path / "rows")
    assert torch.equal(rows, features.sample(9000, TRAINING, 0).x)
    # Trained for long enough to find something: an SAE that has seen one batch finds less.
    scores = {}
    for tokens in (512, 30_000):
        config = TrainConfig(d_sae=(24,), k=(3,), tokens=tokens, batch_tokens=256, lr=5e-3)
        train(tmp_path / f"sae-{tokens}", config, activations=tmp_path / "rows")
        scores[tokens] = score_truth(tmp_path / f"sae-{tokens}", tmp_path / "rows", samples=4000)
    for name in ("mcc", "f1", "explained_variance"):
        assert scores[30_000][name] > scores[512][name] + 0.1, name
    assert scores[30_000]["mcc"] > 0.6


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`tokens` and `shard_tokens` must be at least 1, got 0"):
        synthesise(tmp_path / "a", CONFIG, tokens=0)
    with pytest.raises(UsageError, match="`store_dtype` must be .*, got 'int8'"):
        synthesise(tmp_path / "a", CONFIG, store_dtype="int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError, match="is not empty"):
        synthesise(tmp_path / "full", CONFIG)
