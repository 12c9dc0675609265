"""A trainer of one SAE for these scripts, so that only this file depends on its class."""

from collections.abc import Callable

import torch
from torch import Tensor

from saesteer.sae.config import TrainConfig
from saesteer.sae.training.architectures import architecture_named
from saesteer.sae.training.input_scale import InputScale, PlacedRows
from saesteer.sae.training.sae_trainer import SAETrainer, Variant

PLACE = (0, "resid_post")


def make_trainer(
    config: TrainConfig, scale: InputScale, device: torch.device
) -> tuple[SAETrainer, Callable[[Tensor], None]]:
    """A trainer of the one SAE that `config` describes, and its step on rows `[batch, d_model]`."""
    (d_sae,) = config.d_sae
    (architecture,) = architecture_named(config.arch).from_config(config)
    variant = Variant((PLACE,), (PLACE,), d_sae, architecture, 0)
    trainer = SAETrainer(variant, config, {PLACE: scale}, device)
    columns = {PLACE: slice(0, len(scale.mean))}

    def step(rows: Tensor) -> None:
        trainer.step(trainer.forward(PlacedRows(rows, columns)))

    return trainer, step
