"""Many exact patches of one prompt at once, without repeating what no patch changes.

A patch at token p of block l leaves everything before p and below l as it was. So the prompt is run
once; the keys and values of tokens [0, p) are kept and shared by all rows of a batch; each row is
one set of patches and holds tokens p.. alone; and blocks below the first that is patched hand on
the residual stream that was stored. A patch costs (1 - l/L) (1 - p/T) of a pass, and the rows of a
batch share every matrix. `reference.py` is the slow twin that judges the result.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saesteer.checkpoints.errors import UserError
from saesteer.mechanisms.patching.sites import (
    Edit,
    Node,
    Patch,
    at_sites,
    check_finite,
    run_model,
)
from saesteer.sae.model.attention import HeadTap
from saesteer.sae.model.hooks import hooked, resolve_site
from saesteer.sae.model.language_model import LanguageModel, uncompiled

BATCH_TOKENS = 256
"""Tokens of a batch: enough rows for matrices to run at speed, few enough to skip blocks."""


@dataclass(frozen=True)
class Batch:
    """Sets of patches that run together."""

    sets: tuple[int, ...]
    """Indices of the sets."""
    start: int
    """First token that any of them changes."""
    first: int
    """First block that any of them changes."""
    tokens: int
    """Tokens of a row."""

    def work(self, n_layers: int) -> int:
        """Tokens times blocks."""
        return len(self.sets) * self.tokens * (n_layers - self.first)


def plan_batches(
    places: Sequence[Sequence[tuple[int, int]]], length: int, batch_tokens: int = BATCH_TOKENS
) -> list[Batch]:
    """Batches for sets of patches given as (block, token), of a prompt of `length` tokens.

    Sets with the same first token run together, in the order of their first block.
    """
    by_start: dict[int, list[int]] = {}
    for index, one in enumerate(places):
        by_start.setdefault(min(token for _, token in one), []).append(index)
    found = []
    for start, indices in sorted(by_start.items()):
        tokens = length - start
        indices.sort(key=lambda index: min(layer for layer, _ in places[index]))
        rows = max(1, batch_tokens // tokens)
        for at in range(0, len(indices), rows):
            some = tuple(indices[at : at + rows])
            first = min(layer for layer, _ in places[some[0]])
            found.append(Batch(some, start, first, tokens))
    return found


class PatchEngine:
    """One prompt, run once, that any number of patches can be put into.

    Needs memory for the residual stream of every block and the keys and values of the prompt. `tap`
    is an open head tap, needed for patches of heads.
    """

    def __init__(self, lm: LanguageModel, ids: Sequence[int], tap: HeadTap | None = None) -> None:
        self.lm = lm
        self.tap = tap
        self.length = len(ids)
        self.ids = torch.tensor([list(ids)], device=lm.device)
        self._streams: list[Tensor] = []
        self._tuples: list[bool] = []
        with torch.no_grad(), ExitStack() as stack:
            for layer, block in enumerate(lm.blocks):
                stack.enter_context(hooked(resolve_site(lm, layer, "resid_pre"), self._keep))
                stack.callback(block.register_forward_hook(self._note_form).remove)
            found = run_model(lm, self.ids, use_cache=True, **{_cache_name(lm): _new_cache()})
        self.logits: Tensor = found.logits[0, -1]
        """Of the unpatched run, `[vocabulary]`."""
        check_finite(lm, self.logits, "the logits")
        cache = getattr(found, "cache", None) or found.past_key_values
        self._keys_values = [(layer.keys, layer.values) for layer in cache.layers]
        whole = [k.shape[-2] == self.length for k, _ in self._keys_values if k is not None]
        if len(whole) != lm.n_layers or not all(whole):
            raise UserError(
                f"{lm.name} keeps no keys and values of every token in each block, so parts of a "
                "prompt cannot be run again: its patches have to be made one by one (Python: "
                "patching.reference.patched_logits)"
            )

    def _keep(self, h: Tensor) -> None:
        self._streams.append(h.detach().clone())

    def _note_form(self, _: nn.Module, __: Any, output: Any) -> None:
        self._tuples.append(not isinstance(output, Tensor))

    def run(
        self,
        sets: Sequence[Sequence[Patch]],
        *,
        batch_tokens: int = BATCH_TOKENS,
        after: Callable[[Batch], None] = lambda batch: None,
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield (indices of sets, logits `[sets, vocabulary]` at the last token), batch by batch.

        `after` is called when a batch has run.
        """
        places = [[(p.node.layer, p.position) for p in one] for one in sets]
        for batch in plan_batches(places, self.length, batch_tokens):
            logits = self._run_batch(batch, [sets[index] for index in batch.sets])
            after(batch)
            yield batch.sets, logits

    def _run_batch(self, batch: Batch, sets: Sequence[Sequence[Patch]]) -> Tensor:
        rows, start = len(sets), batch.start
        edits = _writers(sets, start)
        ids = self.ids[:, start:].expand(rows, -1)
        where = torch.arange(start, self.length, device=self.ids.device)
        more: dict[str, Any] = {"position_ids": where.expand(rows, -1), "use_cache": start > 0}
        if start:
            more[_cache_name(self.lm)] = self._prefix(rows, start, batch.first)
        with (
            torch.no_grad(),
            self._skipped(batch.first, rows, start),
            at_sites(self.lm, self.tap, edits),
        ):
            logits: Tensor = run_model(self.lm, ids, **more).logits[:, -1]
        check_finite(self.lm, logits, f"the logits after patches from block {batch.first} on")
        return logits

    def _prefix(self, rows: int, start: int, first: int) -> Any:
        """A cache of the tokens before `start`, shared by all rows. The library asks the first
        block for its length, whether or not that runs."""
        cache = _new_cache()
        for layer, (keys, values) in enumerate(self._keys_values):
            cache.update(keys[:, :, :0], values[:, :, :0], layer)
            if layer == 0 or layer >= first:
                # Expanded, not copied: appending the rows' own keys copies them anyway.
                cache.layers[layer].keys = keys[:, :, :start].expand(rows, -1, -1, -1)
                cache.layers[layer].values = values[:, :, :start].expand(rows, -1, -1, -1)
        return cache

    @contextmanager
    def _skipped(self, first: int, rows: int, start: int) -> Iterator[None]:
        """Blocks below `first` compute nothing; the last of them hands on the stored stream."""

        def handing_on(layer: int) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
                if layer == first - 1:
                    hidden_states = self._streams[first][:, start:].repeat(rows, 1, 1)
                return (hidden_states, None) if self._tuples[layer] else hidden_states

            return forward

        blocks = list(self.lm.blocks)[:first]
        before = [block.__dict__.get("forward") for block in blocks]
        try:
            for layer, block in enumerate(blocks):
                block.forward = handing_on(layer)
            yield
        finally:
            for block, own in zip(blocks, before, strict=True):
                if own is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.forward = own


def _writers(sets: Sequence[Sequence[Patch]], start: int) -> dict[tuple[int, str], Edit]:
    """An edit for each (layer, site) that writes every row's patches of that place."""
    by_place: dict[tuple[int, str], list[tuple[int, Patch]]] = {}
    for row, patches in enumerate(sets):
        for patch in patches:
            by_place.setdefault((patch.node.layer, patch.node.site), []).append((row, patch))

    def writer(site: str, own: list[tuple[int, Patch]]) -> Edit:
        rows = torch.tensor([row for row, _ in own])
        tokens = torch.tensor([patch.position for _, patch in own])
        chosen = torch.tensor([patch.node.head or 0 for _, patch in own])
        adds = torch.tensor([patch.adds for _, patch in own])

        def write(values: Tensor) -> Tensor:
            values = values.clone()
            if site == "pattern":
                for row, patch in own:
                    line = values[row, patch.node.head, patch.position - start]
                    line.zero_()
                    line[: patch.position + 1] = patch.value
                return values
            new = torch.stack([patch.value for _, patch in own]).to(values)
            if site in ("k", "v"):
                values[rows, chosen, tokens] = new  # keys include the prefix
            elif site == "q":
                values[rows, chosen, tokens - start] = new
            elif site == "z":
                values[rows, tokens - start, chosen] = new
            elif adds.any():
                kept = adds.to(values)[:, None] * values[rows, tokens - start]
                values[rows, tokens - start] = new + kept
            else:
                values[rows, tokens - start] = new
            return values

        return write

    return {place: writer(place[1], own) for place, own in by_place.items()}


def _new_cache() -> Any:
    """A cache that keeps every token: one made from the config would drop what has left a sliding
    window, and windows are in the masks as well."""
    from transformers import DynamicCache

    return DynamicCache()


def _cache_name(lm: LanguageModel) -> str:
    """What the model calls its cache: `past_key_values`, since transformers 5.24 `cache`."""
    known = inspect.signature(uncompiled(lm.model).forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def single(nodes: Sequence[Node], positions: Sequence[int], values: Sequence[Tensor]) -> list[
    list[Patch]
]:  # fmt: skip
    """Sets of one patch each."""
    made = zip(nodes, positions, values, strict=True)
    return [[Patch(node, position, value)] for node, position, value in made]
