"""`probe`: can labels be told from states, on groups that the classifier has not seen?

Logistic regression on standardised states, in folds that keep each group (a wording) on one side.
Beside each accuracy: the same with labels permuted among groups, whose difference is the
selectivity; a bag of the prompt's tokens; and the mean input embedding.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from saesteer.checkpoints.errors import UserError
from saesteer.mechanisms.data.states import StateRow, read_states
from saesteer.mechanisms.reading_config import ProbeConfig
from saesteer.mechanisms.readings.extra import sklearn
from saesteer.mechanisms.readings.probe_result import ProbeReport
from saesteer.mechanisms.statistics import FEWEST_GROUPS, bootstrap_ratio, grouped
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.sae.runs.facts import model_facts

Array = np.ndarray


def probe(
    model: str | LanguageModel,
    rows: Sequence[StateRow],
    config: ProbeConfig | None = None,
    *,
    at: Sequence[str] = ("instruction", "last"),
    device: str = "auto",
    dtype: str = "float32",
    progress: Progress = no_progress,
) -> ProbeReport:
    """How well labels can be told from states at each layer and position.

    Raises:
        UsageError: a position that a row does not have.
        UserError: one label only, or a label of fewer groups than folds; scikit-learn is missing.
    """
    config = config or ProbeConfig()
    check_labels(rows, config.folds)
    lm = as_language_model(model, device=device, dtype=dtype)
    began = time.perf_counter()
    states = read_states(lm, rows, at, site=config.site, chat=config.chat)
    labels, groups = [row.label for row in rows], [row.group for row in rows]
    embedding: Any = lm.model.get_input_embeddings()
    with torch.no_grad():
        means = torch.stack(
            [embedding(torch.tensor(ids, device=lm.device)).float().mean(0) for ids in states.ids]
        )
    bags = np.zeros((len(rows), 1 + max(max(ids) for ids in states.ids)), dtype=np.float32)
    for number, ids in enumerate(states.ids):
        np.add.at(bags[number], ids, 1)
    bags = bags[:, bags.any(0)]
    found: list[dict[str, Any]] = []
    total = sum(values.shape[1] for values in states.at.values())
    for name, values in states.at.items():
        for layer in range(values.shape[1]):
            progress("fitting probes", len(found), total, "layers")
            row = separability(values[:, layer].numpy(), labels, groups, config)
            found.append({"at": name, "layer": layer, **row})
    progress("fitting probes", total, total, "layers")
    return ProbeReport(
        model=model_facts(lm) | {"n_layers": lm.n_layers},
        config=config,
        labels=tuple(dict.fromkeys(labels)),
        n_rows=len(rows),
        n_groups=len(set(groups)),
        rows=tuple(found),
        bag_of_words=separability(bags, labels, groups, config)["accuracy"],
        mean_embedding=separability(means.cpu().numpy(), labels, groups, config)["accuracy"],
        seconds=time.perf_counter() - began,
    )


def check_labels(rows: Sequence[StateRow], folds: int) -> None:
    """Raise UserError for one label, or one with fewer groups than folds."""
    by_label: dict[str, set[str]] = {}
    for row in rows:
        by_label.setdefault(row.label, set()).add(row.group)
    if len(by_label) < 2:
        raise UserError(f"`states` have {len(by_label)} label: at least two are needed to tell")
    label, own = min(by_label.items(), key=lambda item: len(item[1]))
    if len(own) < folds:
        raise UserError(
            f"label {label!r} has {len(own)} groups (wordings), `folds` {folds} need as many: give "
            "more wordings, or fewer folds"
        )


def separability(
    states: Array, labels: Sequence[str], groups: Sequence[str], config: ProbeConfig
) -> dict[str, Any]:
    """Accuracy over held-out groups with its bootstrap interval over groups, and selectivity."""
    y, g = np.asarray(labels), np.asarray(groups)
    right = _right(states, y, g, config)
    sums, counts = grouped(right[:, None].astype(float), list(groups))
    low, high = bootstrap_ratio(sums, counts, seed=config.seed)
    drawn = np.random.default_rng(config.seed)
    names = list(dict.fromkeys(groups))
    own = {name: y[g == name][0] for name in names}
    permuted = []
    for _ in range(config.shuffles):
        # Labels are exchanged between groups: within one they are equal, and stay so.
        dealt = dict(zip(names, drawn.permutation([own[name] for name in names]), strict=True))
        permuted.append(float(_right(states, np.array([dealt[n] for n in g]), g, config).mean()))
    accuracy, enough = float(right.mean()), len(counts) >= FEWEST_GROUPS
    return {
        "accuracy": accuracy,
        "low": float(low[0]) if enough else None,
        "high": float(high[0]) if enough else None,
        "permuted": float(np.mean(permuted)),
        "selectivity": accuracy - float(np.mean(permuted)),
    }


def _right(states: Array, y: Array, groups: Array, config: ProbeConfig) -> Array:
    """Whether each row's label was told by a fit on other groups."""
    folds = sklearn("model_selection").StratifiedGroupKFold(
        config.folds, shuffle=True, random_state=config.seed
    )
    right = np.zeros(len(y), dtype=bool)
    for train, test in folds.split(states, y, groups):
        fitted = sklearn("pipeline").make_pipeline(
            sklearn("preprocessing").StandardScaler(),
            sklearn("linear_model").LogisticRegression(C=config.penalty, max_iter=1000),
        )
        if len(set(y[train])) < 2:
            continue
        right[test] = fitted.fit(states[train], y[train]).predict(states[test]) == y[test]
    return right
