"""Small runs for tests: made-up shards, settings, and readers of what a run wrote."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saesteer.checkpoints.files import read_jsonl
from saesteer.checkpoints.shard_writer import ShardWriter
from saesteer.sae.config import TextConfig, TrainConfig
from saesteer.sae.model.language_model import LanguageModel

Shared = Callable[..., LanguageModel]

D_MODEL = 16

TOKENS = 4096

TIMINGS = ("tokens_per_second", "stall_model", "stall_trainer")

CONFIG = TrainConfig(
    d_sae=(48,), k=(4,), tokens=2048, batch_tokens=64, buffer_tokens=512, checkpoint_every=512
)


def features(seed: int) -> Tensor:
    """32 directions, twice as many as there are axes."""
    directions = torch.randn(32, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return directions / directions.norm(dim=1, keepdim=True)


def sparse_data(tokens: int, seed: int) -> Tensor:
    """Each row is a sum of three of the features, far from the origin."""
    rng = torch.Generator().manual_seed(seed + 100)
    chosen = torch.rand(tokens, 32, generator=rng).topk(3, dim=1).indices
    amounts = 1 + torch.rand(tokens, 3, generator=rng)
    rows = (features(seed)[chosen] * amounts[:, :, None]).sum(dim=1)
    return 30 * rows + 200 * torch.randn(D_MODEL, generator=rng)


def whole_numbers(tokens: int, seed: int) -> Tensor:
    """Like `sparse_data` in small whole numbers, which have the same bytes on every CPU."""
    rng = torch.Generator().manual_seed(seed)
    directions = torch.randint(-4, 5, (32, D_MODEL), generator=rng)
    chosen = torch.randint(0, 32, (tokens, 3), generator=rng)
    amounts = torch.randint(8, 17, (tokens, 3), generator=rng)
    rows = (directions[chosen] * amounts[:, :, None]).sum(dim=1)
    return (rows + torch.randint(-200, 201, (D_MODEL,), generator=rng)).float()


def write_shards(
    folder: Path,
    layers: tuple[int, ...] = (1, 5),
    site: str = "resid_post",
    *,
    shard_tokens: int = 1000,
    make_rows: Callable[[int, int], Tensor] = sparse_data,
) -> Path:
    """Two layers of different data in a few shards."""
    writer = ShardWriter(
        folder,
        layers=layers,
        sites=[site],
        d_model=D_MODEL,
        dtype=torch.float32,
        shard_tokens=shard_tokens,
        facts={
            "model": {"name": "made-up", "hash": "0123456789abcdef", "n_layers": 8},
            "hf_hook_names": [f"model.layers.{layer}" for layer in layers],
            "config": {"context": 77},
            "prepend_bos": True,
            "data": [{"name": "t", "sha256": "5"}],
        },
    )
    data = {(layer, site): make_rows(TOKENS, layer) for layer in layers}
    for at in range(0, TOKENS, 256):
        rows = {place: values[at : at + 256] for place, values in data.items()}
        writer.add(rows, torch.arange(256))
    writer.close()
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every SAE below a folder, by its folder."""
    return {
        str(path.parent.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("sae_weights.safetensors"))
    }


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The log without its timings."""
    rows = read_jsonl(folder / "metrics.jsonl")
    return [{name: row[name] for name in row if name not in TIMINGS} for row in rows]


def all_metrics(folder: Path) -> dict[str, Any]:
    return {
        str(path.parent.relative_to(folder)): metrics_of(path.parent)
        for path in sorted(folder.rglob("metrics.jsonl"))
    }


def dies_at(limit: int) -> Callable[[str, int, int, str], None]:
    """A progress that raises RuntimeError once training has come to `limit` tokens."""

    def progress(stage: str, now: int, total: int, note: str) -> None:
        if stage == "train" and now >= limit:
            raise RuntimeError("killed")

    return progress


LIVE = replace(
    CONFIG,
    layers=(0, -1),
    tokens=1024,
    buffer_tokens=256,
    checkpoint_every=256,
    text=TextConfig(context=24, batch_size=4),
)
