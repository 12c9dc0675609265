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
    (seed,) = config.init_seed
    variant = Variant((PLACE,), (PLACE,), d_sae, architecture.at_width(d_sae), seed)
    trainer = SAETrainer(variant, config, {PLACE: scale}, device)

    def step(rows: Tensor) -> None:
        trainer.step(trainer.forward(placed(rows)))

    return trainer, step


def placed(rows: Tensor) -> PlacedRows:
    """Rows `[batch, d_model]` as a trainer takes them."""
    return PlacedRows(rows, {PLACE: slice(0, rows.shape[1])})


@torch.no_grad()
def held_out_fvu(trainer: SAETrainer, rows: Tensor, batch: int) -> float:
    """FVU of rows `[rows, d_model]` by the loss of training, which chooses latents likewise.

    An architecture that infers by a threshold has another FVU in use.
    """
    error = 0.0
    for part in rows.split(batch):
        passes = trainer.losses({PLACE: part.float()})
        error += float(sum(one.squared_error for one in passes))
    scaled = trainer.read[0].apply(rows.float())
    return error / float((scaled - scaled.mean(dim=0)).square().sum())
