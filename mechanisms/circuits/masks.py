"""A mask over heads, learned: which heads carry a property from one prompt to another.

Desiderata-based component masking (Davies et al. 2023): at one position every head's z becomes
m z + (1 - m) z_source, where the source is another prompt, and the mask is trained so that the
model gives the *wanted* answer while few heads are exchanged: the source's own, or what a pair
made for a property says (`data.desiderata`: the position or the label of the box asked for). Heads
whose mask falls under one half carry the property. z is that of the run itself, so that heads after
an exchanged one react to it.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.circuits.circuit import Head
from saesteer.mechanisms.config import MaskConfig
from saesteer.mechanisms.data.encoding import EncodedPair
from saesteer.mechanisms.patching.sites import run_model
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.attention import head_tap, heads
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.evaluation.intervals import Interval, wilson

FEWEST = 12
"""Pairs needed for prompts to learn on, to choose by and to test on."""
_ROWS = 64


@dataclass(frozen=True)
class HeadMask:
    """The heads that carry a property from one prompt to another."""

    at: str
    wanted: str
    """Which property: `answer`, the source's own, or the name of the pairs made for it."""
    heads: tuple[Head, ...]
    """Of the first seed."""
    accuracy: Interval
    """Share of test prompts that give the wanted answer with these heads exchanged."""
    random: Interval
    """The same for as many heads drawn by chance."""
    every: Interval
    """The same for all heads at the position."""
    by_seed: tuple[tuple[Head, ...], ...]
    jaccard: float
    """Mean overlap of the heads of two seeds."""
    n_test: int

    def document(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def learn_mask(
    lm: LanguageModel,
    pairs: Sequence[EncodedPair],
    at: str = "last",
    config: MaskConfig | None = None,
    *,
    wanted: str = "answer",
    seed: int = 0,
    progress: Progress = no_progress,
) -> HeadMask:
    """Learn which heads at a position carry a property. Half of the pairs are learned on, a quarter
    chooses the epoch, a quarter tests.

    With `wanted` `answer`, the clean prompts are base and source of each other, and the source's
    answer is wanted. With any other name each pair is one exchange: its clean prompt is the base,
    its corrupt one the source, and its answer is wanted.

    Raises UserError for too few pairs, UsageError for prompts of different length.
    """
    config = config or MaskConfig()
    check_mask_pairs(pairs)
    if len({len(ids) for p in pairs for ids in (p.clean, p.corrupt if wanted != "answer" else ())
            if ids}) > 1:  # fmt: skip
        raise UsageError("a mask needs prompts of one length: give pairs of one structure")
    work = _Exchange(lm, pairs, at, wanted == "answer")
    found = []
    for number in range(config.seeds):
        progress("learning masks", number, config.seeds, "seeds")
        found.append(_learn(work, config, seed + number))
    progress("learning masks", config.seeds, config.seeds, "seeds")
    test = work.parts[2]
    masks = [_rounded(mask) for mask in found]
    drawn = torch.Generator().manual_seed(seed)
    count = int((masks[0] == 0).sum())
    chance = torch.ones(work.shape).flatten()
    chance[torch.randperm(chance.numel(), generator=drawn)[:count]] = 0
    chosen = [_heads_of(mask) for mask in masks]
    overlaps = [_jaccard(a, b) for a, b in combinations(chosen, 2)]
    return HeadMask(
        at,
        wanted,
        chosen[0],
        work.accuracy(masks[0], test),
        work.accuracy(chance.view(work.shape), test),
        work.accuracy(torch.zeros(work.shape), test),
        tuple(chosen),
        sum(overlaps) / len(overlaps) if overlaps else 1.0,
        len(test),
    )


def check_mask_pairs(pairs: Sequence[Any]) -> None:
    """Raise UserError for fewer pairs than a mask needs."""
    if len(pairs) < FEWEST:
        raise UserError(f"a mask needs {FEWEST} pairs or more, got {len(pairs)}: give more pairs")


class _Exchange:
    """Prompts, pairs of them as base and source, and the answer that is wanted of each pair."""

    def __init__(
        self, lm: LanguageModel, pairs: Sequence[EncodedPair], at: str, own_answers: bool
    ) -> None:
        self.lm = lm
        order = list(pairs)
        random.Random(0).shuffle(order)
        n, half, quarter = len(order), len(order) // 2, len(order) // 4
        bounds = [(0, half), (half, half + quarter), (half + quarter, n)]
        prompts = [(pair.clean, pair.place(at)[0]) for pair in order]
        self.parts: list[list[tuple[int, int]]] = []
        for low, high in bounds:
            own = list(range(low, high))
            if not own_answers:
                self.parts.append([(i, n + i) for i in own])
                continue
            shifted = own[1:] + own[:1]
            # A source with the base's own answer would teach nothing.
            self.parts.append(
                [(b, s) for b, s in zip(own, shifted, strict=True)
                 if order[b].answer != order[s].answer]
            )  # fmt: skip
        if not own_answers:
            prompts += [(pair.corrupt, pair.place(at)[1]) for pair in order]
        self.ids = torch.tensor([ids for ids, _ in prompts], device=lm.device)
        self.at = torch.tensor([place for _, place in prompts], device=lm.device)
        # By source: it stands in one pair alone.
        answers = [pair.answer for pair in order]
        self.wanted = torch.tensor(answers * (1 if own_answers else 2), device=lm.device)
        layout = heads(lm)
        self.shape = lm.n_layers, layout.n_heads
        self.z = self._values()

    def _values(self) -> Tensor:
        """z `[prompts, layer, head, d_head]` at the position of each prompt."""
        seen: dict[int, Tensor] = {}
        found = []

        def keep(layer: int, at: Tensor) -> Any:
            rows = torch.arange(len(at), device=at.device)
            return lambda z: seen.update({layer: z[rows, at].detach()})

        with head_tap(self.lm) as tap, torch.no_grad():
            for ids, at in zip(self.ids.split(_ROWS), self.at.split(_ROWS), strict=True):
                tap.edits = {(layer, "z"): keep(layer, at) for layer in range(self.lm.n_layers)}
                run_model(self.lm, ids, use_cache=False)
                found.append(torch.stack([seen[layer] for layer in range(self.lm.n_layers)], dim=1))
        return torch.cat(found)

    def logits(self, mask: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """Logits `[pairs, vocabulary]` of the bases with heads exchanged by the mask."""
        base = torch.tensor([b for b, _ in pairs], device=self.ids.device)
        source = torch.tensor([s for _, s in pairs], device=self.ids.device)
        rows, at = torch.arange(len(pairs), device=self.ids.device), self.at[base]

        def exchange(layer: int) -> Any:
            m = mask[layer][None, :, None].to(self.z)

            def edit(z: Tensor) -> Tensor:
                mixed = z.clone()
                mixed[rows, at] = m * z[rows, at] + (1 - m) * self.z[source, layer]
                return mixed

            return edit

        with head_tap(self.lm) as tap:
            tap.edits = {(layer, "z"): exchange(layer) for layer in range(self.lm.n_layers)}
            found: Tensor = run_model(self.lm, self.ids[base], use_cache=False).logits[:, -1]
        return found

    def accuracy(self, mask: Tensor, pairs: Sequence[tuple[int, int]]) -> Interval:
        """Share of bases that give the answer that is wanted."""
        with torch.no_grad():
            given = self.logits(mask.to(self.ids.device), pairs).argmax(-1)
        target = self.wanted[[s for _, s in pairs]]
        right = int((given == target).sum())
        low, high = wilson(right, len(pairs))
        return Interval(right / len(pairs), low, high)


def _learn(work: _Exchange, config: MaskConfig, seed: int) -> Tensor:
    """The mask `[layer, head]` of the epoch that did best on the middle part, once rounded."""
    train, choose, _ = work.parts
    mask = torch.ones(work.shape, requires_grad=True)
    optimiser = torch.optim.Adam([mask], lr=config.lr)
    order = list(train)
    drawn = random.Random(seed)
    kept = mask.detach().clone()
    # No head at all is where it starts: others have to be better.
    best = work.accuracy(kept, choose).value, kept.numel()
    for _ in range(config.epochs):
        drawn.shuffle(order)
        for first in range(0, len(order), config.batch):
            batch = order[first : first + config.batch]
            with torch.enable_grad():
                logits = work.logits(mask.to(work.ids.device), batch)
                target = work.wanted[[s for _, s in batch]]
                wanted = logits.gather(1, target[:, None]).mean()
                loss = -wanted + config.lam * (1 - mask).sum().to(wanted)
                (mask.grad,) = torch.autograd.grad(loss, [mask])
            optimiser.step()
            with torch.no_grad():
                mask.clamp_(0, 1)
        rounded = _rounded(mask.detach())
        # Of equally good masks, the one of fewer heads.
        now = work.accuracy(rounded, choose).value, int(rounded.sum())
        if now > best:
            best, kept = now, mask.detach().clone()
    return kept


def _rounded(mask: Tensor) -> Tensor:
    return (mask >= 0.5).float()


def _heads_of(mask: Tensor) -> tuple[Head, ...]:
    return tuple((int(layer), int(head)) for layer, head in (mask == 0).nonzero().tolist())


def _jaccard(a: Sequence[Head], b: Sequence[Head]) -> float:
    union = set(a) | set(b)
    return len(set(a) & set(b)) / len(union) if union else 1.0
