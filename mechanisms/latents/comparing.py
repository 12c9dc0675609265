"""A base model against a tuned one, by latents: how often, how strongly, and to what effect.

One SAE reads both models on the same tokens. Where it explains the tuned model worse than the
base, a difference may be the dictionary's: FVU on both is always given. Latent scaling (Minder et
al. 2025) asks whether a latent's direction is there at all: beta_j = sum_x f_j <d_j, y> / sum_x
f_j^2 ||d_j||^2, with y what the other latents leave of a model's state. A latent that is new in the
tuned model has a beta near 0 in the base; one that is merely louder has not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE
from saesteer.mechanisms.circuits.crossing import check_same_form
from saesteer.mechanisms.data.encoding import EncodedPair
from saesteer.mechanisms.latents.basis import LatentBasis, fraction_unexplained
from saesteer.mechanisms.latents.effects import Moved
from saesteer.mechanisms.patching.sites import read_values
from saesteer.mechanisms.statistics import FEWEST_GROUPS, bootstrap_ratio, grouped, sign_p_values
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.model.sae_places import crosscoder_parts

Array = np.ndarray
HIGH_RATIO = 1.2


@dataclass(frozen=True, eq=False)
class LatentDiff:
    """Latents of one SAE on two models; arrays are `[d_sae]`."""

    names: tuple[str, str]
    unexplained: tuple[float, float]
    """FVU on the base's states and on the tuned model's."""
    rate: tuple[Array, Array]
    """Share of tokens at which a latent is active."""
    mean: tuple[Array, Array]
    """Mean activation where it is active; 0 where it never is."""
    change: Array
    low: Array
    high: Array
    """Mean over tokens of tuned minus base, with its 95 % interval over prompts."""
    p: Array
    """Sign test over prompts of the change, adjusted (Benjamini and Hochberg) over latents that
    change at all; 1 for the others."""
    beta: tuple[Array, Array]
    """Latent scaling in the base and in the tuned model, with the tuned model's activations; NaN
    for latents that are never active there."""
    n_tokens: int
    n_groups: int

    def __repr__(self) -> str:
        found = int((self.p <= 0.05).sum())
        return (
            f"LatentDiff({self.names[0]} -> {self.names[1]}: {found} of {len(self.change)} latents "
            f"change, {self.n_tokens} tokens, FVU {self.unexplained[0]:.2f} -> "
            f"{self.unexplained[1]:.2f})"
        )

    def summary(self, effects: Mapping[int, float] | None = None) -> list[dict[str, Any]]:
        """A row for each latent that changes: by the size of its effect where `effects` has one
        (a patch of it), then by the size of its change."""
        effects = dict(effects or {})
        rows = [
            {
                "latent": int(j),
                "effect": effects.get(int(j)),
                "rate": [float(self.rate[0][j]), float(self.rate[1][j])],
                "mean": [float(self.mean[0][j]), float(self.mean[1][j])],
                "change": float(self.change[j]),
                "low": _finite(self.low[j]),
                "high": _finite(self.high[j]),
                "p_adjusted": float(self.p[j]),
                "beta": [_finite(self.beta[0][j]), _finite(self.beta[1][j])],
            }
            for j in np.flatnonzero(self.change)
        ]
        return sorted(rows, key=lambda row: (-abs(row["effect"] or 0), -abs(row["change"])))

    def to_frame(self) -> Any:
        """A pandas table of `summary`."""
        import pandas

        return pandas.DataFrame(self.summary())

    def warnings(self) -> list[str]:
        """What a reader should know before using the figures."""
        found = []
        if self.n_groups < FEWEST_GROUPS:
            found.append(f"{self.n_groups} groups are fewer than {FEWEST_GROUPS}: no intervals")
        base, tuned = self.unexplained
        if tuned > HIGH_RATIO * base:
            found.append(
                f"the SAE leaves {tuned:.2f} of the tuned model's variance and {base:.2f} of the "
                "base's: differences are partly the dictionary's"
            )
        return found

    def document(self) -> dict[str, Any]:
        """JSON-ready, without the latents that are the same."""
        kept = {"names", "unexplained", "n_tokens", "n_groups"}
        plain = {key: value for key, value in self.__dict__.items() if key in kept}
        return {"schema_version": 1, **plain, "latents": self.summary(),
                "warnings": self.warnings()}  # fmt: skip


def latent_diff(
    base: LanguageModel,
    tuned: LanguageModel,
    basis: LatentBasis,
    pairs: Sequence[EncodedPair],
    *,
    seed: int = 0,
    progress: Progress = no_progress,
) -> LatentDiff:
    """Read both models on the clean prompts, all tokens but the first, which is often a sink.

    Raises UsageError for models of another form or tokenizer; UserError for prompts of one token.
    """
    from scipy.stats import false_discovery_control

    check_same_form(base, tuned, pairs)
    states: tuple[list[Tensor], list[Tensor]] = ([], [])
    groups: list[str] = []
    for number, pair in enumerate(pairs):
        progress("reading both models", number, len(pairs), "prompts")
        places = [(basis.node, t) for t in range(1, len(pair.clean))]
        if not places:
            raise UserError(f"a prompt has one token: {pair.of.clean[:40]!r} cannot be compared")
        for lm, kept in zip((base, tuned), states, strict=True):
            kept.append(torch.stack(read_values(lm, pair.clean, places)[0]))
        groups += [pair.group] * len(places)
    progress("reading both models", len(pairs), len(pairs), "prompts")
    h = [torch.cat(kept) for kept in states]
    parts = [basis.split(x) for x in h]
    acts = [one.acts.double().cpu().numpy() for one in parts]
    sums, counts = grouped(acts[1] - acts[0], groups)
    low, high = bootstrap_ratio(sums, counts, seed=seed)
    change = (acts[1] - acts[0]).mean(axis=0)
    p = np.ones(len(change))
    moved = np.flatnonzero((sums != 0).any(axis=0))
    if len(moved):
        p[moved] = false_discovery_control(sign_p_values(sums[:, moved]))
    active = [one != 0 for one in acts]
    # What the other latents leave of a model's state is the error and the latent's own part.
    beta = [latent_scaling(parts[1].acts, parts[i].acts, parts[i].error, basis.steps)
            for i in (0, 1)]  # fmt: skip
    return LatentDiff(
        names=(base.name, tuned.name),
        unexplained=(fraction_unexplained(basis, h[0], parts[0]),
                     fraction_unexplained(basis, h[1], parts[1])),
        rate=(active[0].mean(axis=0), active[1].mean(axis=0)),
        mean=(_mean_active(acts[0]), _mean_active(acts[1])),
        change=change,
        low=low,
        high=high,
        p=p,
        beta=(beta[0].cpu().numpy(), beta[1].cpu().numpy()),
        n_tokens=len(groups),
        n_groups=len(set(groups)),
    )  # fmt: skip


def latent_scaling(
    f: Float[Tensor, "rows d_sae"],
    acts: Float[Tensor, "rows d_sae"],
    error: Float[Tensor, "rows d_model"],
    steps: Float[Tensor, "d_sae d_model"],
) -> Float[Tensor, " d_sae"]:
    """beta of every latent: the least-squares factor on f_j d_j for what the other latents leave
    of a model's states, acts_j d_j + error. NaN for latents with f_j = 0 everywhere."""
    f, acts, error, steps = (x.double() for x in (f, acts, error, steps))
    lengths = steps.square().sum(dim=-1)
    above = (f * acts).sum(dim=0) * lengths + (f * (error @ steps.T)).sum(dim=0)
    return above / (f.square().sum(dim=0) * lengths)


def moved_by_models(
    base: LanguageModel,
    tuned: LanguageModel,
    pairs: Sequence[EncodedPair],
    basis: LatentBasis,
    at: str,
) -> list[Moved]:
    """The tuned model's state in the place of the base's, at one position of each clean prompt."""
    check_same_form(base, tuned, pairs)
    found = []
    for pair in pairs:
        place = [(basis.node, pair.place(at)[0])]
        old, new = (read_values(lm, pair.clean, place)[0][0] for lm in (base, tuned))
        found.append(Moved(pair, tuple(pair.clean), place[0][1], old, new))
    return found


def crosscoder_shares(sae: SAE) -> Float[Tensor, "d_sae places"]:
    """Of each latent of a crosscoder, the share of its decoder's length that lies in each place, in
    the scales by which it was trained: over a base and a tuned model, (1, 0) is a latent of the
    base alone and (0, 1) one of the tuned model alone.

    Joint top-k avoids what an L1 penalty does there; `latent_scaling` checks it. Raises UsageError
    for other SAEs.
    """
    parts = crosscoder_parts(sae)
    if parts is None:
        raise UsageError(
            f"`sae` {sae.source or '(in memory)'} is no crosscoder: train one with `arch` "
            "crosscoder over two folders of activations"
        )
    blocks = sae.W_dec.split([int(part["d_model"]) for part in parts], dim=1)
    norms = torch.stack(
        [block.norm(dim=1) * float(part.get("input_scale", 1.0))
         for block, part in zip(blocks, parts, strict=True)], dim=1,
    )  # fmt: skip
    return norms / norms.sum(dim=1, keepdim=True)


def _mean_active(acts: Array) -> Array:
    count = (acts != 0).sum(axis=0)
    return np.asarray(acts.sum(axis=0) / np.maximum(count, 1))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
