"""Instruction vectors: the state of an instruction, put into a prompt that has none.

IV_l is the residual stream after block l at the last token of the instruction. Put at one token of
the prompt without the instruction, in the layers of a set S, it moves the metric by f(S); the whole
instruction moves it by f_full. A pair of layers tells more than its later one only through tokens
that follow, because the later layer overwrites what the earlier wrote at that token.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.config import VectorConfig
from saesteer.mechanisms.data.encoding import encode_pairs
from saesteer.mechanisms.data.instructions import Asked, Place, take_apart
from saesteer.mechanisms.data.pairs import Pair, load_pairs
from saesteer.mechanisms.metrics import check_metric, default_metric, measure
from saesteer.mechanisms.patching.clock import GridClock
from saesteer.mechanisms.patching.engine import PatchEngine, plan_batches
from saesteer.mechanisms.patching.sites import Node, Patch, read_values, run_model
from saesteer.mechanisms.reports.vector_result import LayerSet, VectorResult, best_pairs
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.hooks import layer_index
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.sae.runs.facts import model_facts

Array = np.ndarray
_TRIPLES_OF = 8


@dataclass(frozen=True, eq=False)
class VectorRuns:
    """The runs that instruction vectors come from and go into."""

    lm: LanguageModel
    config: VectorConfig
    metric: str
    asked: list[Asked]
    dropped: list[str]
    layers: list[int]
    base: Array
    """The metric of the prompts without instruction, `[pairs]`."""
    full: Array
    """The metric of the whole prompts."""
    logits: list[Tensor]
    """Of the prompts without instruction."""

    @property
    def groups(self) -> list[str]:
        """The unit of resampling of each pair."""
        return [one.pair.group for one in self.asked]

    @cached_property
    def states(self) -> Float[Tensor, "pairs layers d_model"]:
        """The instruction's states, IV_l."""
        full = self.config.taken == "full"
        return self._read([one.full if full else one.alone for one in self.asked])

    @cached_property
    def plain(self) -> Float[Tensor, "pairs layers d_model"]:
        """The states that they are put in the place of."""
        return self._read([one.target for one in self.asked])

    def _read(self, places: Sequence[Place]) -> Tensor:
        known: dict[Place, Tensor] = {}
        for place in places:
            if place not in known:
                ids, at = place
                wanted = [(Node("resid_post", layer), at) for layer in self.layers]
                known[place] = torch.stack(read_values(self.lm, ids, wanted)[0])
        return torch.stack([known[place] for place in places])

    def others(self) -> dict[str, Tensor]:
        """States of the controls `[pairs, layers, d_model]`, by name."""
        found = {}
        for name in ("other", "shuffled"):
            places = [getattr(one, name) for one in self.asked]
            if all(place is not None for place in places):
                found[name] = self._read(places)
        drawn = torch.Generator().manual_seed(self.config.seed)
        noise = torch.randn(self.states.shape, generator=drawn).to(self.states)
        found["random"] = noise * (self.states.norm(dim=-1, keepdim=True)
                                   / noise.norm(dim=-1, keepdim=True))  # fmt: skip
        if len(self.asked) > 1:
            found["another query"] = self.plain.roll(1, dims=0)
        return found


def vector_runs(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    config: VectorConfig,
    *,
    drop: bool = False,
    progress: Progress = no_progress,
) -> VectorRuns:
    """Run prompts with and without their instruction. Raises what `instruction_vectors` does."""
    layers = list(range(lm.n_layers)) if config.layers is None else [
        layer_index(lm, layer) for layer in config.layers
    ]  # fmt: skip
    encoded, dropped = encode_pairs(
        lm, pairs, chat=config.chat, allow_copies=config.allow_copies, drop=drop
    )
    metric = config.metric or default_metric(encoded)
    check_metric(metric, encoded)
    asked = take_apart(lm, encoded, config.at, chat=config.chat, seed=config.seed)
    if config.sets > 1 and any(at == len(ids) - 1 for ids, at in (one.target for one in asked)):
        raise UsageError(
            f"`sets` 2 and 3 say nothing where {config.at} is the last token of a prompt: the "
            "later layer overwrites the earlier one; use another `at`, or `sets` 1"
        )
    base, full, logits = [], [], []
    for number, one in enumerate(asked):
        progress("running the pairs", number, len(asked), "pairs")
        both = []
        for ids, _ in (one.target, one.full):
            rows = torch.tensor([ids], device=lm.device)
            with torch.no_grad():
                both.append(run_model(lm, rows, use_cache=False).logits[0, -1])
        values = [float(measure(metric, x[None], one.pair, both[0])[0]) for x in both]
        base.append(values[0])
        full.append(values[1])
        logits.append(both[0])
    progress("running the pairs", len(asked), len(asked), "pairs")
    return VectorRuns(
        lm, config, metric, asked, dropped, layers, np.array(base), np.array(full), logits
    )


def instruction_vectors(
    model: str | LanguageModel,
    pairs: str | Sequence[Pair],
    config: VectorConfig | None = None,
    *,
    device: str = "auto",
    dtype: str = "float32",
    n: int = 100,
    drop: bool | None = None,
    progress: Progress = no_progress,
) -> VectorResult:
    """Put the states of each pair's instruction into its prompt without one, and measure.

    Args:
        model: a model or its name, loaded in float32 unless `dtype` says otherwise.
        pairs: pairs with an instruction (see `instruction_spans`), or what `load_pairs` takes.
        drop: as in `patch`.

    Returns:
        Effects f `[pairs, sets]` with controls; `print` it, or see `summary`, `to_frame`,
        `superadditivity`, and `plan`, which makes it a steering plan.

    Raises:
        UsageError: layers, positions or metrics that cannot be; sets of two layers at a last token;
            a grid over `budget_minutes`.
        UserError: pairs without an instruction, or that cannot be scored; an instruction that does
            not move the metric.
    """
    config = config or VectorConfig()
    lm = as_language_model(model, device=device, dtype=dtype)
    if drop is None:
        drop = isinstance(pairs, str) and not Path(pairs).is_file()
    listed = load_pairs(pairs, n=n, seed=config.seed) if isinstance(pairs, str) else list(pairs)
    return effects_of(vector_runs(lm, listed, config, drop=drop, progress=progress), progress)


def effects_of(runs: VectorRuns, progress: Progress = no_progress) -> VectorResult:
    """All sets of layers, and the controls. Raises what `instruction_vectors` does."""
    began = time.perf_counter()
    config, lm = runs.config, runs.lm
    if not float((runs.full - runs.base).mean()):
        raise UserError(
            f"nothing to explain: the instruction leaves {runs.metric} of {lm.name} as it is"
        )
    singles = [(layer,) for layer in runs.layers]
    pairs = list(combinations(runs.layers, 2)) if config.sets > 1 else []
    doses = config.doses or (None,)
    sets = [LayerSet(one, dose) for one in (*singles, *pairs) for dose in doses]
    effects = _run(runs, runs.states, sets, "putting vectors in", progress)
    if config.sets > 2:
        mean = [effects[:, sets.index(LayerSet(one, doses[-1]))].mean() for one in singles]
        best = sorted(np.argsort(-np.array(mean), kind="stable")[:_TRIPLES_OF].tolist())
        more = [LayerSet(one, dose)
                for one in combinations([runs.layers[i] for i in best], 3)
                for dose in doses]  # fmt: skip
        effects = np.hstack([effects, _run(runs, runs.states, more, "triples", progress)])
        sets += more
    compared = [LayerSet(one, doses[-1]) for one in singles]
    if pairs:
        compared += best_pairs(sets, effects, runs.groups, seed=config.seed)
    controls = {}
    for name, states in runs.others().items() if config.controls else ():
        controls[name] = _run(runs, states, compared, f"control: {name}", progress)
    difference = (runs.states - runs.plain).double()
    mean_difference = difference.mean(dim=0)
    along = torch.nn.functional.normalize(mean_difference, dim=-1)
    return VectorResult(
        model=model_facts(lm),
        config=config,
        metric=runs.metric,
        layers=tuple(runs.layers),
        sets=tuple(sets),
        effects=effects,
        base=runs.base,
        full=runs.full,
        groups=tuple(runs.groups),
        compared=tuple(compared),
        controls=controls,
        vectors=mean_difference.cpu(),
        spread=(runs.plain.double() * along).sum(dim=-1).std(dim=0, correction=0).cpu(),
        dropped=tuple(runs.dropped),
        seconds=time.perf_counter() - began,
    )


def _run(
    runs: VectorRuns,
    states: Tensor,
    sets: Sequence[LayerSet],
    stage: str,
    progress: Progress,
) -> Array:
    """f `[pairs, sets]` of states `[pairs, layers, d_model]`."""
    place = {layer: i for i, layer in enumerate(runs.layers)}
    n_layers = runs.lm.n_layers
    work = 0
    for one in runs.asked:
        ids, at = one.target
        places = [[(layer, at) for layer in own.layers] for own in sets]
        work += sum(batch.work(n_layers) for batch in plan_batches(places, len(ids)))
    clock = GridClock(work, n_layers, runs.config.budget_minutes)
    effects = np.empty((len(runs.asked), len(sets)))
    for row, one in enumerate(runs.asked):
        progress(stage, row, len(runs.asked), f"pairs{clock.note()}")
        (ids, at), patches = one.target, []
        for own in sets:
            made = []
            for layer in own.layers:
                value = states[row, place[layer]]
                if own.dose is not None:
                    value = own.dose * (value - runs.plain[row, place[layer]])
                node = Node("resid_post", layer)
                made.append(Patch(node, at, value, adds=own.dose is not None))
            patches.append(made)
        engine = PatchEngine(runs.lm, ids)
        base = measure(runs.metric, engine.logits[None], one.pair, engine.logits)[0]
        clock.start()
        for indices, logits in engine.run(patches, after=clock.tick):
            found = measure(runs.metric, logits, one.pair, engine.logits) - base
            effects[row, list(indices)] = found.cpu().numpy()
    progress(stage, len(runs.asked), len(runs.asked), "pairs")
    return effects
