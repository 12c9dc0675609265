"""A circuit: groups of heads at named positions, found backwards by path patching, and its file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.files import write_json
from saesteer.mechanisms.circuits.groups import LOGITS, Group, check_groups
from saesteer.mechanisms.circuits.paths import path_effects
from saesteer.mechanisms.config import CircuitConfig
from saesteer.mechanisms.data.encoding import EncodedPair
from saesteer.mechanisms.metrics import measure
from saesteer.mechanisms.patching.sites import Node, make_nodes, read_values
from saesteer.mechanisms.statistics import bootstrap_ratio, grouped
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.attention import head_tap, heads
from saesteer.sae.model.language_model import LanguageModel

Array = np.ndarray
Head = tuple[int, int]
"""(block, query head)."""
SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class FoundGroup:
    """A group with the heads that were found for it."""

    group: Group
    heads: tuple[Head, ...]
    scores: Array | None = None
    """Score of every head `[n_layers, n_heads]`: mean change over the mean of the clean run, so
    that -1 takes all of it. A mean of the pairs' own ratios, as Prakash et al. 2024 take, has no
    such bound."""
    intervals: Array | None = None
    """95 % intervals of the scores over groups of pairs, `[2, n_layers, n_heads]`."""


@dataclass(frozen=True, eq=False)
class Circuit:
    """Heads at positions of one model."""

    model: dict[str, Any]
    groups: tuple[FoundGroup, ...]
    metric: str = "logit-diff"
    """What heads were scored by."""
    ablate: str = "mean-position"
    found_on: int = 0
    """Pairs that the heads were found on."""
    dropped: tuple[tuple[str, Head], ...] = field(default=())
    """(group, head) that pruning took out, in order."""

    def __repr__(self) -> str:
        parts = [f"{g.group.name} {len(g.heads)}" for g in self.groups]
        return f"Circuit({self.model['name']}: {', '.join(parts)} heads)"

    @property
    def members(self) -> frozenset[tuple[str, Head]]:
        """(group, head) of every head."""
        return frozenset((g.group.name, head) for g in self.groups for head in g.heads)

    def only(self, members: frozenset[tuple[str, Head]]) -> "Circuit":
        """The same groups with these heads alone."""
        kept = tuple(
            replace(g, heads=tuple(h for h in g.heads if (g.group.name, h) in members))
            for g in self.groups
        )
        return replace(self, groups=kept)

    def document(self) -> dict[str, Any]:
        """What circuit.json holds."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "metric": self.metric,
            "ablation": self.ablate,
            "found_on": self.found_on,
            "groups": [
                {
                    "name": g.group.name,
                    "at": g.group.at,
                    "receivers": {"to": g.group.to, "by": g.group.by},
                    "source_at": g.group.source_at,
                    "heads": [list(head) for head in g.heads],
                    "scores": None if g.scores is None else g.scores.tolist(),
                    "intervals": None if g.intervals is None else g.intervals.tolist(),
                }
                for g in self.groups
            ],
            "dropped": [[name, list(head)] for name, head in self.dropped],
        }


def find_circuit(
    lm: LanguageModel,
    pairs: Sequence[EncodedPair],
    groups: Sequence[Group],
    config: CircuitConfig | None = None,
    *,
    progress: Progress = no_progress,
) -> Circuit:
    """Score every head as a sender of each group by path patching, and choose.

    The clean run is the base and the corrupt run the source. A head's score is the mean change of
    `config.score` over its mean in the clean runs. A head is chosen where it lowers it: the `top`
    most negative, or all that pass a one-sided sign test over groups of pairs at `fdr`, lose
    `least` or more, and whose interval lies below 0. Raises UserError for a group without heads
    (those before it would reach nothing), and for a model that has nothing to lose.
    """
    config = config or CircuitConfig()
    check_groups(groups, "`groups`")
    if config.top is not None and len(config.top) != len(groups):
        raise UserError(f"`top` has {len(config.top)} counts for {len(groups)} groups: one each")
    layout = heads(lm)
    senders = make_nodes(lm, ["z"])
    found: dict[str, FoundGroup] = {}
    for number, group in enumerate(groups):
        receivers = _receivers(group, found)
        changes, whole = np.empty((len(pairs), len(senders))), np.empty(len(pairs))
        stage = f"paths of {group.name}"
        with head_tap(lm) as tap:
            for row, pair in enumerate(pairs):
                progress(stage, row, len(pairs), "pairs")
                base = read_values(lm, pair.clean, [])[1]
                base_at = pair.place(group.at)[0]
                source_at = pair.place(group.source_at or group.at)[1]
                score = partial(measure, config.score, pair=pair, base=base)
                whole[row] = float(score(base[None])[0])
                changes[row] = path_effects(
                    lm, pair.clean, pair.corrupt, senders, receivers, base_at, source_at, score, tap
                ).numpy()
        progress(stage, len(pairs), len(pairs), "pairs")
        top = None if config.top is None else config.top[number]
        if not whole.mean() > 0:
            raise UserError(
                f"nothing to explain: {config.score} of {lm.name} is {whole.mean():.3g} on "
                f"{len(pairs)} clean prompts; take an easier task, or another model"
            )
        scores = score_heads(changes, whole, [pair.group for pair in pairs], config)
        chosen = scores.choose(top, config)
        if not chosen:
            raise UserError(
                f"no head lowers {config.score} on its way to {group.to} from {group.at} by "
                f"{config.least:g} of it or more (group {group.name}, {len(pairs)} pairs): take "
                "out this group and those that reach it, or give `top`"
            )
        picked = sorted((senders[i].layer, senders[i].head or 0) for i in chosen)
        shape = lm.n_layers, layout.n_heads
        both = np.stack([scores.low, scores.high]).reshape(2, *shape)
        found[group.name] = FoundGroup(
            group, tuple(picked), scores.share.reshape(shape),
            None if np.isnan(both).any() else both,
        )  # fmt: skip
    facts = {"name": lm.name, "hash": lm.fingerprint, "n_layers": lm.n_layers,
             "n_heads": layout.n_heads}  # fmt: skip
    return Circuit(facts, tuple(found.values()), config.score, config.ablate, len(pairs))


def _receivers(group: Group, found: dict[str, FoundGroup]) -> list[Node] | None:
    if group.to == LOGITS:
        return None
    return [Node(str(group.by), layer, head) for layer, head in found[group.to].heads]


@dataclass(frozen=True, eq=False)
class HeadScores:
    """What each sender loses, over pairs: all arrays are `[senders]`."""

    share: Array
    """Mean change over the mean of the clean runs."""
    low: Array
    high: Array
    """95 % interval over groups; NaN for fewer than eight."""
    p: Array
    """One-sided sign test over groups that it lowers the metric, adjusted."""

    def choose(self, top: int | None, config: CircuitConfig) -> list[int]:
        """The `top` most negative, or all that the settings let pass."""
        if top is not None:
            best = np.argsort(self.share, kind="stable")[:top]
            return [int(i) for i in best if self.share[i] < 0]
        lost = (self.share <= -config.least) & ~(self.high >= 0)
        return [int(i) for i in np.flatnonzero((self.p <= config.fdr) & lost)]


def score_heads(
    changes: Array, whole: Array, groups: Sequence[str], config: CircuitConfig
) -> HeadScores:
    """Scores from changes `[pairs, senders]` of a metric that is `whole` `[pairs]` unpatched."""
    from scipy.stats import binom, false_discovery_control

    sums, _ = grouped(changes, groups)
    below_line = grouped(whole[:, None], groups)[0][:, 0]
    low, high = bootstrap_ratio(sums, below_line, seed=config.seed)
    below, above = (sums < 0).sum(axis=0), (sums > 0).sum(axis=0)
    # One-sided and exact; ties are left out, and a head without effect has p 1.
    p = binom.sf(below - 1, below + above, 0.5)
    adjusted = false_discovery_control(np.where(below + above > 0, p, 1.0))
    return HeadScores(changes.mean(axis=0) / whole.mean(), low, high, adjusted)


def save_circuit(path: str | Path, circuit: Circuit) -> None:
    """Write circuit.json."""
    write_json(path, circuit.document())


def load_circuit(path: str | Path, lm: LanguageModel | None = None) -> Circuit:
    """Read a circuit.json; with `lm`, check that it fits. Raises UserError for others."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        version = document["schema_version"]
        groups = tuple(
            FoundGroup(
                Group(g["name"], g["at"], g["receivers"]["to"], g["receivers"]["by"],
                      g["source_at"]),
                tuple((int(layer), int(head)) for layer, head in g["heads"]),
                None if g["scores"] is None else np.array(g["scores"]),
                None if g.get("intervals") is None else np.array(g["intervals"]),
            )
            for g in document["groups"]
        )  # fmt: skip
        dropped = tuple((name, (int(h[0]), int(h[1]))) for name, h in document["dropped"])
        circuit = Circuit(document["model"], groups, document["metric"], document["ablation"],
                          document["found_on"], dropped)  # fmt: skip
        size = circuit.model["n_layers"], circuit.model["n_heads"]
    except OSError as error:
        raise UserError(f"`circuit` {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise UserError(f"`circuit` {path} is no circuit.json of saesteer circuit") from None
    if version != SCHEMA_VERSION:
        raise UserError(f"`circuit` {path} has schema_version {version}, known is {SCHEMA_VERSION}")
    if lm is not None and size != (lm.n_layers, heads(lm).n_heads):
        raise UserError(
            f"`circuit` {path} is of a model with {size[0]} blocks of {size[1]} heads, "
            f"{lm.name} has {lm.n_layers} of {heads(lm).n_heads}"
        )
    return circuit
