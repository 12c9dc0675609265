"""An answer's logit as a sum over latents and tokens, in the frozen network: exact, error included.

With u_t = dm/dh_t of the frozen network at the SAE's site, h_t . u_t is what token t brings there,
and it is sum_j a_j (d_j . u_t) + b_dec . u_t + error . u_t. Masses say what this pass was made of,
not what would happen if something changed: `patch_latents` says that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.data.encoding import EncodedPair
from saesteer.mechanisms.latents.basis import LatentBasis
from saesteer.mechanisms.patching.sites import Edit
from saesteer.mechanisms.routes.frozen import FrozenNetwork
from saesteer.sae.model.language_model import LanguageModel

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class LatentTrace:
    """Masses of one prompt at one site, in the metric's unit."""

    tokens: tuple[str, ...]
    total: float
    """The metric: answer minus wrong logit, or the answer's logit."""
    latents: Float[Tensor, "tokens d_sae"]
    constant: Float[Tensor, " tokens"]
    """Of `b_dec`."""
    error: Float[Tensor, " tokens"]

    def __repr__(self) -> str:
        return (
            f"LatentTrace({self.total:+.3f}: latents {float(self.latents.sum()):+.3f}, b_dec "
            f"{float(self.constant.sum()):+.3f}, error {float(self.error.sum()):+.3f}, rest "
            f"{self.rest:+.3f})"
        )

    @property
    def rest(self) -> float:
        """What biases after the site bring: the total less all masses; 0 without biases."""
        masses = self.latents.sum() + self.constant.sum() + self.error.sum()
        return self.total - float(masses)

    def largest(self, count: int = 20) -> list[dict[str, Any]]:
        """Latents at tokens with the largest masses."""
        order = self.latents.abs().flatten().argsort(descending=True)[:count]
        width = self.latents.shape[1]
        return [
            {
                "token": int(i) // width,
                "text": self.tokens[int(i) // width],
                "latent": int(i) % width,
                "mass": float(self.latents.flatten()[i]),
            }
            for i in order
            if float(self.latents.flatten()[i])
        ]

    def to_frame(self) -> Any:
        """A pandas table of all latents at tokens that have a mass."""
        import pandas

        return pandas.DataFrame(self.largest(self.latents.numel()))


def latent_trace(lm: LanguageModel, basis: LatentBasis, pair: EncodedPair) -> LatentTrace:
    """Masses of a pair's clean prompt, for answer minus wrong logit (without a wrong answer, for
    the answer's logit).

    Raises UsageError and UserError for a model that cannot be frozen.
    """
    net = FrozenNetwork(lm, pair.clean)

    def metric(logits: Tensor) -> Tensor:
        return logits[pair.answer] - (0 if pair.wrong is None else logits[pair.wrong])

    h, u = _slopes(net, basis, metric)
    parts = basis.split(h)
    u = u.to(parts.acts)
    return LatentTrace(
        tuple(lm.tokenizer.convert_ids_to_tokens(list(pair.clean))),
        float(metric(net.logits)),
        parts.acts * (u @ basis.steps.T),
        u @ basis.sae.b_dec,
        (parts.error * u).sum(dim=-1),
    )


@dataclass(frozen=True, eq=False)
class LatentEdges:
    """What an upstream SAE's latents bring to the pre-activation of a downstream latent."""

    target: int
    at: int
    pre_act: float
    latents: Float[Tensor, "tokens d_sae"]
    constant: float
    """Of both `b_dec`, of the encoder's bias, and of biases between the two sites."""
    error: Float[Tensor, " tokens"]


def latent_edges(
    lm: LanguageModel,
    ids: Sequence[int],
    upstream: LatentBasis,
    downstream: LatentBasis,
    target: int,
    at: int,
) -> LatentEdges:
    """Edges into latent `target` at token `at` of a later site: in the frozen network they add up
    to its pre-activation exactly, with the upstream error and a constant.

    Raises UsageError for a downstream site that is not in a later block, or an SAE whose
    pre-activation is not linear in its input.
    """
    if upstream.node.layer >= downstream.node.layer:
        raise UsageError(
            f"edges go to a later block: upstream is {upstream.node}, downstream {downstream.node}"
        )
    sae = downstream.sae
    if not 0 <= target < sae.spec.d_sae or sae.spec.architecture in ("gated", "matching_pursuit"):
        raise UsageError(
            f"latent {target} of `sae` {sae.source} has no linear pre-activation: give one of "
            f"0..{sae.spec.d_sae - 1} of an SAE that is not gated"
        )
    net = FrozenNetwork(lm, ids)
    place = (downstream.node.layer, downstream.node.site)
    seen: list[Tensor] = []

    def metric(_: Tensor) -> Tensor:
        return sae.pre_acts(seen[-1])[target]

    h, v = _slopes(net, upstream, metric, {place: lambda x: seen.append(x[0, at])})
    parts = upstream.split(h)
    v = v.to(parts.acts)
    masses, error = parts.acts * (v @ upstream.steps.T), (parts.error * v).sum(dim=-1)
    pre_act = float(sae.pre_acts(seen[-1].detach())[target])
    rest = pre_act - float(masses.sum()) - float(error.sum())
    return LatentEdges(target, at, pre_act, masses, rest, error)


def _slopes(
    net: FrozenNetwork,
    basis: LatentBasis,
    metric: Callable[[Tensor], Tensor],
    more: dict[tuple[int, str], Edit] | None = None,
) -> tuple[Tensor, Tensor]:
    """States `[tokens, d_model]` at the SAE's site and the gradient of a metric there."""
    leaf: list[Tensor] = []

    def cut(h: Tensor) -> Tensor:
        leaf.append(h.detach().requires_grad_(True))
        return leaf[0]

    with torch.enable_grad():
        edits: dict[tuple[int, str], Edit] = {(basis.node.layer, basis.node.site): cut}
        logits = net.run(net.embeddings, edits | (more or {}))
        (slopes,) = torch.autograd.grad(metric(logits), leaf)
    return leaf[0].detach()[0], slopes[0]
