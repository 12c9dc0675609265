"""The one place where these scripts touch the class that trains an SAE."""

from collections.abc import Callable

import torch
from torch import Tensor

from saesteer.sae.config import TrainConfig
from saesteer.sae.training.sae_trainer import SAETrainer, Variant
from saesteer.sae.training.topk import InputScale


def make_trainer(
    config: TrainConfig, scale: InputScale, device: torch.device
) -> tuple[SAETrainer, Callable[[Tensor], None]]:
    """A trainer of the one SAE that `config` describes, and its step on rows `[batch, d_model]`."""
    (d_sae,), (k,) = config.d_sae, config.k
    variant = Variant((0, "resid_post"), d_sae, k, 0)
    trainer = SAETrainer(variant, config, slice(0, len(scale.mean)), scale, device)

    def step(rows: Tensor) -> None:
        trainer.update(trainer.backward(rows))

    return trainer, step
