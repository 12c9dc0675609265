"""A plan, an SAE and a task with random numbers, for tests that use plans."""

from collections.abc import Sequence
from typing import Any

import torch

from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.plans.plan import ModelIdentity, Plan, PlannedLatent, SAEIdentity
from saesteer.steering.tasks.task import Task

CONTENTS = ("The museum opens at nine.", "Heavy rain closed the road.", "Peter bought oranges.")

TASK = Task(
    name="lists",
    instruction="Select one",
    variants=(),
    contents={"train": CONTENTS, "test": CONTENTS},
    check_name="length",
    check_arguments={"minimum": 1},
    max_new_tokens=4,
)


def small_plan(
    lm: LanguageModel,
    ids: Sequence[int],
    *,
    sigma: float | None = 0.5,
    source: str = "an-sae",
    **fields: Any,
) -> Plan:
    """A plan for block 1 in which latent i has the mean 1 + i; `source` names its SAE."""
    generator = torch.Generator().manual_seed(0)
    return Plan(
        model=ModelIdentity(lm.name, lm.fingerprint, lm.n_layers, lm.d_model),
        sae=SAEIdentity(source, "ab"),
        site="resid_post",
        layer=1,
        latents=tuple(PlannedLatent(id=i, mu=1.0 + i, sigma=sigma) for i in ids),
        directions=torch.randn(len(ids), lm.d_model, generator=generator),
        **fields,
    )


def small_sae(lm: LanguageModel, d_sae: int) -> SAE:
    """A TopK SAE whose encoder is its decoder transposed."""
    rows = torch.randn(d_sae, lm.d_model, generator=torch.Generator().manual_seed(1))
    return SAE(
        spec=SAESpec(d_model=lm.d_model, d_sae=d_sae, architecture="topk", k=4),
        W_enc=rows.T.contiguous(),
        W_dec=rows,
        b_enc=torch.zeros(d_sae),
        b_dec=torch.zeros(lm.d_model),
        source="an-sae",
        sha256="ab",
    )
