"""`circuit`: find heads on some of the pairs, make the circuit smaller and test it on the rest."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.files import write_json, write_text
from saesteer.mechanisms.circuits.ablation import (
    Ablation,
    CircuitReport,
    evaluate_circuit,
    prune,
)
from saesteer.mechanisms.circuits.circuit import Circuit, find_circuit, save_circuit
from saesteer.mechanisms.circuits.crossing import (
    CrossReport,
    check_same_form,
    cross_patch,
)
from saesteer.mechanisms.circuits.groups import Group, check_groups
from saesteer.mechanisms.circuits.masks import HeadMask, check_mask_pairs, learn_mask
from saesteer.mechanisms.circuits.overlap import CircuitOverlap, circuit_overlap
from saesteer.mechanisms.config import CircuitConfig, MaskConfig
from saesteer.mechanisms.data.encoding import EncodedPair, encode_pairs
from saesteer.mechanisms.data.pairs import Pair, check_positions
from saesteer.mechanisms.statistics import FEWEST_GROUPS
from saesteer.sae.config import Progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.sae.runs.bars import show_progress
from saesteer.sae.runs.facts import model_facts


@dataclass(frozen=True, eq=False)
class CircuitStudy:
    """A circuit with the figures of its test."""

    model: dict[str, Any]
    config: CircuitConfig
    circuit: Circuit
    report: CircuitReport
    masks: tuple[HeadMask, ...]
    cross: CrossReport | None
    """Against a tuned model, on the pairs of the test."""
    overlap: CircuitOverlap | None
    """This circuit against the tuned model's own, before pruning; None where one has no heads."""
    n_found_on: int
    n_tested_on: int
    seconds: float

    def __repr__(self) -> str:
        return f"CircuitStudy({self.circuit!r}, {self.report!r})"

    def to_frame(self) -> Any:
        """One row a head: group, position, block, head, score, what its removal costs."""
        import pandas

        cost = {(name, head): lost for name, head, lost in self.report.minimality}
        return pandas.DataFrame(
            [
                {
                    "group": g.group.name,
                    "at": g.group.at,
                    "layer": head[0],
                    "head": head[1],
                    "score": None if g.scores is None else float(g.scores[head]),
                    "cost": cost[g.group.name, head],
                }
                for g in self.circuit.groups
                for head in g.heads
            ]
        )

    def document(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "schema_version": 1,
            "model": self.model,
            "settings": asdict(self.config),
            "n_found_on": self.n_found_on,
            "n_tested_on": self.n_tested_on,
            "circuit": self.circuit.document(),
            "test": self.report.document(),
            "masks": [mask.document() for mask in self.masks],
            "cross": None if self.cross is None else self.cross.document(),
            "overlap": None if self.overlap is None else self.overlap.document(),
            "seconds": self.seconds,
        }


def study_circuit(
    model: str | LanguageModel,
    pairs: Sequence[Pair],
    groups: Sequence[Group],
    config: CircuitConfig | None = None,
    *,
    masks: Sequence[str] = (),
    desiderata: Mapping[str, Sequence[Pair]] | None = None,
    mask_config: MaskConfig | None = None,
    cross: str | LanguageModel | None = None,
    device: str = "auto",
    dtype: str = "float32",
    drop: bool = False,
    progress: Progress = show_progress,
) -> CircuitStudy:
    """Find a circuit by path patching on one part of the pairs; prune and test it on the rest.

    Args:
        groups: from the end backwards, see `Group`.
        masks: positions at which a mask over heads is learned as well (`learn_mask`), for the
            pairs' own answers and for each of `desiderata`: pairs made for a property, by its name.
        cross: a tuned model of the same form, whose heads are put into this one (`cross_patch`).
        drop: leave out pairs that cannot be scored, or whose runs do not both have the most common
            length, instead of raising.

    Raises:
        UserError: no head found for a group; fewer than 16 pairs.
        UsageError: pairs without wrong answers, or of another form than the ablation needs.
    """
    config = config or CircuitConfig()
    began = time.perf_counter()
    wanted = dict(desiderata or {})
    check_study(pairs, groups, masks, wanted)
    lm = as_language_model(model, device=device, dtype=dtype)
    encoded, _ = encode_pairs(lm, pairs, chat=config.chat, drop=drop)
    if drop:
        encoded = _of_one_length(encoded)
    train, test = _parts(encoded, config.held_out)
    tuned = None if cross is None else as_language_model(cross, device=device, dtype=dtype)
    if tuned is not None:
        check_same_form(lm, tuned, encoded)
    circuit = find_circuit(lm, train, groups, config, progress=progress)
    overlap = None if tuned is None else _overlap(tuned, circuit, train, groups, config, progress)
    ablation = Ablation(lm, test, circuit, config.ablate)
    circuit = prune(ablation, config, progress)
    report = evaluate_circuit(ablation, circuit, config, progress=progress)
    by_name = {"answer": encoded}
    for name, own in wanted.items():
        found, _ = encode_pairs(lm, own, chat=config.chat, drop=drop)
        by_name[name] = _of_one_length(found) if drop else found
    learned = [
        learn_mask(lm, own, at, mask_config, wanted=name, seed=config.seed, progress=progress)
        for at in masks
        for name, own in by_name.items()
    ]
    crossed = (
        None if tuned is None
        else cross_patch(lm, tuned, circuit, test, config, progress=progress)
    )  # fmt: skip
    return CircuitStudy(
        {**model_facts(lm), "n_layers": lm.n_layers}, config, circuit, report, tuple(learned),
        crossed, overlap, len(train), len(test), time.perf_counter() - began,
    )  # fmt: skip


def _overlap(
    tuned: LanguageModel,
    circuit: Circuit,
    pairs: Sequence[EncodedPair],
    groups: Sequence[Group],
    config: CircuitConfig,
    progress: Progress,
) -> CircuitOverlap | None:
    """This circuit against the one found in the tuned model on the same pairs."""
    try:
        other = find_circuit(tuned, pairs, groups, config, progress=progress)
    except UserError:  # a group without heads: there is nothing to compare
        return None
    return circuit_overlap(circuit, other, seed=config.seed)


def check_study(
    pairs: Sequence[Pair],
    groups: Sequence[Group],
    masks: Sequence[str],
    desiderata: Mapping[str, Sequence[Pair]],
) -> None:
    """Refuse, before a model is loaded, groups and masks that the pairs have no positions for.

    Raises UserError and UsageError.
    """
    check_groups(groups, "`groups`")
    for group in groups:
        check_positions(pairs, [group.at, group.source_at or group.at], "groups")
    if desiderata and not masks:
        raise UsageError(
            f"`desiderata` {next(iter(desiderata))} is for masks: give `mask`, the positions at "
            "which one is learned"
        )
    for own in (pairs, *desiderata.values()) if masks else ():
        check_positions(own, masks, "mask")
        check_mask_pairs(own)


def _of_one_length(pairs: Sequence[EncodedPair]) -> list[EncodedPair]:
    """The pairs whose runs both have the most common length, as ablation and masks need them."""
    lengths = Counter(len(pair.clean) for pair in pairs if pair.equal_length)
    if not lengths:
        raise UserError("no pair has two runs of one length: give pairs of one structure")
    (length, _), *_ = lengths.most_common(1)
    return [pair for pair in pairs if len(pair.clean) == len(pair.corrupt) == length]


def _parts(
    pairs: Sequence[EncodedPair], held_out: float
) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """Whole groups on either side."""
    names = list(dict.fromkeys(pair.group for pair in pairs))
    count = round(len(names) * held_out)
    if min(count, len(names) - count) < FEWEST_GROUPS:
        raise UserError(
            f"{len(names)} groups of pairs leave {len(names) - count} to find heads on and {count} "
            f"to test on, at least {FEWEST_GROUPS} are needed of each: give more pairs"
        )
    held = set(names[len(names) - count :])
    return [p for p in pairs if p.group not in held], [p for p in pairs if p.group in held]


def save_study(folder: str | Path, study: CircuitStudy) -> dict[str, Any]:
    """Write circuit.json, report.json and report.html into a folder; returns the document."""
    from saesteer.mechanisms.reports.circuit_page import render_circuit

    folder = Path(folder)
    document = study.document()
    write_json(folder / "report.json", document)
    save_circuit(folder / "circuit.json", study.circuit)
    write_text(folder / "report.html", render_circuit(document))
    return document
