"""Attention knock-out: what is lost when one token may not look at another (Geva et al. 2023).

For each block l, the attention of all heads of blocks 0..l from the tokens `to` to the tokens
`from` is cut (minus infinity before the softmax), so that what `from` holds has to arrive by
another way or in a later block. All prefixes of blocks are rows of one batch.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.config import PatchConfig
from saesteer.mechanisms.data.encoding import EncodedPair, encode_pairs
from saesteer.mechanisms.data.pairs import Pair, load_pairs
from saesteer.mechanisms.metrics import check_metric, default_metric, measure
from saesteer.mechanisms.patching.grid import unpatched
from saesteer.mechanisms.patching.sites import Edit, Node, check_finite, run_model
from saesteer.mechanisms.reports.patch_result import Cell, PatchResult
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.attention import HeadTap, head_tap
from saesteer.sae.model.hooks import layer_index
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.sae.runs.facts import model_facts

SITE = "cut 0 to"
_TOKENS = 1024


def knock_out(
    model: str | LanguageModel,
    pairs: str | Sequence[Pair],
    edges: Sequence[tuple[str, str]],
    config: PatchConfig | None = None,
    *,
    device: str = "auto",
    dtype: str = "float32",
    n: int = 100,
    drop: bool | None = None,
    progress: Progress = no_progress,
) -> PatchResult:
    """Cut attention in the clean run, and measure.

    Args:
        edges: (from, to) names of positions: `to` may not look at `from`. A name of the pairs
            means all of its tokens.
        config: `layers` are the last blocks of the prefixes; metric, chat and seed are used, sites
            and positions are not.

    Raises what `patch` raises, and UsageError for a `from` that does not lie before its `to`.
    """
    config = config or PatchConfig()
    if not edges:
        raise UsageError("`edges` names none: give FROM:TO, such as object:last")
    lm = as_language_model(model, device=device, dtype=dtype)
    if drop is None:
        drop = isinstance(pairs, str) and not Path(pairs).is_file()
    listed = load_pairs(pairs, n=n, seed=config.seed) if isinstance(pairs, str) else list(pairs)
    encoded, dropped = encode_pairs(
        lm, listed, chat=config.chat, allow_copies=config.allow_copies, drop=drop
    )
    metric = config.metric or default_metric(encoded)
    check_metric(metric, encoded)
    cut = [[(_tokens(pair, a), _tokens(pair, b), f"{a}:{b}") for a, b in edges] for pair in encoded]
    for number, own in enumerate(cut, 1):
        for sources, targets, name in own:
            if sources.stop > targets.start:
                raise UsageError(
                    f"`edges` {name}: the first must lie before the second, and is token "
                    f"{sources.stop - 1} and {targets.start} in pair {number}"
                )
    ends = range(lm.n_layers) if config.layers is None else [
        layer_index(lm, layer) for layer in config.layers
    ]  # fmt: skip
    began = time.perf_counter()
    cells = [Cell(Node(SITE, layer), f"{a}:{b}") for a, b in edges for layer in ends]
    effects = np.empty((len(encoded), len(cells)))
    with torch.no_grad(), head_tap(lm) as tap:
        runs = unpatched(lm, encoded, config, metric, progress)
        for row, (pair, own, run) in enumerate(zip(encoded, cut, runs, strict=True)):
            progress("cutting attention", row, len(encoded), "pairs")
            logits = torch.cat([_run(lm, tap, pair.clean, s, t, list(ends)) for s, t, _ in own])
            found = measure(metric, logits, pair, run.logits) - run.base
            effects[row] = found.cpu().numpy()
    progress("cutting attention", len(encoded), len(encoded), "pairs")
    return PatchResult(
        model={**model_facts(lm), "n_layers": lm.n_layers},
        config=config,
        metric=metric,
        cells=tuple(cells),
        effects=effects,
        fast=None,
        agreement=None,
        base=np.array([float(run.base) for run in runs]),
        source=np.array([float(run.source) for run in runs]),
        groups=tuple(pair.group for pair in encoded),
        dropped=tuple(dropped),
        longer=sum(pair.longer for pair in encoded),
        seconds=time.perf_counter() - began,
    )


def _tokens(pair: EncodedPair, name: str) -> range:
    """All tokens of a name in the clean prompt; one for a name with -first or -last."""
    last = pair.place(name)[0]
    first = pair.places.get(f"{name}-first", (last, last))[0]
    return range(first, last + 1)


def _run(
    lm: LanguageModel,
    tap: HeadTap,
    ids: Sequence[int],
    sources: range,
    targets: range,
    ends: Sequence[int],
) -> Tensor:
    """Logits `[prefixes, vocabulary]` with attention cut in blocks 0..end, for each end."""
    found = []
    rows = max(1, _TOKENS // len(ids))
    for first in range(0, len(ends), rows):
        part = ends[first : first + rows]
        before = dict(tap.edits)
        tap.edits.update(
            {(layer, "scores"): _cutter(layer, part, sources, targets)
             for layer in range(max(part) + 1)}
        )  # fmt: skip
        try:
            batch = torch.tensor([list(ids)] * len(part), device=lm.device)
            found.append(run_model(lm, batch, use_cache=False).logits[:, -1])
        finally:
            tap.edits.clear()
            tap.edits.update(before)
    logits = torch.cat(found)
    check_finite(lm, logits, "the logits with attention cut")
    return logits


def _cutter(layer: int, ends: Sequence[int], sources: range, targets: range) -> Edit:
    rows = torch.tensor([i for i, end in enumerate(ends) if end >= layer])

    def cut(scores: Tensor) -> Tensor:
        scores = scores.clone()
        some = scores[rows]
        some[:, :, targets.start : targets.stop, sources.start : sources.stop] = float("-inf")
        scores[rows] = some
        return scores

    return cut
