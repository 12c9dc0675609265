"""Single values inside a model: what can be read in one run and written into another."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saesteer.checkpoints.errors import NonFiniteError, UsageError
from saesteer.mechanisms.config import HEAD_SITES
from saesteer.sae.model.attention import HeadLayout, HeadTap, head_tap, heads
from saesteer.sae.model.hooks import hooked, layer_index, resolve_site
from saesteer.sae.model.language_model import LanguageModel, uncompiled


@dataclass(frozen=True, order=True)
class Node:
    """One thing to patch: a site of a block, of one head where it has heads."""

    site: str
    layer: int
    head: int | None = None

    def __str__(self) -> str:
        return f"{self.site} {self.layer}" + ("" if self.head is None else f".{self.head}")


@dataclass(frozen=True, eq=False)
class Patch:
    """A value to put in: at `node` and token `position`.

    `value` is `[d_model]` in the residual stream, `[d_head]` for q, k, v and z, and
    `[position + 1]` for a row of pattern. `adds` puts it on top of what is there: only in the
    residual stream, where a value written later would else hide an earlier one.
    """

    node: Node
    position: int
    value: Tensor
    adds: bool = False

    def __post_init__(self) -> None:
        assert not (self.adds and self.node.head is not None), "heads are set, not added to"


def make_nodes(
    lm: LanguageModel,
    sites: Sequence[str],
    layers: Sequence[int] | None = None,
    only: Sequence[int] | None = None,
) -> list[Node]:
    """All nodes of some sites, by site, block and head. `only` chooses query heads.

    Raises UsageError for a block or a head that the model does not have, or a site that the family
    lacks.
    """
    chosen = range(lm.n_layers) if layers is None else [layer_index(lm, one) for one in layers]
    layout: HeadLayout | None = None
    if only is not None or any(site in HEAD_SITES for site in sites):
        layout = heads(lm)
        for head in only or ():
            if not 0 <= head < layout.n_heads:
                raise UsageError(
                    f"`heads` {head} is out of range: {lm.name} has {lm.n_layers} blocks of "
                    f"{layout.n_heads} query heads and {layout.n_kv_heads} of keys and values"
                )
    found = []
    for site in sites:
        for layer in chosen:
            if site not in HEAD_SITES:
                resolve_site(lm, layer, site)
                found.append(Node(site, layer))
            elif layout is not None:
                every = range(layout.n_heads) if only is None else only
                found += [Node(site, layer, head) for head in every]
    return found


def run_model(lm: LanguageModel, ids: Tensor, **more: Any) -> Any:
    """One pass of the whole model, uncompiled, with logits of the last token alone."""
    return uncompiled(lm.model)(input_ids=ids, logits_to_keep=1, **more)


Edit = Callable[[Tensor], Tensor | None]


@contextmanager
def at_sites(lm: LanguageModel, tap: HeadTap | None, edits: dict[tuple[int, str], Edit]) -> Any:
    """Call an edit with the whole tensor of each (layer, site), heads through the open `tap`."""
    with ExitStack() as stack:
        for (layer, site), edit in edits.items():
            if site in HEAD_SITES:
                assert tap is not None
                tap.edits[layer, site] = edit
                stack.callback(tap.edits.pop, (layer, site))
            else:
                stack.enter_context(hooked(resolve_site(lm, layer, site), edit))
        yield


@contextmanager
def tap_if_needed(lm: LanguageModel, nodes: Iterable[Node]) -> Any:
    """An open tap where any node is of a head, else None."""
    if any(node.head is not None for node in nodes):
        with head_tap(lm) as tap:
            yield tap
    else:
        yield None


def pick(node: Node, values: Tensor, position: int) -> Tensor:
    """The value of a node at a token, of the first row of a whole pass."""
    if node.head is None:
        return values[0, position]
    if node.site == "z":
        return values[0, position, node.head]
    if node.site == "pattern":
        return values[0, node.head, position, : position + 1]
    return values[0, node.head, position]


def read_values(
    lm: LanguageModel,
    ids: Sequence[int],
    wanted: Sequence[tuple[Node, int]],
    tap: HeadTap | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The values of nodes at tokens of one run, and its logits `[vocabulary]` at the last token.

    Raises NonFiniteError, naming block and dtype, for NaN or infinite values.
    """
    by_place: dict[tuple[int, str], list[int]] = {}
    for index, (node, _) in enumerate(wanted):
        by_place.setdefault((node.layer, node.site), []).append(index)
    found: list[Tensor] = [torch.empty(0)] * len(wanted)

    def reader(indices: list[int]) -> Edit:
        def read(values: Tensor) -> None:
            for index in indices:
                node, position = wanted[index]
                found[index] = pick(node, values, position).detach().clone()

        return read

    rows = torch.tensor([list(ids)], device=lm.device)
    with torch.no_grad(), ExitStack() as stack:
        if tap is None:
            tap = stack.enter_context(tap_if_needed(lm, (node for node, _ in wanted)))
        edits = {place: reader(indices) for place, indices in by_place.items()}
        stack.enter_context(at_sites(lm, tap, edits))
        logits = run_model(lm, rows, use_cache=False).logits[0, -1]
    check_finite(lm, logits, "the logits")
    for (node, position), value in zip(wanted, found, strict=True):
        check_finite(lm, value, f"{node} at token {position}")
    return found, logits


def check_finite(lm: LanguageModel, values: Tensor, what: str) -> None:
    """Raise NonFiniteError for NaN or infinity."""
    if not bool(torch.isfinite(values).all()):
        kind = str(lm.dtype).removeprefix("torch.")
        raise NonFiniteError(
            f"{lm.name} gave NaN or infinity at {what} in {kind}: try `dtype` float32"
        )
