"""Cross-model patching: does a tuned model's better work come from the same heads?

Both models read the same prompt; heads of the base take the tuned model's z at the circuit's
positions, and everything else of the base reacts (Prakash et al. 2024, CMAP). The part of the
difference between the models that this brings is what those heads' outputs hold. The input variant
computes those outputs anew from the base's own inputs with q, k or v of the tuned model. (The
paper's code freezes them again before the last token, so that for earlier heads nothing changes.)
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.circuits.circuit import Circuit
from saesteer.mechanisms.circuits.head_inputs import head_inputs, mixed_output
from saesteer.mechanisms.config import CircuitConfig
from saesteer.mechanisms.data.encoding import EncodedPair
from saesteer.mechanisms.patching.engine import PatchEngine
from saesteer.mechanisms.patching.sites import Node, Patch, read_values
from saesteer.mechanisms.reports.figures import Figure, share_of
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.attention import head_tap, heads
from saesteer.sae.model.language_model import LanguageModel

Array = np.ndarray
Where = tuple[Node, str]


@dataclass(frozen=True, eq=False)
class CrossReport:
    """What the tuned model's heads bring to the base. F is the mean of answer minus wrong logit."""

    base: float
    tuned: float
    accuracy: dict[str, float]
    """Share of prompts whose answer beats the wrong one, by what was patched; `base`, `tuned`."""
    recovered: dict[str, Figure]
    """By group, `circuit` (all of its heads), `random` (as many at each position, mean of draws)
    and `every head` there, and for groups and `circuit` `NAME by q` (k, v): with that input of the
    tuned model's; each is (F - F base) / (F tuned - F base), with its interval over groups of
    pairs."""
    n_pairs: int

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {figure}" for name, figure in self.recovered.items())
        return f"CrossReport(F {self.base:.2f} -> {self.tuned:.2f}; recovered: {parts})"

    def document(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def cross_patch(
    base: LanguageModel,
    tuned: LanguageModel,
    circuit: Circuit,
    pairs: Sequence[EncodedPair],
    config: CircuitConfig | None = None,
    *,
    progress: Progress = no_progress,
) -> CrossReport:
    """Patch z of the tuned model into the base, on the clean prompts.

    The pairs' token ids are the base's; both models need the same tokenizer and the same heads.
    Raises UsageError for models that differ in either, and for pairs without wrong answers.
    """
    config = config or CircuitConfig()
    check_same_form(base, tuned, pairs)
    if any(pair.wrong is None for pair in pairs):
        raise UsageError("`pairs` need wrong answers to compare models: give wrong in each")
    layout = heads(base)
    drawn = np.random.default_rng(config.seed)
    sets: dict[str, list[Where]] = {
        g.group.name: [(Node("z", *head), g.group.at) for head in g.heads] for g in circuit.groups
    }
    sets["circuit"] = list(dict.fromkeys(one for own in sets.values() for one in own))
    ats = list(dict.fromkeys(at for _, at in sets["circuit"]))
    every = [Node("z", layer, h) for layer in range(base.n_layers) for h in range(layout.n_heads)]
    counts = {at: sum(at == other for _, other in sets["circuit"]) for at in ats}
    for number in range(config.random):
        sets[f"random {number}"] = [
            (every[int(i)], at)
            for at in ats
            for i in drawn.choice(len(every), size=counts[at], replace=False)
        ]
    sets["every head"] = [(node, at) for at in ats for node in every]
    found: dict[str, Array] = {}
    for row, pair in enumerate(pairs):
        progress("patching across models", row, len(pairs), "pairs")
        for name, value in _one_pair(base, tuned, pair, sets).items():
            found.setdefault(name, np.empty(len(pairs)))[row] = value
    progress("patching across models", len(pairs), len(pairs), "pairs")
    randoms = [found.pop(name) for name in list(found) if name.startswith("random ")]
    if randoms:
        found["random"] = np.mean(randoms, axis=0)
    groups = [pair.group for pair in pairs]
    outputs = [*sets, "random"]
    named = [name for name in found if name not in ("base", "tuned")]
    named.sort(key=lambda name: outputs.index(name) if name in outputs else len(outputs))
    return CrossReport(
        float(found["base"].mean()),
        float(found["tuned"].mean()),
        {name: float((values > 0).mean()) for name, values in found.items()},
        {
            name: share_of(
                found[name] - found["base"], found["tuned"] - found["base"], groups, config.seed
            )
            for name in named
        },
        len(pairs),
    )


def check_same_form(
    base: LanguageModel, tuned: LanguageModel, pairs: Sequence[EncodedPair]
) -> None:
    """Raise UsageError for two models whose heads or token ids differ."""
    sizes = [(lm.n_layers, heads(lm).n_heads, heads(lm).d_head) for lm in (base, tuned)]
    if sizes[0] != sizes[1]:
        told = " and ".join(f"{a} blocks of {b} heads of width {c}" for a, b, c in sizes)
        raise UsageError(f"`cross` needs models of one form, got {told}")
    for pair in pairs:
        text = base.tokenizer.decode(pair.clean)
        if (
            tuned.tokenizer(text, add_special_tokens=False)["input_ids"]
            != base.tokenizer(text, add_special_tokens=False)["input_ids"]
        ):
            raise UsageError(
                f"`cross` needs models of one tokenizer: {text[:40]!r} has other token ids in "
                f"{tuned.name} than in {base.name}"
            )


def _one_pair(
    base: LanguageModel, tuned: LanguageModel, pair: EncodedPair, sets: dict[str, list[Where]]
) -> dict[str, float]:
    """Answer minus wrong logit, by what was patched."""
    places = list(dict.fromkeys(
        (node, pair.place(at)[0]) for own in sets.values() for node, at in own
    ))  # fmt: skip
    values, theirs = read_values(tuned, pair.clean, places)
    by_place = dict(zip(places, values, strict=True))
    made = {
        name: [Patch(node, t, by_place[node, t])
               for node, t in ((n, pair.place(at)[0]) for n, at in own)]
        for name, own in sets.items()
    }  # fmt: skip
    made |= _by_inputs(base, tuned, pair, sets)
    names = list(made)
    with head_tap(base) as tap:
        engine = PatchEngine(base, pair.clean, tap)
        rows = {"base": engine.logits, "tuned": theirs}
        for indices, logits in engine.run(list(made.values())):
            rows |= {names[i]: logits[row] for row, i in enumerate(indices)}
    return {name: float(x[pair.answer] - x[pair.wrong]) for name, x in rows.items()}


def _by_inputs(
    base: LanguageModel, tuned: LanguageModel, pair: EncodedPair, sets: dict[str, list[Where]]
) -> dict[str, list[Patch]]:
    """Patches of z computed with one input of the tuned model, for groups and the circuit."""
    own, tap = head_inputs(base, pair.clean)
    theirs, _ = head_inputs(tuned, pair.clean)
    named = [name for name in sets if name != "every head" and not name.startswith("random ")]
    found: dict[str, list[Patch]] = {}
    for name in named:
        for site in ("q", "k", "v"):
            found[f"{name} by {site}"] = [
                Patch(node, t, mixed_output(own, theirs, site, node.layer, node.head or 0, t, tap))
                for node, t in ((n, pair.place(at)[0]) for n, at in sets[name])
            ]
    return found
