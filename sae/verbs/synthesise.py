"""`synthesise`: activation shards made of known features, to train on like harvested ones."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.files import claim_output
from saesteer.checkpoints.shard_writer import ShardWriter
from saesteer.sae.config import Progress
from saesteer.sae.runs.bars import show_progress
from saesteer.sae.synthetic.config import SyntheticConfig
from saesteer.sae.synthetic.features import TRAINING, SyntheticFeatures

PLACE = (0, "resid_post")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def synthesise(
    out: str | Path,
    config: SyntheticConfig | None = None,
    *,
    tokens: int = 1_000_000,
    store_dtype: str = "bfloat16",
    shard_tokens: int = 65_536,
    force: bool = False,
    progress: Progress = show_progress,
) -> dict[str, Any]:
    """Write shards of synthetic activations, and the truth behind them, to `out`.

    The shards open like those of `harvest`, as layer 0 at resid_post: `train` takes them as
    `activations`. Beside them are `truth.safetensors` (directions, rates, parents and more of
    `SyntheticFeatures`) and `truth.json` (the settings), which `score_truth` reads. `token_ids`
    number the samples.

    Returns:
        The manifest.

    Raises:
        UserError: `out` is not empty (unless `force`). UsageError for other bad arguments.
    """
    config = config or SyntheticConfig()
    if tokens < 1 or shard_tokens < 1:
        raise UsageError(
            f"`tokens` and `shard_tokens` must be at least 1, got {tokens} and {shard_tokens}"
        )
    if store_dtype not in _DTYPES:
        raise UsageError(f"`store_dtype` must be {', '.join(_DTYPES)}, got {store_dtype!r}")
    folder = claim_output(Path(out).expanduser(), force=force)
    features = SyntheticFeatures.draw(config)
    features.save(folder)
    settings = asdict(config)
    writer = ShardWriter(
        folder,
        layers=[PLACE[0]],
        sites=[PLACE[1]],
        d_model=config.d_model,
        dtype=_DTYPES[store_dtype],
        shard_tokens=shard_tokens,
        facts={"model": {"name": "synthetic", **settings}, "config": {"tokens": tokens}},
    )
    for first in range(0, tokens, features.rows_at_once):
        rows = min(features.rows_at_once, tokens - first)
        x = features.sample(rows, TRAINING, first).x
        writer.add({PLACE: x}, torch.arange(first, first + rows, dtype=torch.int32))
        progress("synthesise", first + rows, tokens, "samples")
    writer.close()
    return writer.manifest
