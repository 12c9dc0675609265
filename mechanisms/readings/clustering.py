"""`cluster`: do states fall into groups by themselves, and by what, over layers and checkpoints?

k-means with as many clusters as labels, compared with labels, groups, inputs and answers by the
adjusted Rand index. Where states are split by input as well, the plain index sees little: the
*within-input* index clusters the states of each input alone, and averages.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from saesteer.checkpoints.errors import UserError
from saesteer.mechanisms.data.states import StateRow, answer_ids, read_states
from saesteer.mechanisms.reading_config import ProbeConfig
from saesteer.mechanisms.readings.extra import sklearn
from saesteer.mechanisms.readings.probe_result import Clusters
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.sae.runs.facts import model_facts

Array = np.ndarray
_RESAMPLES = 100


def cluster(
    models: Sequence[str | LanguageModel],
    rows: Sequence[StateRow],
    config: ProbeConfig | None = None,
    *,
    at: Sequence[str] = ("instruction", "last"),
    device: str = "auto",
    dtype: str = "float32",
    progress: Progress = no_progress,
) -> Clusters:
    """Cluster the states of the rows of split `train` in a series of models, such as checkpoints.

    Rows of other splits are instances that were held out: where rows have answers, their accuracy
    is measured by split and, in the last model, how it goes with the distance to the centroids.

    Raises:
        UsageError: a position that a row does not have.
        UserError: more clusters than states, one label, models of different tokenizers, or
            scikit-learn is missing.
    """
    config = config or ProbeConfig()
    train = [i for i, row in enumerate(rows) if row.split == "train"]
    k = len({rows[i].label for i in train})
    if k < 2 or k > len(train):
        raise UserError(
            f"`states` have {k} labels among {len(train)} rows of split train: clusters need at "
            "least two labels, and as many rows as labels"
        )
    began = time.perf_counter()
    found: list[dict[str, Any]] = []
    accuracy: list[dict[str, Any]] = []
    unseen: list[dict[str, Any]] = []
    facts: list[dict[str, Any]] = []
    first: list[list[int]] = []
    for number, model in enumerate(models):
        lm = as_language_model(model, device=device, dtype=dtype)
        states = read_states(lm, rows, at, site=config.site, chat=config.chat)
        first = first or states.ids
        if states.ids != first:
            raise UserError(
                f"{lm.name} reads the prompts as other tokens than {facts[0]['name']}: give "
                "checkpoints of one tokenizer"
            )
        facts.append(model_facts(lm) | {"n_layers": lm.n_layers})
        name = _short(lm.name)
        right = _right(lm, rows, states.logits.numpy())
        if right is not None:
            accuracy.append({"model": name, **_by_split(rows, right)})
        for position, values in states.at.items():
            for layer in range(values.shape[1]):
                progress("clustering", layer, values.shape[1], f"layers of {name} at {position}")
                own = values[:, layer].numpy()
                row = cluster_states(own[train], [rows[i] for i in train], k, config)
                found.append({"model": name, "at": position, "layer": layer, **row})
                if right is not None and number == len(models) - 1:
                    held = held_out_distances(own, rows, right, config.seed)
                    unseen += [{"at": position, "layer": layer, **one} for one in held]
    progress("clustering", 1, 1, "done")
    return Clusters(
        models=tuple(facts), config=config, at=tuple(at), k=k, n_rows=len(train),
        rows=tuple(found), accuracy=tuple(accuracy), unseen=tuple(unseen),
        seconds=time.perf_counter() - began,
    )  # fmt: skip


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _right(lm: LanguageModel, rows: Sequence[StateRow], logits: Array) -> Array | None:
    """Whether each answer comes first of the vocabulary; None where rows have none."""
    answers = answer_ids(lm, rows)
    if not all(row.label in own for row, own in zip(rows, answers, strict=True)):
        return None
    wanted = [own[row.label] for row, own in zip(rows, answers, strict=True)]
    return np.asarray(logits.argmax(-1) == np.array(wanted))


def _by_split(rows: Sequence[StateRow], right: Array) -> dict[str, float]:
    splits = np.array([row.split for row in rows])
    return {str(one): float(right[splits == one].mean()) for one in dict.fromkeys(splits)}


def cluster_states(
    states: Array, rows: Sequence[StateRow], k: int, config: ProbeConfig
) -> dict[str, float]:
    """Figures of k-means on `states` `[rows, d]`, means over `config.seeds` repetitions.

    `ari_*` against label, group, input and answer; ami, nmi, v, purity against label; `within` the
    adjusted Rand index against label among the states of one input, averaged over inputs.
    """
    metrics = sklearn("metrics")
    kinds = {
        "label": [row.label for row in rows],
        "group": [row.group for row in rows],
        "input": [row.input for row in rows],
        "answer": [row.answers.get(row.label, "") for row in rows],
    }
    labels, inputs = np.array(kinds["label"]), np.array(kinds["input"])
    total: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        total.setdefault(name, []).append(float(value))

    for repeat in range(config.seeds):
        fit = partial(
            sklearn("cluster").KMeans, n_init=config.n_init, random_state=config.seed + repeat
        )
        given = _clusters(fit, states, k)
        for kind, truth in kinds.items():
            note(f"ari_{kind}", metrics.adjusted_rand_score(truth, given))
        note("ami", metrics.adjusted_mutual_info_score(labels, given))
        note("nmi", metrics.normalized_mutual_info_score(labels, given))
        note("v", metrics.v_measure_score(labels, given))
        table = metrics.cluster.contingency_matrix(labels, given)
        note("purity", table.max(0).sum() / table.sum())
        inside = []
        for one in dict.fromkeys(kinds["input"]):
            own = inputs == one
            clusters = len(set(labels[own]))
            if 2 <= clusters < own.sum():
                told = _clusters(fit, states[own], clusters)
                inside.append(metrics.adjusted_rand_score(labels[own], told))
        note("within", float(np.mean(inside)) if inside else float("nan"))
    return {name: float(np.mean(values)) for name, values in total.items()}


def _clusters(fit: Any, states: Array, k: int) -> Array:
    """Clusters of states; all in one where they do not differ, which k-means would warn about."""
    distinct = len(np.unique(states.round(6), axis=0))
    if distinct < 2:
        return np.zeros(len(states), dtype=int)
    return np.asarray(fit(min(k, distinct)).fit_predict(states))


def centroids(states: Array, rows: Sequence[StateRow], keys: Sequence[Any]) -> dict[Any, Array]:
    """Key -> mean state of the rows of split train that have it."""
    found: dict[Any, list[Array]] = {}
    for state, row, key in zip(states, rows, keys, strict=True):
        if row.split == "train":
            found.setdefault(key, []).append(state)
    return {key: np.mean(own, axis=0) for key, own in found.items()}


def held_out_distances(
    states: Array, rows: Sequence[StateRow], right: Array, seed: int
) -> list[dict[str, Any]]:
    """For each split that was held out: accuracy of the nearest centroid of a label, and the slope
    of a logistic regression of "the model is right" on how much nearer the true centroid is than
    the nearest other (standardised), with its bootstrap interval."""
    centres = centroids(states, rows, [row.label for row in rows])
    names = list(centres)
    gaps = np.linalg.norm(states[:, None] - np.stack([centres[n] for n in names])[None], axis=-1)
    found = []
    for split in dict.fromkeys(row.split for row in rows if row.split != "train"):
        own = [i for i, row in enumerate(rows) if row.split == split and row.label in centres]
        truth = np.array([names.index(rows[i].label) for i in own])
        to_true = gaps[own, truth]
        others = gaps[own].copy()
        others[np.arange(len(own)), truth] = np.inf
        margin = others.min(1) - to_true
        slope, low, high = _slope(margin, right[own], seed)
        found.append(
            {
                "split": split,
                "n": len(own),
                "accuracy": float(right[own].mean()),
                "nearest_centroid": float((margin > 0).mean()),
                "slope": slope,
                "low": low,
                "high": high,
            }
        )
    return found


def _slope(
    margin: Array, right: Array, seed: int
) -> tuple[float | None, float | None, float | None]:
    """Log-odds by standard deviation of the margin; None where all are right, or none."""
    scale = margin.std()
    if not scale > 0 or right.all() or not right.any():
        return None, None, None
    x = ((margin - margin.mean()) / scale)[:, None]

    def fit(rows: Array) -> float | None:
        if right[rows].all() or not right[rows].any():
            return None
        model = sklearn("linear_model").LogisticRegression(max_iter=200)
        return float(model.fit(x[rows], right[rows]).coef_[0, 0])

    drawn = np.random.default_rng(seed)
    slopes = [
        value
        for _ in range(_RESAMPLES)
        if (value := fit(drawn.integers(0, len(x), len(x)))) is not None
    ]
    low, high = np.percentile(slopes, [2.5, 97.5]) if slopes else (None, None)
    value = fit(np.arange(len(x)))
    return value, None if low is None else float(low), None if high is None else float(high)
