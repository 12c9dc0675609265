"""What a circuit does alone, and what the model does without it: faithfulness, completeness.

A head that is not kept gives, at each token, what it gives on average over the prompts at that
token (`mean-position`), or what it gives in the pair's corrupt run (`resample`). A circuit keeps
its heads at their positions, and nothing elsewhere; MLPs are free.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.circuits.circuit import Circuit, Head
from saesteer.mechanisms.config import CircuitConfig
from saesteer.mechanisms.data.encoding import EncodedPair
from saesteer.mechanisms.patching.sites import run_model
from saesteer.mechanisms.reports.figures import Figure, share_of
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.attention import head_tap, heads
from saesteer.sae.model.language_model import LanguageModel

Array = np.ndarray
Member = tuple[str, Head]
_BATCH = 32


@dataclass(frozen=True, eq=False)
class CircuitReport:
    """How well a circuit stands for its model. F is the mean of answer minus wrong logit."""

    n_pairs: int
    ablate: str
    full: Figure
    """F of the model."""
    alone: Figure
    """F of the circuit, all else ablated."""
    nothing: Figure
    """F with every head ablated."""
    accuracy: dict[str, float]
    """Share of pairs whose answer beats the wrong one: full, alone, nothing."""
    ratio: Figure
    """Faithfulness F(C) / F(M)."""
    faithfulness: Figure
    """(F(C) - F(nothing)) / (F(M) - F(nothing)): a ratio to 0 flatters where nothing is not 0."""
    completeness: tuple[tuple[str, float, float], ...]
    """(which K, F(C without K), F(M without K)): equal where nothing outside stands in for K."""
    minimality: tuple[tuple[str, Head, float], ...]
    """(group, head, F(C) - F(C without it))."""
    random: tuple[float, ...]
    """F of random circuits with as many heads at each position."""

    @property
    def gap(self) -> float:
        """Largest |F(C without K) - F(M without K)|."""
        return max((abs(a - b) for _, a, b in self.completeness), default=0.0)

    def __repr__(self) -> str:
        return (
            f"CircuitReport(faithfulness {self.faithfulness}, F {self.alone} of {self.full}, "
            f"largest completeness gap {self.gap:.3f}, random {max(self.random, default=0):.2f})"
        )

    def document(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "completeness_gap": self.gap}


class Ablation:
    """Runs of one model on some pairs with some heads kept and the others ablated."""

    def __init__(
        self, lm: LanguageModel, pairs: Sequence[EncodedPair], circuit: Circuit, how: str
    ) -> None:
        self.lm, self.pairs, self.circuit, self.how = lm, list(pairs), circuit, how
        if any(pair.wrong is None for pair in pairs):
            raise UsageError("`pairs` need wrong answers to test a circuit: give wrong in each")
        lengths = {len(pair.clean) for pair in pairs}
        if how == "mean-position" and len(lengths) > 1:
            raise UsageError(
                f"`ablate` mean-position needs prompts of one structure, got {min(lengths)} to "
                f"{max(lengths)} tokens: use resample"
            )
        if how == "resample" and not all(pair.equal_length for pair in pairs):
            raise UsageError(
                "`ablate` resample needs both runs of a pair to have one length: give such pairs"
            )
        self._batches = self._by_length()
        self._instead = [self._values(batch) for batch in self._batches]
        if how == "mean-position":
            mean = torch.cat(self._instead).mean(dim=0, keepdim=True)
            self._instead = [mean.expand(len(b), -1, -1, -1, -1) for b in self._batches]

    def _by_length(self) -> list[list[int]]:
        by_length: dict[int, list[int]] = {}
        for index, pair in enumerate(self.pairs):
            by_length.setdefault(len(pair.clean), []).append(index)
        return [
            own[at : at + _BATCH] for own in by_length.values() for at in range(0, len(own), _BATCH)
        ]

    def _values(self, batch: Sequence[int]) -> Tensor:
        """z `[pairs, layer, token, head, d_head]` of the runs that ablated heads give."""
        clean = self.how == "mean-position"
        rows = [self.pairs[i].clean if clean else self.pairs[i].corrupt for i in batch]
        seen: dict[int, Tensor] = {}
        with head_tap(self.lm) as tap, torch.no_grad():
            for layer in range(self.lm.n_layers):
                tap.edits[layer, "z"] = partial(_keep, seen, layer)
            run_model(self.lm, torch.tensor(rows, device=self.lm.device), use_cache=False)
        return torch.stack([seen[layer] for layer in range(self.lm.n_layers)], dim=1)

    def kept(self, members: Iterable[Member], batch: Sequence[int]) -> Tensor:
        """Which z `[pairs, layer, token, head]` these heads are at their positions."""
        shape = (len(batch), self.lm.n_layers, len(self.pairs[batch[0]].clean),
                 heads(self.lm).n_heads)  # fmt: skip
        mask = torch.zeros(shape, dtype=torch.bool, device=self.lm.device)
        at = {g.group.name: g.group.at for g in self.circuit.groups}
        for name, (layer, head) in members:
            for row, index in enumerate(batch):
                mask[row, layer, self.pairs[index].place(at[name])[0], head] = True
        return mask

    def differences(self, members: Iterable[Member], *, without: bool = False) -> Array:
        """Answer minus wrong logit `[pairs]` with these heads alone, or with all but these."""
        members = list(members)
        found = np.empty(len(self.pairs))
        for batch, instead in zip(self._batches, self._instead, strict=True):
            mask = self.kept(members, batch)
            if without:
                mask = ~mask
            ids = torch.tensor([self.pairs[i].clean for i in batch], device=self.lm.device)
            with head_tap(self.lm) as tap, torch.no_grad():
                for layer in range(self.lm.n_layers):
                    tap.edits[layer, "z"] = partial(
                        _either, mask[:, layer, :, :, None], instead[:, layer]
                    )
                logits = run_model(self.lm, ids, use_cache=False).logits[:, -1]
            for row, index in enumerate(batch):
                pair = self.pairs[index]
                found[index] = float(logits[row, pair.answer] - logits[row, pair.wrong])
        return found


def _keep(seen: dict[int, Tensor], layer: int, z: Tensor) -> None:
    seen[layer] = z.detach()


def _either(kept: Tensor, instead: Tensor, z: Tensor) -> Tensor:
    return torch.where(kept, z, instead)


def prune(ablation: Ablation, config: CircuitConfig, progress: Progress = no_progress) -> Circuit:
    """Drop heads, each time the one whose loss costs least, while F(C) stays at `keep` or more of
    F(M). A group keeps its last head."""
    circuit = ablation.circuit
    limit = config.keep * float(ablation.differences((), without=True).mean())
    members = circuit.members
    gone: list[Member] = []
    total = len(members)
    while config.keep < 1:
        progress("pruning", len(gone), total, "heads")
        sizes = {g.group.name: 0 for g in circuit.groups}
        for name, _ in members:
            sizes[name] += 1
        loose = sorted(one for one in members if sizes[one[0]] > 1)
        tried = [(float(ablation.differences(members - {one}).mean()), one) for one in loose]
        best = max(tried, default=None)
        if best is None or best[0] < limit:
            break
        gone.append(best[1])
        members = members - {best[1]}
    progress("pruning", total, total, "heads")
    return replace(circuit.only(members), dropped=tuple(gone))


def evaluate_circuit(
    ablation: Ablation,
    circuit: Circuit,
    config: CircuitConfig | None = None,
    *,
    progress: Progress = no_progress,
) -> CircuitReport:
    """Faithfulness, completeness, minimality, and random circuits of equal size."""
    config = config or CircuitConfig()
    drawn = np.random.default_rng(config.seed)
    members = sorted(circuit.members)
    full = ablation.differences((), without=True)
    alone = ablation.differences(members)
    nothing = ablation.differences(())
    removed: list[tuple[str, list[Member]]] = [
        (g.group.name, [(g.group.name, h) for h in g.heads]) for g in circuit.groups
    ]
    removed += [
        (f"draw {i + 1}", [one for one in members if drawn.random() < 0.5])
        for i in range(config.draws)
    ]
    steps = len(removed) + len(members) + config.random
    done = 0
    complete, minimal, others = [], [], []
    for name, part in removed:
        progress("testing the circuit", done, steps, "subsets")
        rest = set(members) - set(part)
        complete.append((name, float(ablation.differences(rest).mean()),
                         float(ablation.differences(part, without=True).mean())))  # fmt: skip
        done += 1
    for one in members:
        progress("testing the circuit", done, steps, "subsets")
        lost = alone.mean() - ablation.differences(set(members) - {one}).mean()
        minimal.append((one[0], one[1], float(lost)))
        done += 1
    for _ in range(config.random):
        progress("testing the circuit", done, steps, "subsets")
        others.append(float(ablation.differences(_random(circuit, drawn)).mean()))
        done += 1
    progress("testing the circuit", steps, steps, "subsets")
    groups = [pair.group for pair in ablation.pairs]
    return CircuitReport(
        n_pairs=len(full),
        ablate=ablation.how,
        full=share_of(full, None, groups, config.seed),
        alone=share_of(alone, None, groups, config.seed),
        nothing=share_of(nothing, None, groups, config.seed),
        accuracy={
            name: float((values > 0).mean())
            for name, values in (("full", full), ("alone", alone), ("nothing", nothing))
        },
        ratio=share_of(alone, full, groups, config.seed),
        faithfulness=share_of(alone - nothing, full - nothing, groups, config.seed),
        completeness=tuple(complete),
        minimality=tuple(minimal),
        random=tuple(others),
    )


def _random(circuit: Circuit, drawn: np.random.Generator) -> list[Member]:
    """As many heads at each position as the circuit has, drawn without replacement."""
    n_layers, n_heads = circuit.model["n_layers"], circuit.model["n_heads"]
    by_position: dict[str, list[tuple[str, int]]] = {}
    for g in circuit.groups:
        by_position.setdefault(g.group.at, []).append((g.group.name, len(g.heads)))
    found = []
    for own in by_position.values():
        name, count = own[0][0], sum(size for _, size in own)
        picked = drawn.choice(n_layers * n_heads, size=count, replace=False)
        found += [(name, (int(i) // n_heads, int(i) % n_heads)) for i in picked]
    return found
