"""A plan of two ranked latents and its SAE, for tests that read, write and damage plans."""

from typing import Any

import torch
from torch import Tensor

from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.plans.from_sae import make_plan
from saesteer.steering.plans.plan import Plan, PlannedLatent


def make_sae(
    architecture: str = "standard", hook: str = "blocks.1.hook_resid_post", **fields: Any
) -> SAE:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    d_model = fields.pop("d_model", 32)
    spec = SAESpec(
        architecture=architecture,  # type: ignore[arg-type]
        d_model=d_model,
        d_sae=20,
        k=5 if architecture == "topk" else None,
        hook_name=hook,
        **fields,
    )
    return SAE(
        spec=spec,
        W_enc=noise(d_model, 20),
        b_enc=noise(20),
        W_dec=noise(20, d_model),
        b_dec=noise(d_model),
        threshold=noise(20).abs() if architecture == "jumprelu" else None,
        source="folder",
        sha256="ab",
    )


LATENTS = (
    PlannedLatent(id=9, score=0.95, mu=2.0, sigma=0.5, lens=(" é", "à"), max=6.0),
    PlannedLatent(id=2, score=0.5, mu=1.0, sigma=0.25, max=3.0),
)


def ranked(lm: LanguageModel, **fields: Any) -> Plan:
    sae = fields.pop("sae", None) or make_sae()
    return make_plan(lm, sae, LATENTS, **fields)
