"""Conditions that tell a task's contents from other prompts, by the model's state at the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.activations.prompt_reader import PromptReader
from saesteer.sae.model.hooks import resolve_site, sae_hook_point
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import encode_prompt
from saesteer.steering.plans.condition import Condition
from saesteer.steering.plans.from_sae import encoder_columns

_SHRINK = 0.1
"""Share of the mean variance that is added to each direction's: there are fewer texts than axes."""


@dataclass(frozen=True)
class Gate:
    """A condition, and how well it tells held-out prompts apart."""

    condition: Condition
    kept: float
    """Share of held-out contents where it holds."""
    stopped: float
    """Share of held-out other prompts where it does not."""

    @property
    def balance(self) -> float:
        """Mean of both."""
        return (self.kept + self.stopped) / 2


def last_states(
    lm: LanguageModel, texts: Sequence[str], layers: Sequence[int]
) -> Float[Tensor, "layers texts d_model"]:
    """Residuals after some blocks at the last token of each prompt."""
    points = [resolve_site(lm, layer) for layer in layers]
    prompts = [encode_prompt(lm, text, chat=lm.has_chat_template).token_ids for text in texts]
    found = torch.zeros(len(points), len(texts), lm.d_model)
    for read in PromptReader(lm, points).read(prompts):
        for place, point in enumerate(points):
            found[place, read.number] = read.rows[point.key][-1].cpu()
    return found


def find_gate(
    lm: LanguageModel,
    contents: Sequence[str],
    others: Sequence[str],
    *,
    saes: Sequence[SAE] = (),
    latents: Sequence[Sequence[int]] = (),
) -> Gate:
    """The condition that tells held-out contents and other prompts apart best.

    Candidates are a linear classifier at each of some layers and, with SAEs, single latents. Every
    second text of each kind is held out. Of equals the earliest layer wins, since the pass that
    reads it is shortest.

    Args:
        latents: for each SAE, the latents to try; by default all.

    Raises UserError for fewer than four texts of a kind.
    """
    if min(len(contents), len(others)) < 4:
        raise UserError(
            f"`when` needs at least 4 contents and 4 other prompts to tell apart, got "
            f"{len(contents)} and {len(others)}: give a task with more train contents"
        )
    n = lm.n_layers
    layers = sorted({max(0, round(n * share) - 1) for share in (0.25, 0.4, 0.55, 0.7, 0.85)})
    own = {sae_hook_point(sae, lm).layer for sae in saes}
    every = sorted({*layers, *own})
    wanted = last_states(lm, contents, every)
    unwanted = last_states(lm, others, every)
    gates = []
    for place, layer in enumerate(every):
        if layer in layers:
            weight = _classifier(wanted[place, ::2], unwanted[place, ::2])
            gates.append(_gate(layer, weight, wanted[place], unwanted[place], "classifier"))
    for number, sae in enumerate(saes):
        layer = sae_hook_point(sae, lm).layer
        place = every.index(layer)
        ids = list(latents[number]) if latents else list(range(sae.spec.d_sae))
        columns = encoder_columns(sae, ids).get("W_enc")
        weights = sae.W_enc[:, ids].detach().cpu().float() if columns is None else columns
        gates += _best_latent(layer, ids, weights, wanted[place], unwanted[place], sae.source)
    return max(gates, key=lambda gate: gate.balance)


def _classifier(
    wanted: Float[Tensor, "a d_model"], unwanted: Float[Tensor, "b d_model"]
) -> Float[Tensor, " d_model"]:
    """Fisher's linear discriminant with a shrunk covariance, in float64."""
    a, b = wanted.double(), unwanted.double()
    centred = torch.cat([a - a.mean(dim=0), b - b.mean(dim=0)])
    covariance = centred.T @ centred / len(centred)
    ridge = _SHRINK * float(covariance.diagonal().mean())
    covariance += max(ridge, 1e-12) * torch.eye(len(covariance), dtype=torch.float64)
    weight: Tensor = torch.linalg.solve(covariance, a.mean(dim=0) - b.mean(dim=0))
    length = weight.norm()
    if not float(length) > 0:
        raise UserError("`when`: the task's contents and other prompts look the same to the model")
    found: Tensor = (weight / length).float()
    return found


def _gate(
    layer: int,
    weight: Float[Tensor, " d_model"],
    wanted: Float[Tensor, "a d_model"],
    unwanted: Float[Tensor, "b d_model"],
    source: str,
) -> Gate:
    """The condition with its threshold from every second text, measured on the others."""
    ours, theirs = (wanted[::2] @ weight).double(), (unwanted[::2] @ weight).double()
    threshold = _threshold(ours, theirs)
    condition = Condition(layer=layer, weight=weight, bias=-threshold, source=source)
    kept = condition.holds(wanted[1::2]).float().mean()
    stopped = 1 - condition.holds(unwanted[1::2]).float().mean()
    return Gate(condition, float(kept), float(stopped))


def _threshold(ours: Float[Tensor, " a"], theirs: Float[Tensor, " b"]) -> float:
    """Between the kinds where they are apart; else where fewest of them lie on the wrong side."""
    low, high = float(ours.min()), float(theirs.max())
    if low > high:
        return (low + high) / 2
    values = torch.cat([ours, theirs]).unique()
    cuts = torch.cat([values[:1] - 1e-3, (values[1:] + values[:-1]) / 2])
    right = [float((ours > cut).double().mean() + (theirs <= cut).double().mean()) for cut in cuts]
    return float(cuts[max(range(len(right)), key=right.__getitem__)])


def _best_latent(
    layer: int,
    ids: Sequence[int],
    weights: Float[Tensor, "d_model n"],
    wanted: Float[Tensor, "a d_model"],
    unwanted: Float[Tensor, "b d_model"],
    source: str,
) -> list[Gate]:
    """The latent whose values before the activation are furthest apart, or none."""
    if not ids:
        return []
    ours, theirs = wanted[::2] @ weights, unwanted[::2] @ weights
    spread = (ours.var(dim=0) + theirs.var(dim=0)).sqrt().clamp(min=1e-8)
    best = int(((ours.mean(dim=0) - theirs.mean(dim=0)) / spread).argmax())
    name = f"latent {ids[best]} of {source}"
    return [_gate(layer, weights[:, best].contiguous(), wanted, unwanted, name)]
