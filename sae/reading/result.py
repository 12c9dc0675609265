"""The result of a reading: the latents that were chosen, each as a card when it is asked for."""

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.shown import Shown, rounded
from saesteer.sae.reading.card import (
    Context,
    Description,
    LatentCard,
    LensToken,
    NearLatent,
    QuantileContexts,
    Steered,
    TaskMark,
    Telling,
)
from saesteer.sae.reading.collect import Collector
from saesteer.sae.reading.config import LatentsConfig
from saesteer.sae.reading.describe import OFFLINE, Window, offline_description, offline_detection
from saesteer.sae.reading.kept_contexts import KeptContexts
from saesteer.sae.reading.lens import Lens
from saesteer.sae.reading.neighbours import Near
from saesteer.sae.reading.pieces import Pieces
from saesteer.sae.reading.tally import bin_edges
from saesteer.sae.reading.telling import TellingToken


@dataclass(frozen=True, eq=False)
class Found:
    """What was computed of the chosen latents, in their order."""

    lens: Lens
    near: Near
    cofires: Near
    telling: list[list[TellingToken]]
    directions: Tensor
    """Their decoder rows `[n, d_out]`, on the CPU."""


@dataclass(frozen=True, eq=False, repr=False)
class Latents(Shown):
    """Latents of an SAE on some text: `found[4]` is the card of latent 4, and a notebook shows it.

    Iterating gives the cards of `ids`. Cards are made when they are asked for; what they are made
    of takes about 8 kB a latent.
    """

    ids: list[int]
    """The chosen latents, in the order of the pages."""
    facts: Mapping[str, Any]
    """Model, SAE, place and text, JSON-ready."""
    config: LatentsConfig
    collected: Collector
    found: Found
    pieces: Pieces
    described: Mapping[int, Description] = field(default_factory=dict)
    """Descriptions by a model."""
    steered: Mapping[int, Steered] = field(default_factory=dict)
    tasks: Mapping[int, Sequence[TaskMark]] = field(default_factory=dict)
    """The rankings that hold a latent."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_place", {latent: i for i, latent in enumerate(self.ids)})
        tracked = {latent: i for i, latent in enumerate(self.collected.ids.tolist())}
        object.__setattr__(self, "_slot", [tracked[latent] for latent in self.ids])
        numbers, text = self.collected.contexts()
        object.__setattr__(self, "_numbers", numbers.tolist())
        object.__setattr__(self, "_text", text.numpy(force=True))

    _place: Mapping[int, int] = field(init=False)
    _slot: Sequence[int] = field(init=False)
    """Of each chosen latent its place in the collector's heaps."""
    _numbers: Sequence[int] = field(init=False)
    _text: NDArray[np.int32] = field(init=False)
    """The tokens of each context."""

    def _facts(self) -> dict[str, Any]:
        tally = self.collected.tally
        return {
            "sae": self.facts["sae"]["source"],
            "model": self.facts["model"]["name"],
            "latents": len(self.ids),
            "d_sae": len(tally.fired),
            "tokens": tally.rows,
            "dead": int((tally.fired == 0).sum()),
            "median_density": rounded(float(tally.density().median())),
        }

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, latent: object) -> bool:
        return latent in self._place

    def __iter__(self) -> Iterator[LatentCard]:
        return (self[latent] for latent in self.ids)

    def __getitem__(self, latent: int) -> LatentCard:
        """The card of a latent. Raises UserError for one that was not chosen."""
        place = self._place.get(int(latent))
        if place is None:
            raise UserError(
                f"latent {latent} was not read: {len(self.ids)} latents were chosen; name it in "
                "`ids`, or read all"
            )
        slot, tally, found = self._slot[place], self.collected.tally, self.found
        card = LatentCard(
            id=int(latent),
            rows=tally.rows,
            fired=int(tally.fired[latent]),
            density=float(tally.fired[latent]) / max(1, tally.rows),
            max=float(tally.strongest[latent]),
            mean=float(tally.sum[latent] / tally.fired[latent].clamp(min=1)),
            std=_std(self.collected, latent),
            histogram=self._histogram(latent),
            top=tuple(self._contexts(self.collected.strongest, slot)),
            quantiles=self._quantiles(slot),
            lens_up=self._lens(found.lens.up[place], found.lens.up_logits[place]),
            lens_down=self._lens(found.lens.down[place], found.lens.down_logits[place]),
            near=_near(found.near, place),
            cofires=_near(found.cofires, place),
            telling=tuple(
                Telling(self.pieces.one(one.token), one.z, one.fired, one.rows)
                for one in found.telling[place]
            ),
            descriptions=(),
            tasks=tuple(self.tasks.get(latent, ())),
            steered=self.steered.get(latent),
        )
        tokens = [one.token for one in found.telling[place]]
        windows = self.windows(latent, with_text=False) if tokens else []
        judged = offline_detection(tokens, windows) if windows else None
        offline = Description(offline_description(card), OFFLINE, judged)
        model = self.described.get(latent)
        return replace(card, descriptions=(offline,) if model is None else (model, offline))

    def windows(self, latent: int, *, with_text: bool = True) -> list[Window]:
        """Held-out windows to judge a description on: those in which the latent fires, drawn at
        random, and as many in which it does not. Empty without windows of both kinds."""
        slot = self._slot[self._place[latent]]
        heap = self.collected.held_out
        held = [
            (number, position)
            for number, position in zip(
                heap.number[slot].tolist(), heap.position[slot].tolist(), strict=True
            )
            if number >= 0
        ]
        background = self.collected.background
        # Each latent begins elsewhere, so that no few windows decide for all.
        turn = latent * 7919 % max(1, len(background))
        silent = [
            (one.number, one.position)
            for one in background[turn:] + background[:turn]
            if not _has(one.active, slot)
        ][: len(held)]
        if not held or not silent:
            return []
        return [
            self._window(number, position, fires, with_text)
            for places, fires in ((held, True), (silent, False))
            for number, position in places
        ]

    def direction(self, latent: int) -> Float[Tensor, " d_model"]:
        """The decoder row of a chosen latent."""
        return self.found.directions[self._place[latent]]

    def shown_to_describer(self, latent: int) -> list[Context]:
        """The contexts that a description is made from: the strongest and the sampled ones, none of
        them held out."""
        slot = self._slot[self._place[latent]]
        collected = self.collected
        strongest = [
            context
            for context in self._contexts(collected.strongest, slot)
            if not _is_held_out(context.number)
        ]
        sampled = self._contexts(collected.sampled, slot)
        seen = {(context.number, context.position) for context in strongest}
        more = [one for one in sampled if (one.number, one.position) not in seen]
        return [*strongest[:10], *more[: max(5, 15 - len(strongest))]]

    def to_frame(self) -> Any:
        """The chosen latents as rows of a pandas DataFrame, with `latent` as the index.

        Columns: density, fired, max, mean, std, description and detection. Needs pandas.
        """
        import pandas

        rows = []
        for card in self:
            judged = card.description.detection
            values = {name: getattr(card, name) for name in ("density", "fired", "max", "mean")}
            score = None if judged is None else judged.score
            rows.append({**values, "std": card.std, "description": card.description.text,
                         "detection": score})  # fmt: skip
        return pandas.DataFrame(rows, index=pandas.Index(self.ids, name="latent"))

    def _histogram(self, latent: int) -> tuple[tuple[float, float, int], ...]:
        counts, edges = self.collected.tally.histogram[latent].tolist(), bin_edges().tolist()
        filled = [i for i, count in enumerate(counts) if count]
        if not filled:
            return ()
        return tuple((edges[i], edges[i + 1], counts[i]) for i in range(filled[0], filled[-1] + 1))

    def _contexts(self, heap: KeptContexts, slot: int) -> list[Context]:
        numbers, positions = heap.number[slot].tolist(), heap.position[slot].tolist()
        acts = heap.acts[slot].tolist()
        return [
            self._context(heap, number, position, values)
            for number, position, values in zip(numbers, positions, acts, strict=True)
            if number >= 0
        ]

    def _context(
        self, heap: KeptContexts, number: int, position: int, acts: list[float]
    ) -> Context:
        ids, first = self._tokens(heap, number, position)
        return Context(
            tokens=tuple(self.pieces.of(ids)),
            acts=tuple(acts),
            index=position - first,
            number=number,
            position=position,
        )

    def _tokens(self, heap: KeptContexts, number: int, position: int) -> tuple[list[int], int]:
        """The tokens of a window, and the place of the first in its context."""
        row = self._text[bisect.bisect_left(self._numbers, number)]
        first = heap.window.first(position, len(row))
        return row[first : first + heap.window.width(len(row))].tolist(), first

    def _window(self, number: int, position: int, fires: bool, with_text: bool) -> Window:
        ids, _ = self._tokens(self.collected.held_out, number, position)
        text = "".join(self.pieces.of(ids)) if with_text else ""
        return Window(text, frozenset(ids), fires)

    def _quantiles(self, slot: int) -> tuple[QuantileContexts, ...]:
        """The sampled firings in parts of equal size, and of each part some, at random."""
        drawn = self._contexts(self.collected.sampled, slot)  # in random order
        by_size = sorted(range(len(drawn)), key=lambda i: abs(drawn[i].act))
        parts = min(self.config.quantiles, len(drawn))
        found = []
        for part in range(parts):
            own = by_size[len(drawn) * part // parts : len(drawn) * (part + 1) // parts]
            some = sorted(own)[: self.config.per_quantile]
            shown = sorted(some, key=lambda i: -abs(drawn[i].act))
            found.append(
                QuantileContexts(
                    low=abs(drawn[own[0]].act),
                    high=abs(drawn[own[-1]].act),
                    firings=len(own),
                    contexts=tuple(drawn[i] for i in shown),
                )
            )
        return tuple(found)

    def _lens(self, tokens: Tensor, logits: Tensor) -> tuple[LensToken, ...]:
        pairs = zip(tokens.tolist(), logits.tolist(), strict=True)
        return tuple(LensToken(self.pieces.one(token), logit) for token, logit in pairs)


def _near(near: Near, place: int) -> tuple[NearLatent, ...]:
    none = [None] * near.latent.shape[1]
    together = none if near.together is None else near.together[place].tolist()
    pairs = zip(near.latent[place].tolist(), near.value[place].tolist(), together, strict=True)
    return tuple(NearLatent(*pair) for pair in pairs if pair[0] >= 0)


def _std(collected: Collector, latent: int) -> float:
    tally = collected.tally
    fired = max(1, int(tally.fired[latent]))
    mean = float(tally.sum[latent]) / fired
    return float(max(0.0, float(tally.squares[latent]) / fired - mean**2) ** 0.5)


def _has(active: Int[Tensor, " active"], slot: int) -> bool:
    place = int(torch.searchsorted(active, slot))
    return place < len(active) and int(active[place]) == slot


def _is_held_out(number: int) -> bool:
    from saesteer.sae.reading.kept_contexts import HELD_OUT

    return number % HELD_OUT == HELD_OUT - 1
