"""What a training would need, from its settings and the widths of its places; trains nothing."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from saesteer.sae.config import Progress, TrainConfig, no_progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model, pick_device
from saesteer.sae.runs.memory_use import resolved_text
from saesteer.sae.runs.mesh_cost import (
    NETWORK_BYTES,
    NVLINK_BYTES,
    h100_step_seconds,
    mesh_cost,
    sent_rows,
)
from saesteer.sae.runs.processes import started_processes
from saesteer.sae.training.architectures import check_settings
from saesteer.sae.training.mesh.limits import check_mesh
from saesteer.sae.verbs.train import as_folders, variants_of
from saesteer.sae.verbs.train_sources import live_source, shard_source


def predict_training(
    config: TrainConfig,
    *,
    model: str | LanguageModel | None = None,
    activations: str | Path | Sequence[str | Path] | None = None,
    device: str = "auto",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Memory and bytes sent a step for each process, of as many as torchrun has started, and how
    long a step would take on H100s: the last is a prediction from rates, never measured.

    Raises what `train` raises for settings that do not fit.
    """
    check_settings(config)
    compute = pick_device(device)
    if model is not None:
        lm = as_language_model(model, device=device)
        config = replace(config, text=resolved_text(lm, config.text))
        source = live_source(lm, config, (), None, progress)
    else:
        source = shard_source(as_folders(activations), config, _nothing, _nothing)
    variants = variants_of(config, source)
    world = started_processes()
    check_mesh(config, [variant.d_sae for variant in variants], world)
    width = sum(source.widths[place] for place in source.rows.places)
    halved = config.dtype == "bfloat16" or (config.dtype == "auto" and compute.type == "cuda")
    row_bytes = width * source.dtype.itemsize
    saes = []
    for variant in variants:
        d_in = sum(source.widths[place] for place in variant.reads)
        d_out = sum(source.widths[place] for place in variant.writes)

        cost = partial(
            mesh_cost,
            variant.architecture,
            d_in,
            d_out,
            variant.d_sae,
            config,
            world=world,
            row_bytes=row_bytes,
        )
        here, there = cost(product_bytes=2 if halved else 4), cost(product_bytes=2)
        saes.append(
            {
                "sae": variant.folder,
                "memory_bytes": here.memory,
                "sent_bytes_per_step": here.sent_step,
                "predicted_h100_seconds_per_step": {
                    "nvlink": h100_step_seconds(there, NVLINK_BYTES),
                    "400_gbit": h100_step_seconds(there, NETWORK_BYTES),
                },
            }
        )
    held = min(config.buffer_tokens, max(config.tokens // 2, config.batch_tokens)) // world
    return {
        "processes": world,
        "mesh": {"data": world // config.latent_shards, "latent_shards": config.latent_shards},
        "device": str(compute),
        "steps": config.steps,
        "batch_tokens": config.batch_tokens,
        "saes": saes,
        "buffer_bytes": held * row_bytes,
        "rows_sent_bytes_per_step": sent_rows(config, world, row_bytes),
        "places": [list(place) for place in source.rows.places],
    }


def _nothing(line: str) -> None:
    pass
