"""Path patching: what a head does to others, or to the logits, along direct paths alone.

Run 1 puts a sender's z of the source run into the base run while every other head keeps its z, at
every token from the sender's on. Then nothing but the sender's own token can change, and no
attention has to be computed: a sender is one row of one token whose attention hands on the stored
z, with one head exchanged, and all senders are one batch. Run 2 puts what the receivers got (q, k
or v at that token) into the base run and lets everything else react; the patch engine does that.
MLPs are free in both. Wang et al. 2022 and Goldowsky-Dill et al. 2023 define it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.patching.engine import PatchEngine
from saesteer.mechanisms.patching.sites import Node, Patch, make_nodes, read_values, run_model
from saesteer.sae.model.attention import HeadTap, heads
from saesteer.sae.model.language_model import LanguageModel

ROWS = 256
"""Senders of a batch; each is one token."""

Measure = Callable[[Tensor], Tensor]
"""Logits `[rows, vocabulary]` of the last token to the metric `[rows]`."""


def path_effects(
    lm: LanguageModel,
    base: Sequence[int],
    source: Sequence[int],
    senders: Sequence[Node],
    receivers: Sequence[Node] | None,
    base_at: int,
    source_at: int,
    measure: Measure,
    tap: HeadTap,
) -> Tensor:
    """Effect `[len(senders)]`, float64, of each sender's source value along direct paths.

    `senders` are nodes of z, at token `base_at`, which get the values of token `source_at` of the
    source run. `receivers` are nodes of q, k or v at the same token, or None for the logits, which
    are those of the last token. Raises UsageError for logits reached from an earlier token.
    """
    if receivers is None and base_at != len(base) - 1:
        raise UsageError(
            f"heads reach the logits directly from the last token alone, {len(base) - 1}, got "
            f"token {base_at}"
        )
    every = make_nodes(lm, ["z"])
    stored, logits = read_values(lm, base, [(node, base_at) for node in every], tap)
    sent, _ = read_values(lm, source, [(node, source_at) for node in senders], tap)
    layout = heads(lm)
    z = torch.stack(stored).view(lm.n_layers, layout.n_heads, layout.d_head)
    effects = torch.zeros(len(senders), dtype=torch.float64)
    arrived: list[list[Tensor]] = []
    for first in range(0, len(senders), ROWS):
        part = slice(first, first + ROWS)
        values, rows = _one_token(
            lm, base[base_at], base_at, z, senders[part], sent[part], receivers or (), tap
        )
        if receivers is None:
            found = measure(rows)
            effects[part] = (found[1:] - found[0]).cpu().double()
        else:
            arrived += [[value[row] - value[0] for value in values] for row in range(1, len(rows))]
    if receivers is None:
        return effects
    own, _ = read_values(lm, base, [(node, base_at) for node in receivers], tap)
    sets, reached = [], []
    for index, changes in enumerate(arrived):
        before_it = [senders[index].layer < node.layer for node in receivers]
        moved = [
            early and bool((change != 0).any())
            for early, change in zip(before_it, changes, strict=True)
        ]
        if any(moved):
            reached.append(index)
            sets.append(
                [
                    Patch(node, base_at, value + change)
                    for node, value, change, is_moved in zip(
                        receivers, own, changes, moved, strict=True
                    )
                    if is_moved
                ]
            )
    if not sets:
        return effects
    engine = PatchEngine(lm, base, tap)
    before = measure(engine.logits[None])[0]
    for indices, rows in engine.run(sets):
        found = (measure(rows) - before).cpu().double()
        effects[[reached[i] for i in indices]] = found
    return effects


def _one_token(
    lm: LanguageModel,
    token: int,
    at: int,
    z: Tensor,
    senders: Sequence[Node],
    sent: Sequence[Tensor],
    receivers: Sequence[Node],
    tap: HeadTap,
) -> tuple[list[Tensor], Tensor]:
    """One row without a sender and one for each sender: what the receivers get `[rows, d_head]`,
    and the logits `[rows, vocabulary]`."""
    rows = 1 + len(senders)
    by_layer: dict[int, list[int]] = {}
    for index, node in enumerate(senders):
        by_layer.setdefault(node.layer, []).append(index)
    got: dict[tuple[int, str], Tensor] = {}

    def held(layer: int) -> Callable[[Tensor], Tensor]:
        def hold(_: Tensor) -> Tensor:
            values = z[layer].expand(rows, 1, -1, -1).clone()
            for index in by_layer.get(layer, ()):
                values[index + 1, 0, senders[index].head] = sent[index]
            return values

        return hold

    def reader(place: tuple[int, str]) -> Callable[[Tensor], None]:
        return lambda values: got.update({place: values.detach()})

    own = dict(tap.edits)
    tap.edits.clear()
    tap.edits.update({(layer, "z"): held(layer) for layer in range(lm.n_layers)})
    tap.edits.update({place: reader(place) for place in {(n.layer, n.site) for n in receivers}})
    ids = torch.full((rows, 1), token, device=lm.device)
    where: dict[str, Any] = {"position_ids": torch.full_like(ids, at)}
    try:
        with torch.no_grad():
            logits: Tensor = run_model(lm, ids, use_cache=False, **where).logits[:, -1]
    finally:
        tap.edits.clear()
        tap.edits.update(own)
    return [got[n.layer, n.site][:, n.head or 0, 0] for n in receivers], logits
