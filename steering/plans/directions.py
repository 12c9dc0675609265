"""Plans without an SAE: from a mean difference, or any vectors of the residual stream.

A direction is kept as a linear latent: a row d of length 1, whose value is a = h d. Every method
then means what it means for an SAE's latents: add moves h along d, set changes the projection to a
value, project removes it, and gates can test it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError, none_of
from saesteer.sae.activations.prompt_reader import PromptReader
from saesteer.sae.model.hooks import HookPoint, resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import EncodedPrompt, encode_prompt
from saesteer.steering.plans.plan import (
    ModelIdentity,
    Plan,
    PlannedLatent,
    SAEIdentity,
    TaskIdentity,
)

READ_AT = ("last", "template")
"""Where texts are read: the last token of the user's text, or the last token of the prompt."""


@dataclass(frozen=True)
class Passage:
    """The tokens of one text, and the range [start, end) of them that is read."""

    token_ids: list[int]
    start: int
    end: int

    @classmethod
    def last_of(cls, prompt: EncodedPrompt, read: str) -> "Passage":
        """The last token of the user's text, or with `template` of the prompt."""
        end = len(prompt) if read == "template" else prompt.user_span[1]
        return cls(prompt.token_ids, end - 1, end)


@dataclass(frozen=True, eq=False)
class MeanDifference:
    """The mean residual of some passages minus that of others."""

    vector: Float[Tensor, " d_model"]
    """In float64."""
    spread: float
    """Standard deviation of the positive passages along `vector`."""


def plan_from_directions(
    lm: LanguageModel,
    directions: Float[Tensor, "n d_model"],
    *,
    layer: int,
    site: str = "resid_post",
    source: str = "directions",
    sigma: Sequence[float] | None = None,
    method: str = "add",
    unit: str = "raw",
    scale: float = 1.0,
    scope: str = "generation",
    task: TaskIdentity | None = None,
) -> Plan:
    """A plan for vectors in units of the residual: with method add and scale 1, their sum is added.

    Each is stored with length 1 and its own length as `mu`, so that `scale` 1 adds the vector given
    and unit `rel` counts in ||h||. Latents are numbered from 0 in the order given.

    Args:
        source: where the directions come from; stored as the plan's `sae.source`.
        sigma: standard deviation of h d for each direction; needed for unit `sigma`.

    Raises:
        UsageError: a layer or site that the model does not have, a direction of length 0, another
            width than the model's.
    """
    point = resolve_site(lm, layer, site)
    rows = directions.detach().cpu().double()
    if rows.shape[1] != lm.d_model:
        raise UsageError(
            f"directions are {rows.shape[1]} wide and {lm.name} has d_model {lm.d_model}: give "
            "vectors of its residual stream"
        )
    lengths = rows.norm(dim=1)
    if not bool((lengths > 0).all()):
        raise UsageError("a direction has length 0: leave it out")
    unit_rows = (rows / lengths[:, None]).float()
    return Plan(
        model=ModelIdentity(lm.name, lm.fingerprint, lm.n_layers, lm.d_model),
        sae=SAEIdentity(source, "", "linear"),
        site=point.site,
        layer=point.layer,
        latents=tuple(
            PlannedLatent(id=i, mu=length, sigma=None if sigma is None else float(sigma[i]))
            for i, length in enumerate(lengths.tolist())
        ),
        directions=unit_rows,
        method=method,
        unit=unit,
        scale=scale,
        scope=scope,
        task=task,
        W_enc=unit_rows.T.contiguous(),
        b_enc=torch.zeros(len(unit_rows)),
    )


def mean_difference(
    lm: LanguageModel,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    layer: int,
    site: str = "resid_post",
    read: str = "last",
    chat: bool | None = None,
    batch_size: int = 16,
    method: str = "add",
    unit: str = "raw",
    scale: float = 1.0,
    scope: str = "generation",
    task: TaskIdentity | None = None,
) -> Plan:
    """A plan for the mean residual of some texts minus that of others (no SAE).

    Texts are read at their last token (`read="last"`) or at the last token of the prompt
    (`"template"`); attention sinks are left out (see `SinkFilter`). `sigma` is the standard
    deviation of the positive texts along the direction.

    Raises:
        UsageError: no texts, an unknown `read`, a layer or site that the model does not have.
        UserError: only attention sinks would be read, or the means are equal.
        NonFiniteError: the model's activations are NaN or infinite.
    """
    if read not in READ_AT:
        raise none_of("`read`", READ_AT, read)
    use_chat = lm.has_chat_template if chat is None else chat
    point = resolve_site(lm, layer, site)
    kinds = []
    for name, texts in (("positive", positive), ("negative", negative)):
        if not texts:
            raise UsageError(f"a mean difference needs texts of both kinds, got no {name} ones")
        prompts = [encode_prompt(lm, text, chat=use_chat) for text in texts]
        kinds.append([Passage.last_of(prompt, read) for prompt in prompts])
    found = difference_of_means(lm, point, *kinds, batch_size=batch_size)
    return plan_from_directions(
        lm,
        found.vector[None],
        layer=layer,
        site=site,
        source="mean difference",
        sigma=[found.spread],
        method=method,
        unit=unit,
        scale=scale,
        scope=scope,
        task=task,
    )


def difference_of_means(
    lm: LanguageModel,
    point: HookPoint,
    positive: Sequence[Passage],
    negative: Sequence[Passage],
    *,
    batch_size: int = 16,
) -> MeanDifference:
    """The mean residual over the positive passages minus that over the negative ones.

    Every position read has the same weight; attention sinks are left out. Raises UserError when
    only sinks would be read or both means are equal, NonFiniteError when the model's activations
    are NaN or infinite.
    """
    reader = PromptReader(lm, [point], batch_size=batch_size)
    rows = []
    for passages in (positive, negative):
        kept = []
        for read in reader.read([passage.token_ids for passage in passages]):
            here = slice(passages[read.number].start, passages[read.number].end)
            kept.append(read.rows[point.key][here][read.keep[here]].cpu())
        rows.append(torch.cat(kept).double())
        if not len(rows[-1]):
            raise UserError("only attention sinks would be read for the mean difference")
    vector = rows[0].mean(dim=0) - rows[1].mean(dim=0)
    length = vector.norm()
    if not float(length) > 0:
        raise UserError("both kinds of text have the same mean residual: there is no direction")
    return MeanDifference(vector, float((rows[0] @ (vector / length)).std(correction=0)))
