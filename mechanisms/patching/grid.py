"""`patch`: a grid of patches over pairs of runs, exact or by a shortcut that is checked."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.config import HEAD_SITES, NO_GRADIENT, PatchConfig
from saesteer.mechanisms.data.encoding import EncodedPair, encode_pairs, every_token
from saesteer.mechanisms.data.pairs import Pair, load_pairs
from saesteer.mechanisms.metrics import check_metric, default_metric, measure
from saesteer.mechanisms.patching.agreement import Agreement, agreement, nodes_to_check
from saesteer.mechanisms.patching.approximation import approximate
from saesteer.mechanisms.patching.clock import GridClock
from saesteer.mechanisms.patching.engine import PatchEngine, plan_batches, single
from saesteer.mechanisms.patching.finished import FinishedPairs, digest
from saesteer.mechanisms.patching.sites import Node, make_nodes, read_values, run_model
from saesteer.mechanisms.reports.patch_result import Cell, PatchResult
from saesteer.sae.config import Progress
from saesteer.sae.model.attention import HeadTap, head_tap
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.sae.runs.bars import show_progress
from saesteer.sae.runs.facts import model_facts
from saesteer.steering.evaluation.intervals import wilson


def patch(
    model: str | LanguageModel,
    pairs: str | Sequence[Pair],
    config: PatchConfig | None = None,
    *,
    device: str = "auto",
    dtype: str = "float32",
    n: int = 100,
    drop: bool | None = None,
    finished: FinishedPairs | None = None,
    resume: bool = False,
    progress: Progress = show_progress,
) -> PatchResult:
    """Put values of one run of each pair into the other, one node at a time, and measure.

    Args:
        model: a model or its name. Names are loaded in float32 unless `dtype` says otherwise:
            bfloat16 resolves 0.06 at a logit of 10, and half of that is a patch's effect.
        pairs: pairs, or what `load_pairs` takes (at most `n`).
        config: the grid and the metric.
        drop: leave out, and count, pairs whose answer one token cannot tell apart, instead of
            raising. None does so for the built-in makers alone.
        finished: where pairs are kept as they are done; with `resume` those in it are taken.

    Returns:
        Effects `[pairs, nodes x positions]` with everything that describes them; `print` it, or
        see `PatchResult.summary`, `to_frame` and `document`.

    Raises:
        UsageError: a site, block, head or position that does not exist; runs of different length
            without named positions; a grid over `budget_minutes`; `resume` of another grid.
        UserError: pairs that cannot be scored; a model no better than chance.
        NonFiniteError: NaN or infinity in the model.
    """
    config = config or PatchConfig()
    lm = as_language_model(model, device=device, dtype=dtype)
    if drop is None:
        drop = isinstance(pairs, str) and not Path(pairs).is_file()
    listed = load_pairs(pairs, n=n, seed=config.seed) if isinstance(pairs, str) else list(pairs)
    encoded, dropped = encode_pairs(
        lm, listed, chat=config.chat, allow_copies=config.allow_copies, drop=drop
    )
    grid = _Grid(lm, encoded, config, finished)
    if finished is not None:
        settings = {k: v for k, v in asdict(config).items() if k != "budget_minutes"}
        facts = {"weights": lm.fingerprint, "dtype": str(lm.dtype), "settings": settings}
        finished.open({**facts, "pairs": digest(encoded)}, resume=resume)
    began = time.perf_counter()
    with torch.no_grad():
        runs = unpatched(lm, encoded, config, grid.metric, progress)
        if any(cell.node.head is not None for cell in grid.cells):
            with head_tap(lm) as tap:
                exact, fast, compared = grid.run(runs, tap, progress)
        else:
            exact, fast, compared = grid.run(runs, None, progress)
    return PatchResult(
        model={**model_facts(lm), "n_layers": lm.n_layers},
        config=config,
        metric=grid.metric,
        cells=tuple(grid.cells),
        effects=exact,
        fast=fast,
        agreement=compared,
        base=np.array([float(run.base) for run in runs]),
        source=np.array([float(run.source) for run in runs]),
        groups=tuple(pair.group for pair in encoded),
        tokens=tuple(lm.tokenizer.convert_ids_to_tokens(_base_ids(encoded[0], config)))
        if config.at == ("all",) else (),
        dropped=tuple(dropped),
        longer=sum(pair.longer for pair in encoded),
        seconds=time.perf_counter() - began,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Runs:
    """The two runs of a pair, unpatched."""

    logits: Tensor
    """Of the base run."""
    base: Tensor
    source: Tensor
    """The metric in either."""


def _base_ids(pair: EncodedPair, config: PatchConfig) -> list[int]:
    return pair.clean if config.direction == "noise" else pair.corrupt


def _source_ids(pair: EncodedPair, config: PatchConfig) -> list[int]:
    return pair.corrupt if config.direction == "noise" else pair.clean


def unpatched(
    lm: LanguageModel,
    pairs: Sequence[EncodedPair],
    config: PatchConfig,
    metric: str,
    progress: Progress,
) -> list[Runs]:
    """Run every pair as it is. Raises UserError for a model that is no better than chance."""
    found, right, guessed = [], [], []
    for number, pair in enumerate(pairs):
        progress("running the pairs", number, len(pairs), "pairs")
        both = []
        for ids in (_base_ids(pair, config), _source_ids(pair, config)):
            rows = torch.tensor([ids], device=lm.device)
            both.append(run_model(lm, rows, use_cache=False).logits[0, -1])
        base, source = (measure(metric, one[None], pair, both[0])[0] for one in both)
        found.append(Runs(both[0], base, source))
        clean = both[0] if config.direction == "noise" else both[1]
        if pair.chance is not None:
            right.append(int(clean.argmax()) == pair.answer)
            guessed.append(pair.chance)
        elif pair.wrong is not None:
            right.append(bool(clean[pair.answer] > clean[pair.wrong]))
            guessed.append(0.5)
    progress("running the pairs", len(pairs), len(pairs), "pairs")
    if config.check_chance and right:
        low, high = wilson(sum(right), len(right))
        chance = sum(guessed) / len(guessed)
        if low <= chance:
            raise UserError(
                f"nothing to explain: accuracy {sum(right) / len(right):.2f} [{low:.2f}, "
                f"{high:.2f}] of {lm.name} on {len(right)} clean prompts, chance {chance:.2f}; "
                "take an easier task, more pairs, or another model"
            )
    return found


class _Grid:
    """The cells of a grid, and the ways to fill them."""

    def __init__(
        self,
        lm: LanguageModel,
        pairs: list[EncodedPair],
        config: PatchConfig,
        finished: FinishedPairs | None,
    ) -> None:
        self.lm, self.pairs, self.config, self.finished = lm, pairs, config, finished
        if config.heads is not None and not set(config.sites) & set(HEAD_SITES):
            raise UsageError(
                f"`heads` belongs to sites of heads ({', '.join(HEAD_SITES)}), got sites "
                f"{', '.join(config.sites)}"
            )
        nodes = make_nodes(lm, config.sites, config.layers, config.heads)
        names = every_token(pairs) if config.at == ("all",) else list(config.at)
        self.cells = [Cell(node, name) for node in nodes for name in names]
        self.metric = config.metric or default_metric(pairs)
        check_metric(self.metric, pairs)
        if config.fast is not None and self.metric in NO_GRADIENT:
            raise UsageError(f"`fast` {config.fast} needs a metric with a gradient: use logprob")
        for number, pair in enumerate(pairs, 1):
            for name in names:
                self._check_place(pair, name, number, nodes)
        if config.fast == "ig" and not all(pair.equal_length for pair in pairs):
            raise UsageError("`fast` ig needs both runs of a pair to have one length: use atp")

    def _check_place(
        self, pair: EncodedPair, name: str, number: int, nodes: Sequence[Node]
    ) -> None:
        clean, corrupt = pair.place(name)
        if clean != corrupt and any(node.site == "pattern" for node in nodes):
            raise UsageError(
                f"a row of pattern fits only the same token of both runs, and {name} is token "
                f"{clean} and {corrupt} in pair {number}: patch z, q or k"
            )

    def places(self, pair: EncodedPair, cell: Cell) -> tuple[int, int]:
        """The token of a cell in the base run and in the source run."""
        clean, corrupt = pair.place(cell.at)
        return (clean, corrupt) if self.config.direction == "noise" else (corrupt, clean)

    def run(
        self, runs: Sequence[Runs], tap: HeadTap | None, progress: Progress
    ) -> tuple[np.ndarray, np.ndarray | None, Agreement | None]:
        """Exact effects `[pairs, cells]` (NaN where not patched), estimated ones, agreement."""
        every = list(range(len(self.cells)))
        if self.config.fast is None:
            return self._exact(runs, every, tap, progress), None, None
        fast = np.empty((len(self.pairs), len(self.cells)), dtype=np.float64)
        stage = f"gradients ({self.config.fast})"
        for row, (pair, one) in enumerate(zip(self.pairs, runs, strict=True)):
            progress(stage, row, len(self.pairs), "pairs")
            known = self._known("fast", row)
            fast[row] = self._approximate(pair, one, tap) if known is None else known
            if known is None:
                self._keep("fast", row, fast[row])
        progress(stage, len(self.pairs), len(self.pairs), "pairs")
        mean = fast.mean(axis=0)
        chosen = nodes_to_check(mean, self.config.verify, self.config.checks, self.config.seed)
        exact = self._exact(runs, chosen, tap, progress)
        return exact, fast, agreement(exact.mean(axis=0)[chosen], mean[chosen])

    def _approximate(self, pair: EncodedPair, runs: Runs, tap: HeadTap | None) -> np.ndarray:
        wanted = [(cell.node, *self.places(pair, cell)) for cell in self.cells]
        found = approximate(
            self.lm, _base_ids(pair, self.config), _source_ids(pair, self.config), wanted,
            lambda logits: measure(self.metric, logits, pair, runs.logits),
            str(self.config.fast), ig_steps=self.config.ig_steps, tap=tap,
        )  # fmt: skip
        return np.asarray(found.cpu().numpy())

    def _exact(
        self, runs: Sequence[Runs], chosen: list[int], tap: HeadTap | None, progress: Progress
    ) -> np.ndarray:
        effects = np.full((len(self.pairs), len(self.cells)), np.nan, dtype=np.float64)
        left = []
        for row in range(len(self.pairs)):
            known = self._known("exact", row)
            if known is None:
                left.append(row)
            else:
                effects[row, chosen] = known
        work = self._work(chosen, left)
        clock = GridClock(work, self.lm.n_layers, self.config.budget_minutes)
        for row in left:
            done = len(self.pairs) - len(left) + left.index(row)
            progress("patching", done, len(self.pairs), f"pairs{clock.note()}")
            found = self._exact_pair(self.pairs[row], runs[row], chosen, tap, clock)
            self._keep("exact", row, found)
            effects[row, chosen] = found
        progress("patching", len(self.pairs), len(self.pairs), "pairs")
        return effects

    def _known(self, stage: str, row: int) -> np.ndarray | None:
        return None if self.finished is None else self.finished.get(stage, row)

    def _keep(self, stage: str, row: int, effects: np.ndarray) -> None:
        if self.finished is not None:
            self.finished.add(stage, row, effects)

    def _work(self, chosen: Sequence[int], rows: Sequence[int]) -> int:
        """Tokens times blocks of these pairs, if every value differs."""
        total = 0
        for pair in (self.pairs[row] for row in rows):
            places = [
                [(self.cells[i].node.layer, self.places(pair, self.cells[i])[0])] for i in chosen
            ]
            length = len(_base_ids(pair, self.config))
            total += sum(b.work(self.lm.n_layers) for b in plan_batches(places, length))
        return total

    def _exact_pair(
        self,
        pair: EncodedPair,
        runs: Runs,
        chosen: Sequence[int],
        tap: HeadTap | None,
        clock: GridClock,
    ) -> np.ndarray:
        nodes = [self.cells[i].node for i in chosen]
        both = [self.places(pair, self.cells[i]) for i in chosen]
        base_at, source_at = [b for b, _ in both], [s for _, s in both]
        base_ids, source_ids = _base_ids(pair, self.config), _source_ids(pair, self.config)
        new, _ = read_values(self.lm, source_ids, list(zip(nodes, source_at, strict=True)), tap)
        old, _ = read_values(self.lm, base_ids, list(zip(nodes, base_at, strict=True)), tap)
        effects = np.zeros(len(chosen))
        # A value that is the base run's own changes nothing, exactly: before the first token that
        # differs, both runs have the same bits.
        moved = [i for i in range(len(chosen)) if not torch.equal(new[i], old[i])]
        if not moved:
            return effects
        engine = PatchEngine(self.lm, base_ids, tap)
        base = measure(self.metric, engine.logits[None], pair, engine.logits)[0]
        sets = single([nodes[i] for i in moved], [base_at[i] for i in moved],
                      [new[i] for i in moved])  # fmt: skip
        clock.start()
        for indices, logits in engine.run(sets, after=clock.tick):
            found = measure(self.metric, logits, pair, engine.logits) - base
            effects[[moved[i] for i in indices]] = found.cpu().numpy()
        return effects
