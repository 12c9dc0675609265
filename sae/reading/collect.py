"""One pass over text: statistics of every latent, and the contexts that are kept of each.

Everything is bounded: memory does not grow with the text, but for 4 bytes a token read.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.activations.reader import ActivationBatch, ActivationStream
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.sae_places import SAEPlaces
from saesteer.sae.reading.config import LatentsConfig
from saesteer.sae.reading.kept_contexts import KeptContexts, Window, is_held_out, priorities
from saesteer.sae.reading.sampled_rows import SampledRows
from saesteer.sae.reading.tally import ActivationTally
from saesteer.sae.text.contexts import ContextBatch

MOST_NUMBERS = 2**24
"""Latent activations that are held at once, dense: 64 MB, and three times that with the copies."""
BACKGROUND = 256
"""Windows of held-out text that serve every latent as contexts in which it does not fire."""


@dataclass(frozen=True, eq=False)
class BackgroundWindow:
    """A window drawn at random from held-out text."""

    number: int
    position: int
    active: Int[Tensor, " active"]
    """The tracked latents that fire in it, by their place among them, rising."""


class Collector:
    """Takes contexts with their activations, and keeps what pages of latents show."""

    def __init__(
        self, sae: SAE, config: LatentsConfig, device: torch.device, ids: Sequence[int] | None
    ) -> None:
        """`ids`: the latents whose contexts are kept; None for all of them."""
        self.sae, self.config, self.device = sae, config, device
        self.ids = torch.arange(sae.spec.d_sae) if ids is None else torch.tensor(list(ids))
        self._all = ids is None
        self._columns = self.ids.to(device)
        self.tally = ActivationTally(sae.spec.d_sae, device)
        self.rows = SampledRows(sae.spec.d_sae)
        window = Window(config.before, config.after)

        def kept(k: int) -> KeptContexts:
            return KeptContexts(len(self.ids), k, window, config.text.context, device)

        self.strongest = kept(config.contexts)
        self.sampled = kept(config.samples)
        """Firings drawn at random from contexts that are not held out, at most one of each."""
        self.held_out = kept(config.held_out)
        """The same from contexts that are."""
        self._background: list[tuple[float, int, BackgroundWindow]] = []
        self._text: list[Tensor] = []
        self._numbers: list[Tensor] = []

    def add(
        self,
        source: ContextBatch,
        keep: Bool[Tensor, "contexts seq"],
        x: Float[Tensor, "kept d_in"],
    ) -> None:
        """Take some contexts, and the SAE's input at their kept positions."""
        self._text.append(source.token_ids.to(torch.int32))
        self._numbers.append(source.numbers)
        counts = keep.sum(dim=1).tolist()
        ends = torch.tensor([0, *counts]).cumsum(0).tolist()
        at_once = max(1, MOST_NUMBERS // (keep.shape[1] * self.sae.spec.d_sae))
        for first in range(0, len(keep), at_once):
            last = min(first + at_once, len(keep))
            rows = x[ends[first] : ends[last]].to(self.device)
            self._add_part(source[first:last], keep[first:last], rows)

    def _add_part(
        self, source: ContextBatch, keep: Bool[Tensor, "contexts seq"], x: Float[Tensor, "kept d"]
    ) -> None:
        acts = self.sae.encode(x).float()
        row, latent = acts.nonzero(as_tuple=True)
        self.tally.add(len(acts), latent, acts[row, latent])
        held = is_held_out(source.numbers)
        of_rows = held[:, None].expand_as(keep)[keep]
        self.rows.add(row, latent, source.token_ids[keep], of_rows)
        if not self._all:
            acts = acts[:, self._columns]
        grid = acts.new_zeros(*keep.shape, acts.shape[1])
        grid[keep.to(self.device)] = acts
        numbers = source.numbers.to(self.device)
        keys, positions = grid.abs().max(dim=1)
        never = keys == 0
        self.strongest.add(keys.masked_fill(never, -torch.inf), positions, numbers, grid)
        drawn = priorities(numbers, keep.shape[1], self.config.text.seed)
        keys, positions = torch.where(grid != 0, drawn[:, :, None], -1.0).max(dim=1)
        aside = held.to(self.device)
        for heap, mask in ((self.sampled, aside), (self.held_out, ~aside)):
            offered = keys.masked_fill(never | mask[:, None], -torch.inf)
            heap.add(offered, positions, numbers, grid)
        for place in held.nonzero()[:, 0].tolist():
            self._offer_background(source, keep, place, grid)

    def _offer_background(
        self, source: ContextBatch, keep: Tensor, place: int, grid: Tensor
    ) -> None:
        """Offer one window of a held-out context, at a position drawn among the kept ones."""
        if not bool(keep[place].any()):
            return
        number = int(source.numbers[place])
        seed = self.config.text.seed + 1
        drawn = priorities(source.numbers[place : place + 1], keep.shape[1], seed)[0]
        key, position = drawn.masked_fill(~keep[place], -1.0).max(dim=0)
        full = len(self._background) == BACKGROUND
        if full and float(key) <= self._background[0][0]:
            return
        window = self.strongest.window
        first = window.first(int(position), keep.shape[1])
        seen = grid[place, first : first + window.width(keep.shape[1])]
        active = (seen != 0).any(dim=0).nonzero()[:, 0].cpu()
        entry = (float(key), -number, BackgroundWindow(number, int(position), active))
        (heapq.heapreplace if full else heapq.heappush)(self._background, entry)

    @property
    def background(self) -> list[BackgroundWindow]:
        """Windows of held-out text, in the order of the text."""
        return sorted((entry[2] for entry in self._background), key=lambda one: one.number)

    def contexts(self) -> tuple[Int[Tensor, " contexts"], Int[Tensor, "contexts seq"]]:
        """The numbers of all contexts read, rising, and their tokens."""
        numbers, text = torch.cat(self._numbers), torch.cat(self._text)
        order = numbers.argsort()
        return numbers[order], text[order]

    def bytes(self) -> int:
        """Memory that the kept contexts take."""
        return sum(heap.bytes() for heap in (self.strongest, self.sampled, self.held_out))


def collect(
    stream: ActivationStream,
    sae: SAE,
    places: SAEPlaces,
    config: LatentsConfig,
    ids: Sequence[int] | None,
    progress: Progress = no_progress,
) -> Collector:
    """Read text until `config.tokens` positions are kept, or until it ends.

    Raises UserError where hardly any is kept.
    """
    collector = Collector(sae, config, stream.lm.device, ids)
    progress("latents: read", 0, config.tokens, "tokens")
    with torch.inference_mode():
        while collector.tally.rows < config.tokens:
            read = stream.next_batch()
            if read is None:
                break
            collector.add(read.source, read.keep, _input(read, places))
            done = min(collector.tally.rows, config.tokens)
            progress("latents: read", done, config.tokens, "tokens")
    if collector.tally.rows < 2:
        data = ",".join(config.text.data)
        raise UserError(f"`data` {data} keeps fewer than 2 tokens to read")
    progress("latents: read", config.tokens, config.tokens, "tokens")
    return collector


def _input(read: ActivationBatch, places: SAEPlaces) -> Float[Tensor, "kept d_in"]:
    return places.input({key: rows.float() for key, rows in read.activations.items()})
