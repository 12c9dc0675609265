"""A server for tests: a tiny model with two plans and an SAE, on a free port of this machine."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.plans.plan import Plan
from saesteer.steering.serving.config import ServeConfig
from saesteer.steering.serving.latent_search import LatentSearch, lens_cards
from saesteer.steering.serving.routes.api import SteeringApp
from saesteer.steering.serving.routes.server import in_background
from saesteer.steering.serving.routes.shelf import Shelf

from ..small_plans import small_plan

D_SAE = 48


def plans_of(lm: LanguageModel) -> dict[str, Plan]:
    """Two plans; `two` has parts at two layers."""
    add = small_plan(lm, [3, 5], method="add", scale=0.15)
    second = small_plan(lm, [2], method="add", scale=0.3).with_changes(layer=2, scope="all")
    return {"one": add, "two": add.with_changes(parts=[*add.parts, *second.parts])}


def sae_of(lm: LanguageModel, architecture: str = "standard") -> SAE:
    """An SAE of block 2 with random weights."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(D_SAE, lm.d_model, generator=generator)
    spec = SAESpec(
        d_model=lm.d_model,
        d_sae=D_SAE,
        architecture=architecture,
        k=6 if architecture == "topk" else None,
        hook_name="blocks.2.hook_resid_post",
    )
    return SAE(
        spec=spec,
        W_enc=rows.T.contiguous(),
        W_dec=rows,
        b_enc=torch.full((D_SAE,), -0.1),
        b_dec=torch.zeros(lm.d_model),
        source="an-sae",
        sha256="cd",
    )


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    app: SteeringApp
    lm: LanguageModel


@contextlib.contextmanager
def serving(
    lm: LanguageModel,
    *,
    with_sae: bool = True,
    search: LatentSearch | None = None,
    clock: Any = None,
    **settings: Any,
) -> Iterator[Served]:
    """Serve a model while the context is open."""
    sae = sae_of(lm) if with_sae else None
    if sae is not None and search is None:
        search = lens_cards(lm, sae)
    config = ServeConfig(**{"port": 0, **settings})
    extra = {} if clock is None else {"clock": clock}
    shelf = Shelf(lm, plans_of(lm), sae)
    app = SteeringApp(lm, shelf, config, name="tiny", search=search, **extra)
    with in_background(app.app(), config) as url:
        yield Served(url, app, lm)
