"""A small SAE on a tiny model, and a reading of it that takes a second."""

from dataclasses import replace
from typing import Any

import torch

from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.config import TextConfig
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.reading.config import LatentsConfig

D_SAE = 48
CONFIG = LatentsConfig(
    tokens=1500, top=10, contexts=3, samples=8, held_out=4, per_quantile=1, before=5, after=3,
    lens=4, neighbours=3, telling=5, steer=2, new_tokens=5,
    text=TextConfig(context=32, batch_size=8, seed=3),
)  # fmt: skip


def small_sae(lm: LanguageModel, *, layer: int = 1, **changes: Any) -> SAE:
    """48 random latents, 6 of which are active; latent 5 never is."""
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(D_SAE, lm.d_model, generator=rng)
    rows /= rows.norm(dim=1, keepdim=True)
    bias = torch.zeros(D_SAE)
    bias[5] = -1e6
    fields = {
        "architecture": "topk", "k": 6, "d_model": lm.d_model, "d_sae": D_SAE,
        "hook_name": f"blocks.{layer}.hook_resid_post", "model_name": lm.name,
        "metadata": {"saesteer": {"model": {"hash": lm.fingerprint}}},
    }  # fmt: skip
    spec = SAESpec(**{**fields, **changes})
    return SAE(spec, rows.T.contiguous(), bias, rows, torch.zeros(lm.d_model), source="made-up")


def config(**changes: Any) -> LatentsConfig:
    return replace(CONFIG, **changes)
