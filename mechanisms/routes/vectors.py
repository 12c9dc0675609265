"""Instruction vectors: is an instruction carried by one state, and do two blocks add up?

IV_l is the residual stream after block l at the last token of the instruction. It is put at one
position of the prompt *without* the instruction, in every block of a set S:

    f(S) = m(patched) - m(prompt without the instruction)

A pair of blocks says something through later tokens alone: at its own position the later state
overwrites what the earlier one wrote, so pairs at the last token are refused.
"""

import itertools
import random
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.data.encoding import EncodedPair, encode_pairs
from saesteer.mechanisms.data.pairs import Pair, load_pairs
from saesteer.mechanisms.metrics import check_metric, default_metric, measure
from saesteer.mechanisms.patching.engine import PatchEngine, plan_batches
from saesteer.mechanisms.patching.grid import Clock
from saesteer.mechanisms.patching.sites import Node, Patch, read_values, run_model
from saesteer.mechanisms.reading_config import VectorConfig
from saesteer.mechanisms.routes.superadditivity import interaction_tests
from saesteer.mechanisms.routes.vector_result import CONTROLS, VectorResult
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.hooks import hooked, layer_index, resolve_site
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.sae.runs.facts import model_facts
from saesteer.sae.text.prompts import encode_prompt

Set = tuple[int, ...]
_BEST_FOR_TRIPLES = 8


@dataclass(frozen=True, eq=False)
class _Query:
    """One query: the prompt without its instruction, and states by block `[layers, d_model]`."""

    target: EncodedPair
    place: int
    full: Tensor
    """Logits of the whole prompt."""
    vector: Tensor
    plain: Tensor
    """States of the unpatched target at `place`."""


def instruction_vectors(
    model: str | LanguageModel,
    pairs: str | Sequence[Pair],
    config: VectorConfig | None = None,
    *,
    n: int = 40,
    device: str = "auto",
    dtype: str = "float32",
    drop: bool | None = None,
    progress: Progress = no_progress,
) -> VectorResult:
    """Put an instruction's states into prompts without it, by sets of blocks, beside controls.

    Pairs need the positions `instruction` and `query`; both instructions of a pair are about the
    same query, and the corrupt one is a control. The other controls, in the same cells: the
    instruction with its words shuffled, a random direction of equal norm, the state of another
    query. Best pairs are chosen on one half of the queries and tested on the other.

    Raises:
        UsageError: pairs of blocks at a position with no later token; a grid over the budget.
        UserError: pairs without those positions, or that cannot be scored.
        NonFiniteError: NaN or infinity in the model.
    """
    config = config or VectorConfig()
    lm = as_language_model(model, device=device, dtype=dtype)
    if drop is None:
        drop = isinstance(pairs, str) and not Path(pairs).is_file()
    listed = load_pairs(pairs, n=n, seed=config.seed) if isinstance(pairs, str) else list(pairs)
    began = time.perf_counter()
    grid = _Vectors(lm, listed, config, drop)
    return grid.run(progress, began)


class _Vectors:
    def __init__(
        self, lm: LanguageModel, pairs: Sequence[Pair], config: VectorConfig, drop: bool
    ) -> None:
        self.lm, self.config = lm, config
        every = range(lm.n_layers) if config.layers is None else config.layers
        self.layers = sorted({layer_index(lm, layer) for layer in every})
        self.nodes = [Node("resid_post", layer) for layer in self.layers]
        # One at a time: which pairs were dropped has to be known.
        self.whole, self.pairs, self.dropped = [], [], []
        for pair in pairs:
            _instruction(pair, 0)
            try:
                (one,), _ = encode_pairs(lm, [pair], chat=config.chat)
            except UserError as error:
                if not drop:
                    raise
                self.dropped.append(str(error))
                continue
            self.whole.append(one)
            self.pairs.append(pair)
        if not self.pairs:
            first = f", first: {self.dropped[0]}" if self.dropped else ""
            raise UserError(f"`pairs` holds no pair that can be scored{first}")
        self.targets, _ = encode_pairs(
            lm, [_without(pair) for pair in self.pairs], chat=config.chat, allow_copies=True
        )
        self.metric = config.metric or default_metric(self.targets)
        check_metric(self.metric, self.targets)
        for number, target in enumerate(self.targets, 1):
            place, last = target.place(config.at)[0], len(target.clean) - 1
            if config.sets > 1 and place == last:
                raise UsageError(
                    f"`sets` {config.sets} needs a later token than {config.at}, which is the last "
                    f"of query {number}: there the later block overwrites the earlier one exactly; "
                    "give sets 1, or a cue after the query"
                )
        self._states: dict[tuple[str, int], Tensor] = {}

    def run(self, progress: Progress, began: float) -> VectorResult:
        config, n = self.config, len(self.pairs)
        queries = [self._query(i) for i in range(n)]
        singles = [(i,) for i in range(len(self.layers))]
        couples = list(itertools.combinations(range(len(self.layers)), 2))
        sets: list[Set] = [*singles, *(couples if config.sets > 1 else [])]
        clock = Clock(self._work(queries, sets), self.lm.n_layers, config.budget_minutes)
        effects = self._grid(queries, sets, [q.vector for q in queries], clock, progress)
        order = np.random.default_rng(config.seed).permutation(n)
        first, second = np.sort(order[: n // 2]), np.sort(order[n // 2 :])
        best: list[int] = []
        if config.sets > 1 and n > 1:
            means = effects[first][:, len(singles) :].mean(0)
            best = [len(singles) + int(i) for i in np.argsort(-means)[: config.best]]
        if config.sets > 2:
            top = np.argsort(-effects[:, : len(singles)].mean(0))[:_BEST_FOR_TRIPLES]
            triples = list(itertools.combinations(sorted(map(int, top)), 3))
            more = self._grid(queries, triples, [q.vector for q in queries], None, progress)
            effects, sets = np.concatenate([effects, more], 1), [*sets, *triples]
        cells = [*range(len(singles)), *best]
        controls = {
            name: self._grid(queries, [sets[i] for i in cells], self._control(name, queries), None,
                             progress, name)
            for name in CONTROLS
        }  # fmt: skip
        base = np.array([self._measure(q.target, None) for q in queries])
        groups = tuple(pair.group for pair in self.whole)
        layered = [tuple(self.layers[i] for i in one) for one in sets]
        return VectorResult(
            model=model_facts(self.lm) | {"n_layers": self.lm.n_layers},
            config=config,
            metric=self.metric,
            instruction=_instruction(self.pairs[0], 0),
            sets=tuple(layered),
            effects=effects,
            base=base,
            full=np.array([float(measure(self.metric, q.full[None], q.target, q.full)[0])
                           for q in queries]),
            groups=groups,
            cells=tuple(layered[i] for i in cells),
            controls=controls,
            tests=interaction_tests(
                effects, sets, best, second, [groups[i] for i in second], layered, config.seed
            ),
            doses=self._doses(queries, [sets[i] for i in best], progress),
            directions={
                layer: torch.stack([q.vector[i] - q.plain[i] for q in queries]).mean(0).cpu()
                for i, layer in enumerate(self.layers)
            },
            dropped=tuple(self.dropped),
            seconds=time.perf_counter() - began,
        )  # fmt: skip

    def _query(self, index: int) -> _Query:
        pair, target = self.whole[index], self.targets[index]
        rows = torch.tensor([pair.clean], device=self.lm.device)
        with torch.no_grad():
            full = run_model(self.lm, rows, use_cache=False).logits[0, -1]
        place = target.place(self.config.at)[0]
        plain, _ = read_values(self.lm, target.clean, [(node, place) for node in self.nodes])
        return _Query(target, place, full, self._vector(index, 0), torch.stack(plain))

    def _vector(self, index: int, side: int) -> Tensor:
        """IV of the clean (0) or the corrupt (1) instruction of a pair."""
        if self.config.iv_from == "alone":
            return self._alone(_instruction(self.pairs[index], side))
        pair = self.whole[index]
        ids, at = (pair.clean, pair.corrupt)[side], pair.place("instruction-last")[side]
        found, _ = read_values(self.lm, ids, [(node, at) for node in self.nodes])
        return torch.stack(found)

    def _alone(self, text: str) -> Tensor:
        """States at the last token of a text in a run of it by itself, `[layers, d_model]`."""
        key = text, 0
        if key not in self._states:
            prompt = encode_prompt(self.lm, text, chat=self.config.chat)
            last = prompt.user_span[1] - 1
            found, _ = read_values(self.lm, prompt.token_ids, [(node, last) for node in self.nodes])
            self._states[key] = torch.stack(found)
        return self._states[key]

    def _control(self, name: str, queries: Sequence[_Query]) -> list[Tensor]:
        n, seed = len(queries), self.config.seed
        if name == "other instruction":
            return [self._vector(i, 1) for i in range(n)]
        if name == "shuffled words":
            return [self._alone(_shuffled(_instruction(pair, 0), seed)) for pair in self.pairs]
        if name == "another query":
            return [queries[(i + 1) % n].plain for i in range(n)]
        drawn = torch.Generator().manual_seed(seed)
        found = []
        for query in queries:
            noise = torch.randn(query.vector.shape, generator=drawn).to(query.vector)
            found.append(noise / noise.norm(dim=-1, keepdim=True)
                         * query.vector.norm(dim=-1, keepdim=True))  # fmt: skip
        return found

    def _work(self, queries: Sequence[_Query], sets: Sequence[Set]) -> int:
        total = 0
        for query in queries:
            places = [[(self.layers[i], query.place) for i in one] for one in sets]
            batches = plan_batches(places, len(query.target.clean))
            total += sum(batch.work(self.lm.n_layers) for batch in batches)
        return total

    def _grid(
        self,
        queries: Sequence[_Query],
        sets: Sequence[Set],
        vectors: Sequence[Tensor],
        clock: Clock | None,
        progress: Progress,
        name: str = "instruction",
    ) -> np.ndarray:
        """f `[queries, sets]`."""
        found = np.zeros((len(queries), len(sets)))
        for row, (query, vector) in enumerate(zip(queries, vectors, strict=True)):
            note = clock.note() if clock else ""
            progress(f"patching ({name})", row, len(queries), f"queries{note}")
            engine = PatchEngine(self.lm, query.target.clean)
            base = measure(self.metric, engine.logits[None], query.target, engine.logits)[0]
            patches = [[Patch(self.nodes[i], query.place, vector[i]) for i in one] for one in sets]
            if clock:
                clock.start()
            for indices, logits in engine.run(patches, after=clock.tick if clock else _nothing):
                change = measure(self.metric, logits, query.target, engine.logits) - base
                found[row, list(indices)] = change.cpu().numpy()
        progress(f"patching ({name})", len(queries), len(queries), "queries")
        return found

    def _measure(self, target: EncodedPair, logits: Tensor | None) -> float:
        if logits is None:
            rows = torch.tensor([target.clean], device=self.lm.device)
            with torch.no_grad():
                logits = run_model(self.lm, rows, use_cache=False).logits[0, -1]
        return float(measure(self.metric, logits[None], target, logits)[0])

    def _doses(
        self, queries: Sequence[_Query], best: Sequence[Set], progress: Progress
    ) -> list[dict[str, float]]:
        """Mean I of the best pairs when a share of IV - state is *added* in each block."""
        rows = []
        for dose in self.config.doses if best else ():
            found = []
            for number, query in enumerate(queries):
                progress(f"adding at dose {dose:g}", number, len(queries), "queries")
                change = dose * (query.vector - query.plain)
                sets = [one for pair in best for one in ((pair[0],), (pair[1],), pair)]
                logits = added_logits(self.lm, query.target.clean, query.place, [
                    {self.layers[i]: change[i] for i in one} for one in [(), *sets]
                ])  # fmt: skip
                m = measure(self.metric, logits, query.target, logits[0]).cpu().numpy()
                f = (m[1:] - m[0]).reshape(-1, 3)
                found.append((f[:, 2] - f[:, 0] - f[:, 1]).mean())
            mean = float(np.mean(found))
            rows.append({"dose": dose, "interaction": mean, "by_square": mean / dose**2})
        return rows


def _nothing(_: object) -> None:
    pass


def added_logits(
    lm: LanguageModel, ids: Sequence[int], place: int, rows: Sequence[dict[int, Tensor]]
) -> Tensor:
    """Logits `[rows, vocabulary]` at the last token, with vectors added to the stream after blocks
    at one token: each row is {block: vector}."""
    layers = sorted({layer for row in rows for layer in row})
    ids_in = torch.tensor([list(ids)], device=lm.device).expand(len(rows), -1)
    with torch.no_grad(), ExitStack() as stack:
        for layer in layers:
            added = torch.stack(
                [row.get(layer, torch.zeros(lm.d_model).to(lm.device)) for row in rows]
            )

            def add(h: Tensor, added: Tensor = added) -> Tensor:
                h = h.clone()
                h[:, place] += added.to(h)
                return h

            stack.enter_context(hooked(resolve_site(lm, layer, "resid_post"), add))
        logits: Tensor = run_model(lm, ids_in, use_cache=False).logits[:, -1]
    return logits


def _instruction(pair: Pair, side: int) -> str:
    if "instruction" not in pair.positions or "query" not in pair.positions:
        raise UserError(
            "instruction vectors need pairs with the positions instruction and query: take "
            "contrast:NAME, task:NAME with `against`, or mark them in the file"
        )
    return (pair.clean, pair.corrupt)[side][slice(*pair.positions["instruction"][side])]


def _without(pair: Pair) -> Pair:
    """The clean prompt with its instruction cut out, and the space that then stands first or
    last."""
    _instruction(pair, 0)
    (start, end), (query_start, query_end) = (
        pair.positions["instruction"][0], pair.positions["query"][0]
    )  # fmt: skip
    while end < len(pair.clean) and pair.clean[end].isspace():
        end += 1
    text = pair.clean[:start] + pair.clean[end:]
    if end == len(pair.clean):
        text = text.rstrip()
    moved = end - start if query_start >= end else 0
    span = (query_start - moved, query_end - moved)
    return replace(pair, clean=text, corrupt=text, positions={"query": (span, span)})


def _shuffled(text: str, seed: int) -> str:
    words = re.findall(r"\S+", text)
    random.Random(seed).shuffle(words)
    return " ".join(words)
