"""Predicts the time, disk and memory of a harvest from a few real batches."""

import math
import statistics
import tempfile
import time
from typing import Any

import torch

from saesteer.checkpoints.background import BackgroundWriter
from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.shard_writer import ShardWriter
from saesteer.sae.activations.reader import open_activations
from saesteer.sae.config import HarvestConfig, Progress, no_progress
from saesteer.sae.model.hooks import last_block, resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.runs.disk_use import harvest_row_bytes, stored_dtype
from saesteer.sae.runs.memory_use import held_bytes, model_bytes, peak_bytes, resolved_text

# The first batches include warming up; after them a few batches or seconds predict hours well.
_WARM_UP = 2
_TIMED_BATCHES = 4
_TIMED_SECONDS = 6.0
_MOST_BATCHES = 200


def predict_harvest(
    lm: LanguageModel, config: HarvestConfig, progress: Progress = no_progress
) -> dict[str, Any]:
    """Run some batches and extrapolate to the whole harvest. Writes to a temporary folder only.

    The time is that of `harvest` after the model was loaded and replies were sampled.

    Returns:
        `tokens_per_second`, `seconds`, `bytes` (of the shards), `memory_bytes` (the process's peak)
        and the settings that they were computed from.

    Raises:
        UsageError: the corpus has fewer than two batches to time.
    """
    from saesteer.checkpoints.model_files import cache_folder

    points = [resolve_site(lm, layer, config.site) for layer in config.layers]
    text = resolved_text(lm, config.text)
    stream = open_activations(lm, points, text, replies_folder=cache_folder())
    model_dtype = str(lm.dtype).removeprefix("torch.")
    stored = stored_dtype(config.store_dtype, model_dtype)
    read: list[int] = []
    times: list[float] = []
    steps = _WARM_UP + _TIMED_BATCHES
    progress("dry run", 0, steps, "batches")
    with tempfile.TemporaryDirectory(prefix="saesteer-") as scratch:
        # Writing competes for the cores and the disk, so it is part of what is timed.
        shards = ShardWriter(
            scratch,
            layers=[point.layer for point in points],
            sites=[config.site],
            d_model=lm.d_model,
            dtype=getattr(torch, stored),
            shard_tokens=config.shard_tokens,
            facts={"model": lm.name},
        )
        with BackgroundWriter(shards, config.shard_tokens) as writer:
            since = begun = time.monotonic()
            for batch in stream:
                writer.add(batch.activations, batch.token_ids)
                now = time.monotonic()
                read.append(len(batch.token_ids))
                times.append(now - since)
                since = now
                progress("dry run", min(len(times), steps - 1), steps, "batches")
                timed = len(times) - _WARM_UP
                begun = now if timed == 0 else begun
                enough = now - begun > _TIMED_SECONDS or timed > _MOST_BATCHES
                if timed >= _TIMED_BATCHES and enough:
                    break
    if len(times) < 2:
        raise UsageError(
            "a prediction needs two batches of text to time: give more `data` or a lower "
            "`batch_size`"
        )
    measured = times[_WARM_UP:] or times[1:]
    speed = statistics.mean(read) / max(statistics.mean(measured), 1e-9)
    progress("dry run", steps, steps, "batches")
    row = harvest_row_bytes(lm.d_model, getattr(torch, stored).itemsize, config.keep_positions)
    return {
        "model": lm.name,
        "model_dtype": model_dtype,
        "device": str(lm.device),
        "compile": text.compile,
        "layers": [point.layer for point in points],
        "site": config.site,
        "data": list(config.text.data),
        "tokens": config.tokens,
        "context": text.context,
        "batch_size": text.batch_size,
        "contexts": math.ceil(config.tokens * len(read) * text.batch_size / sum(read)),
        "store_dtype": stored,
        "bytes": config.tokens * row * len(points),
        "model_bytes": model_bytes(lm, last_block(lm, points)),
        "memory_bytes": _peak_bytes(config, row * len(points), row, config.tokens),
        "tokens_per_second": speed,
        "seconds": config.tokens / speed,
    }


def _peak_bytes(config: HarvestConfig, row: int, layer_row: int, tokens: int) -> int:
    """The process's peak: its peak so far, or what it holds now plus the shards not yet on disk."""
    shard = min(config.shard_tokens, tokens)
    # One shard fills while as many tokens may wait; to shuffle, one layer's rows are joined first.
    waiting = min(2 * shard, tokens) * row + 2 * config.shuffle * shard * layer_row
    return max(peak_bytes(), held_bytes() + waiting)
