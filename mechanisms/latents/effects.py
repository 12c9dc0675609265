"""Which latents carry a difference between two runs: exact patches of single ones, and of sets.

A state h of the base run is moved towards a state of the source run along some latents only:
h + sum_{j in J} (a_j source - a_j base) d_j. Candidates are found by one gradient, and every figure
that is shown is an exact patch.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.mechanisms.config import LatentConfig
from saesteer.mechanisms.data.encoding import EncodedPair
from saesteer.mechanisms.latents.basis import LatentBasis, fraction_unexplained
from saesteer.mechanisms.metrics import measure
from saesteer.mechanisms.patching.approximation import Gradients
from saesteer.mechanisms.patching.engine import PatchEngine
from saesteer.mechanisms.patching.sites import Patch
from saesteer.mechanisms.reports.latent_result import Curve, LatentResult
from saesteer.mechanisms.statistics import halves
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.runs.facts import model_facts

Array = np.ndarray
SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True, eq=False)
class Moved:
    """One state of a base run and the one that could be in its place."""

    pair: EncodedPair
    ids: tuple[int, ...]
    """Tokens of the base run."""
    at: int
    old: Tensor
    new: Tensor
    """`[d_model]`."""


def latent_effects(
    lm: LanguageModel,
    basis: LatentBasis,
    rows: Sequence[Moved],
    metric: str,
    config: LatentConfig | None = None,
    *,
    others: Mapping[str, Sequence[int]] | None = None,
    progress: Progress = no_progress,
) -> LatentResult:
    """Effects of latents, of the error, and of the best k latents together.

    Latents are put in order, and k is chosen, on one half of the groups; the share of the site's
    effect that they bring is also given on the other half, which had no part in that.

    Args:
        others: latents from elsewhere, best first, by name (a ranking's), to compare with.

    Raises UserError for states that do not differ, or that move nothing.
    """
    config = config or LatentConfig()
    began = time.perf_counter()
    work = _Work(lm, basis, rows, metric, progress)
    groups = [row.pair.group for row in rows]
    first, rest = halves(groups, seed=config.seed)
    first, rest = (first, rest) if first and rest else (list(range(len(rows))),) * 2
    fast = work.products()
    candidates = _largest(fast[first], work.changes[first].cpu().numpy(), config.verify)
    ends = work.measure("site, latents, error", lambda i: torch.stack(
        [work.whole[i], work.whole[i] - work.error[i], work.error[i]]
    ))  # fmt: skip
    site = float(ends[first, 0].mean())
    if not site:
        raise UserError(
            f"nothing to explain: putting in {basis.node} leaves {metric} of {lm.name} as it is"
        )
    exact = work.measure("patching latents", lambda i: work.along(i, [[j] for j in candidates]))
    mean = np.full(basis.sae.spec.d_sae, -np.inf)
    moved = (work.changes[first] != 0).any(dim=0).cpu().numpy()
    mean[moved] = np.sign(site) * fast[first].mean(axis=0)[moved] - 1e6
    mean[candidates] = np.sign(site) * exact[first].mean(axis=0)
    carried = [int(j) for j in np.argsort(-mean, kind="stable")[: int(moved.sum())]]
    marks = work.marks(first)
    marked = [int(j) for j in np.argsort(-np.abs(marks), kind="stable")[: int(moved.sum())]]
    curves = _curves(work, config, carried, {"mark": marked, **(others or {})}, moved, first, rest)
    own = curves[0]
    size, reached = _smallest(work, own, carried, site, config.share, first)
    chosen = carried[:size]
    together = work.measure("the fewest latents", lambda i: work.along(i, [chosen]))[:, 0]
    return LatentResult(
        model=model_facts(lm),
        sae={"source": basis.sae.source, "sha256": basis.sae.sha256,
             "d_sae": basis.sae.spec.d_sae, "layer": basis.node.layer, "site": basis.node.site},
        config=config,
        metric=metric,
        groups=tuple(groups),
        held_out=tuple(rest),
        site=ends[:, 0],
        latents=ends[:, 1],
        error=ends[:, 2],
        ids=tuple(candidates),
        effects=exact,
        fast=fast[:, candidates],
        changes=work.changes[:, candidates].double().cpu().numpy(),
        marks=marks,
        carried=tuple(carried),
        marked=tuple(marked),
        chosen=tuple(chosen),
        chosen_changes=work.changes[:, chosen].double().cpu().numpy(),
        reached=reached,
        together=together,
        curves=tuple(curves),
        unexplained=(work.unexplained(0), work.unexplained(1)),
        seconds=time.perf_counter() - began,
    )  # fmt: skip


class _Work:
    """States in latents, and patches of them."""

    def __init__(
        self,
        lm: LanguageModel,
        basis: LatentBasis,
        rows: Sequence[Moved],
        metric: str,
        progress: Progress,
    ) -> None:
        self.lm, self.basis, self.rows, self.metric = lm, basis, list(rows), metric
        self.progress = progress
        self.states = [torch.stack([getattr(row, name) for row in rows]) for name in ("old", "new")]
        with torch.no_grad():
            self.parts = [basis.split(h) for h in self.states]
        self.whole = (self.states[1] - self.states[0]).to(basis.steps)
        self.changes = self.parts[1].acts - self.parts[0].acts
        self.error = self.parts[1].error - self.parts[0].error
        if not bool((self.changes != 0).any()):
            raise UserError(
                f"no latent of `sae` {basis.sae.source} differs between the two runs at "
                f"{basis.node}: take other pairs or another position"
            )

    def products(self) -> Array:
        """(a source - a base) (d_j . dm/dh) of every latent, `[rows, d_sae]`: to first order."""
        found = np.empty(self.changes.shape)
        place = (self.basis.node.layer, self.basis.node.site)
        for number, row in enumerate(self.rows):
            self.progress("gradients", number, len(self.rows), "runs")
            logits: list[Tensor] = []
            score = partial(self._score, row.pair, logits)
            grads = Gradients(self.lm, row.ids, {place}, score, None).grads[place][0, row.at]
            slopes = self.basis.steps @ grads.to(self.basis.steps)
            found[number] = (self.changes[number] * slopes).double().cpu().numpy()
        self.progress("gradients", len(self.rows), len(self.rows), "runs")
        return found

    def _score(self, pair: EncodedPair, base: list[Tensor], logits: Tensor) -> Tensor:
        return measure(self.metric, logits, pair, logits[0].detach())

    def along(self, row: int, sets: Sequence[Sequence[int]]) -> Tensor:
        """How far each set of latents moves the state of a row, `[sets, d_model]`."""
        return torch.stack(
            [self.basis.join(self.changes[row : row + 1, list(ids)], ids)[0] for ids in sets]
        )

    def first_of(self, order: Sequence[int], sizes: Sequence[int]) -> Callable[[int], Tensor]:
        """Moves along the first k of an order, for each k."""
        return lambda row: self.along(row, [order[:k] for k in sizes])

    def measure(self, stage: str, moves: Callable[[int], Tensor]) -> Array:
        """Effects `[rows, sets]` of moving each row's state by `moves(row)` `[sets, d_model]`."""
        found = []
        for number, row in enumerate(self.rows):
            self.progress(stage, number, len(self.rows), "runs")
            shifts = moves(number)
            effects = np.zeros(len(shifts))
            some = [i for i in range(len(shifts)) if bool((shifts[i] != 0).any())]
            if some:
                engine = PatchEngine(self.lm, row.ids)
                base = measure(self.metric, engine.logits[None], row.pair, engine.logits)[0]
                new = [row.old + shifts[i].to(row.old) for i in some]
                sets = [[Patch(self.basis.node, row.at, value)] for value in new]
                for indices, logits in engine.run(sets):
                    got = measure(self.metric, logits, row.pair, engine.logits) - base
                    effects[[some[i] for i in indices]] = got.cpu().numpy()
            found.append(effects)
        self.progress(stage, len(self.rows), len(self.rows), "runs")
        return np.array(found)

    def marks(self, rows: Sequence[int]) -> Array:
        """Paired t of each latent's change over these rows, `[d_sae]`: how well it tells the two
        runs apart. A latent that changes by the same amount in all has a very large one."""
        changes = self.changes[list(rows)].double().cpu().numpy()
        spread = changes.std(axis=0, ddof=1) if len(rows) > 1 else np.zeros(changes.shape[1])
        mean = changes.mean(axis=0)
        error = np.maximum(spread / np.sqrt(len(rows)), 1e-9 * np.abs(mean) + 1e-300)
        return np.asarray(mean / error)

    def unexplained(self, run: int) -> float | None:
        """FVU on the base run's states (0) or on the source's (1); None where they are all one."""
        try:
            return fraction_unexplained(self.basis, self.states[run], self.parts[run])
        except UserError:
            return None


def _largest(fast: Array, changes: Array, count: int) -> list[int]:
    """The latents of the largest mean products, of those that change at all."""
    mean = np.abs(fast.mean(axis=0))
    mean[~(changes != 0).any(axis=0)] = -1
    order = np.argsort(-mean, kind="stable")[:count]
    return sorted(int(j) for j in order if mean[j] >= 0)


def _curves(
    work: _Work,
    config: LatentConfig,
    carried: list[int],
    others: Mapping[str, Sequence[int]],
    moved: Array,
    first: Sequence[int],
    rest: Sequence[int],
) -> list[Curve]:
    """Effects of the first k latents of each order, of random ones, and of k directions."""
    sizes = [k for k in SIZES if k <= min(len(carried), config.most)]
    found = []
    for name, order in {"carry": carried, **others}.items():
        own = [k for k in sizes if k <= len(order)]
        effects = work.measure(f"best latents: {name}", work.first_of(order, own))
        found.append(Curve(name, tuple(own), effects))
    drawn = np.random.default_rng(config.seed)
    draws = []
    for number in range(config.random):
        order = [int(j) for j in drawn.permutation(np.flatnonzero(moved))]
        draws.append(work.measure(f"random latents {number + 1}", work.first_of(order, sizes)))
    if draws:
        found.append(Curve("random", tuple(sizes), np.mean(draws, axis=0)))
    # Directions of the first half's differences, uncentred: the mean difference is the first.
    _, _, axes = torch.linalg.svd(work.whole[list(first)].double().cpu(), full_matrices=False)
    axes = axes.to(work.whole)
    own = [k for k in sizes if k <= len(axes)]
    effects = work.measure(
        "principal directions",
        lambda i: torch.stack([(work.whole[i] @ axes[:k].T) @ axes[:k] for k in own]),
    )
    found.append(Curve("directions", tuple(own), effects))
    return found


def _smallest(
    work: _Work,
    curve: Curve,
    order: Sequence[int],
    site: float,
    share: float,
    first: Sequence[int],
) -> tuple[int, bool]:
    """The fewest first latents that bring `share` of the site's effect on these rows; without
    such, the number that brings most, and False."""
    shares = curve.effects[list(first)].mean(axis=0) / site
    enough = np.flatnonzero(shares >= share)
    if not len(enough):
        return curve.sizes[int(shares.argmax())], False
    upper = curve.sizes[int(enough[0])]
    lower = curve.sizes[int(enough[0]) - 1] if enough[0] else 0
    between = list(range(lower + 1, upper))
    if between:
        effects = work.measure("fewest latents", work.first_of(order, between))
        inside = np.flatnonzero(effects[list(first)].mean(axis=0) / site >= share)
        if len(inside):
            return between[int(inside[0])], True
    return upper, True
