"""Gradient shortcuts: all effects of a pair of runs from a few passes, to first order.

`atp` (attribution patching): with a the value of a node and m the metric,

    effect ~ (a_source - a_base) . dm/da        at the base run.

`ig` averages the gradient over points of the straight line between the embeddings of both runs
(integrated gradients; Hanna et al. 2024 use it for edges). `atp*` follows Kramar et al. 2024: a q
or k node recomputes the softmax it feeds, since that saturates, and every node's size is the mean
over gradients that each leave out one block (GradDrop), since effects of two paths may cancel; the
sign is that of the plain product.

These are estimates: `agreement.py` says how far off they are, and nothing shows them without it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.patching.sites import Node, at_sites, pick, read_values, run_model
from saesteer.sae.model.attention import HeadTap
from saesteer.sae.model.hooks import hooked, resolve_site
from saesteer.sae.model.language_model import LanguageModel

Score = Callable[[Tensor], Tensor]
"""Logits `[1, vocabulary]` of the last token to the metric `[1]`."""
Where = tuple[Node, int, int]
"""A node, its token in the base run and in the source run."""
_Place = tuple[int, str]

_SOFTMAX = ("q", "k")


def approximate(
    lm: LanguageModel,
    base: Sequence[int],
    source: Sequence[int],
    wanted: Sequence[Where],
    score: Score,
    method: str,
    *,
    ig_steps: int = 10,
    tap: HeadTap | None = None,
) -> Tensor:
    """Estimated effect `[len(wanted)]`, float64, of putting each source value into the base run.

    `tap` is an open head tap, needed for nodes of heads. Raises UsageError for `ig` between runs
    of different length.
    """
    new, _ = read_values(lm, source, [(node, at) for node, _, at in wanted], tap)
    old, _ = read_values(lm, base, [(node, at) for node, at, _ in wanted], tap)
    changes = [(a - b).double() for a, b in zip(new, old, strict=True)]
    places = {(node.layer, node.site) for node, _, _ in wanted}
    if method == "ig":
        return _integrated(lm, base, source, wanted, changes, places, score, ig_steps, tap)
    if method == "atp":
        found = Gradients(lm, base, places, score, tap)
        return found.products(wanted, changes)
    starred = {(layer, "z") for layer, site in places if site in _SOFTMAX}
    found = Gradients(lm, base, places | starred, score, tap)
    inner = _attention_values(lm, base, {layer for layer, _ in starred}, tap)
    plain = _with_softmax(found, wanted, changes, new, inner, tap)
    sizes = torch.zeros_like(plain)
    for layer in range(lm.n_layers):
        cut = Gradients(lm, base, places | starred, score, tap, cut=layer)
        sizes += _with_softmax(cut, wanted, changes, new, inner, tap).abs()
    # A block's own nodes have no gradient while it is cut.
    return plain.sign() * sizes / max(1, lm.n_layers - 1)


class Gradients:
    """dm/da at whole sites of one run, with the run's values there."""

    def __init__(
        self,
        lm: LanguageModel,
        ids: Sequence[int],
        places: set[_Place],
        score: Score,
        tap: HeadTap | None,
        *,
        start: Tensor | None = None,
        cut: int | None = None,
    ) -> None:
        kept: dict[_Place, Tensor] = {}

        def keep(place: _Place) -> Callable[[Tensor], None]:
            return lambda values: kept.update({place: values})

        def begin(h: Tensor) -> Tensor:
            # Weights may be frozen: the graph begins here.
            return (h if start is None else start).detach().clone().requires_grad_(True)

        rows = torch.tensor([list(ids)], device=lm.device)
        with torch.enable_grad(), ExitStack() as stack:
            stack.enter_context(hooked(resolve_site(lm, 0, "resid_pre"), begin))
            if cut is not None:
                stack.enter_context(_cut(lm, cut))
            stack.enter_context(at_sites(lm, tap, {place: keep(place) for place in places}))
            logits = run_model(lm, rows, use_cache=False).logits[:, -1]
            found = torch.autograd.grad(score(logits)[0], list(kept.values()), allow_unused=True)
        self.grads = {
            place: torch.zeros_like(values) if grad is None else grad.detach()
            for (place, values), grad in zip(kept.items(), found, strict=True)
        }

    def products(self, wanted: Sequence[Where], changes: Sequence[Tensor]) -> Tensor:
        """(a_source - a_base) . dm/da of each node."""
        found = [
            (change * pick(node, self.grads[node.layer, node.site], at).double()).sum()
            for (node, at, _), change in zip(wanted, changes, strict=True)
        ]
        return torch.stack(found)


@contextmanager
def _cut(lm: LanguageModel, layer: int) -> Iterator[None]:
    """Let no gradient through what a block adds to the residual stream."""
    entered: list[Tensor] = []
    with (
        hooked(resolve_site(lm, layer, "resid_pre"), lambda h: entered.append(h)),
        hooked(resolve_site(lm, layer, "resid_post"),
               lambda h: entered[-1] + (h - entered[-1]).detach()),
    ):  # fmt: skip
        yield


def _integrated(
    lm: LanguageModel,
    base: Sequence[int],
    source: Sequence[int],
    wanted: Sequence[Where],
    changes: Sequence[Tensor],
    places: set[_Place],
    score: Score,
    steps: int,
    tap: HeadTap | None,
) -> Tensor:
    if len(base) != len(source):
        raise UsageError(
            f"`fast` ig goes straight from one run's embeddings to the other's: it needs runs of "
            f"one length, got {len(base)} and {len(source)} tokens; use atp"
        )
    first = [(Node("resid_pre", 0), t) for t in range(len(base))]
    ends = [torch.stack(read_values(lm, ids, first)[0])[None] for ids in (base, source)]
    total = torch.zeros(len(wanted), dtype=torch.float64)
    for step in range(steps):
        point = torch.lerp(ends[0], ends[1], (step + 0.5) / steps)
        found = Gradients(lm, base, places, score, tap, start=point)
        total += found.products(wanted, changes).cpu() / steps
    return total


def _attention_values(
    lm: LanguageModel, ids: Sequence[int], layers: set[int], tap: HeadTap | None
) -> dict[_Place, Tensor]:
    """q, k, v, scores, pattern and z `[head, …]` of some blocks of one run."""
    kept: dict[_Place, Tensor] = {}

    def keep(place: _Place) -> Callable[[Tensor], None]:
        return lambda values: kept.update({place: values[0].detach().double()})

    if layers:
        assert tap is not None
        own = dict(tap.edits)
        sites = ("q", "k", "v", "scores", "pattern", "z")
        tap.edits.update({(layer, site): keep((layer, site)) for layer in layers for site in sites})
        try:
            with torch.no_grad():
                rows = torch.tensor([list(ids)], device=lm.device)
                run_model(lm, rows, use_cache=False)
        finally:
            tap.edits.clear()
            tap.edits.update(own)
    return kept


def _with_softmax(
    found: Gradients,
    wanted: Sequence[Where],
    changes: Sequence[Tensor],
    new: Sequence[Tensor],
    inner: Mapping[_Place, Tensor],
    tap: HeadTap | None,
) -> Tensor:
    """Like `products`, but q and k nodes go through the softmax they feed: dz . dm/dz."""
    estimates = found.products(wanted, changes)
    for index, (node, at, _) in enumerate(wanted):
        if node.site not in _SOFTMAX:
            continue
        assert tap is not None and node.head is not None
        layer, head = node.layer, node.head
        q, k, v, scores, pattern, z = (
            inner[layer, site] for site in ("q", "k", "v", "scores", "pattern", "z")
        )
        grad = found.grads[layer, "z"][0, :, head].double()
        value = new[index].double()
        scaling, softcap = tap.scaling[layer]
        if node.site == "q":
            moved = _capped(k[head] @ value, scaling, softcap)
            moved = moved - _capped(k[head] @ q[head, at], scaling, softcap)
            row = torch.softmax(scores[head, at] + moved, dim=-1)
            estimates[index] = ((row - pattern[head, at]) @ v[head]) @ grad[at]
            continue
        moved = _capped(q[head] @ value, scaling, softcap)
        moved = moved - _capped(q[head] @ k[head, at], scaling, softcap)
        weight = pattern[head, :, at]
        # One score of a row of a softmax changes: the rest shrinks by the common denominator.
        factor = (weight * torch.expm1(moved) / (1 + weight * torch.expm1(moved)))[:, None]
        change = factor * (v[head, at] - z[:, head])
        estimates[index] = (change[at:] * grad[at:]).sum()
    return estimates


def _capped(products: Tensor, scaling: float, softcap: float | None) -> Tensor:
    scores = products * scaling
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
