"""The pages of probes, clusters and moved centroids, made from their documents alone."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from saesteer.mechanisms.reports.page import interval, note, page, table
from saesteer.sae.reports.svg import Point, diverging_map, scatter


def render_probe(document: Mapping[str, Any]) -> str:
    """Accuracy by layer, a line a position, beside its controls."""
    model, rows = document["model"], document["rows"]
    points = [
        Point(float(r["layer"]), r["accuracy"], r["at"], f"{r['accuracy']:.3f}") for r in rows
    ]
    points += [Point(float(r["layer"]), r["permuted"], f"{r['at']}, permuted") for r in rows]
    parts = [
        note(
            f"{model['name']} ({model['dtype']}, weights {model['hash']}); labels "
            f"{', '.join(document['labels'])}; {document['n_rows']} states in "
            f"{document['n_groups']} groups, which are never on both sides of a split. Layer 0 is "
            f"the first block's input. Bag of words {document['bag_of_words']:.3f}, mean input "
            f"embedding {document['mean_embedding']:.3f}."
        ),
        scatter(points, "accuracy by layer", x_label="layer", y_label="accuracy", joined=True),
        table(
            ["position", "layer", "accuracy", "permuted labels", "selectivity"],
            [
                [
                    r["at"], str(r["layer"]), interval(r["accuracy"], r["low"], r["high"]),
                    f"{r['permuted']:.3f}", f"{r['selectivity']:+.3f}",
                ]
                for r in rows
            ],
        ),
    ]  # fmt: skip
    return page("Probes", parts)


def _lines(rows: Sequence[Mapping[str, Any]], key: str, after: str) -> list[Point]:
    """A line by layer for each position."""
    return [
        Point(float(row["layer"]), row[key], row["at"] + after, f"{row[key]:.3f}") for row in rows
    ]


def render_clusters(document: Mapping[str, Any]) -> str:
    """Maps of the indices by layer and model, accuracy by split, and unseen instances."""
    model, rows = document["models"][-1], document["rows"]
    names = list(dict.fromkeys(row["model"] for row in rows))
    parts = [
        note(
            f"{model['name']} ({model['dtype']}, weights {model['hash']}) last of "
            f"{len(names)} models; k-means with {document['k']} clusters on {document['n_rows']} "
            "states. Rows are layers (0 is the first block's input), columns models."
        )
    ]
    for at in document["at"]:
        own = [row for row in rows if row["at"] == at]
        for key, title in (
            ("ari_label", "adjusted Rand index against the label"),
            ("within", "the same among states of one input"),
            ("ari_group", "against the group"),
            ("ari_input", "against the input"),
        ):
            parts.append(f"<h3>{escape(at)}: {title}</h3>")
            parts.append(_map(own, names, key, f"{at}: {title}"))
    if document["accuracy"]:
        splits = [key for key in document["accuracy"][0] if key != "model"]
        parts.append("<h2>Accuracy</h2>")
        parts.append(
            table(
                ["model", *splits],
                [[r["model"], *(f"{r[split]:.2f}" for split in splits)]
                 for r in document["accuracy"]],
            )
        )  # fmt: skip
    if document["unseen"]:
        parts += ["<h2>Unseen instances</h2>", _unseen(document["unseen"])]
    return page("Clusters", parts)


def _map(rows: Sequence[Mapping[str, Any]], names: Sequence[str], key: str, label: str) -> str:
    values = {(row["layer"], row["model"]): row[key] for row in rows}
    layers = sorted({row["layer"] for row in rows})
    grid = [[values[layer, name] for name in names] for layer in layers]
    return diverging_map(grid, [str(layer) for layer in layers], names, label)


def _unseen(rows: Sequence[Mapping[str, Any]]) -> str:
    return note(
        "Last model. Slope: log-odds of a right answer for one standard deviation nearer to the "
        "true label's centroid than to the nearest other."
    ) + table(
        ["position", "layer", "split", "accuracy", "nearest centroid is the label's", "slope"],
        [
            [
                r["at"], str(r["layer"]), f"{r['split']} ({r['n']})", f"{r['accuracy']:.2f}",
                f"{r['nearest_centroid']:.2f}", interval(r["slope"], r["low"], r["high"], 2),
            ]
            for r in rows
        ],
    )  # fmt: skip


def render_moves(document: Mapping[str, Any]) -> str:
    """Switch rates by layer."""
    model, rows = document["model"], document["rows"]
    points = [
        Point(float(r["layer"]), r["switched"], r["at"], f"{r['switched']:.3f}") for r in rows
    ]
    points += [Point(float(r["layer"]), r["random"], f"{r['at']}, random shift") for r in rows]
    parts = [
        note(
            f"{model['name']} ({model['dtype']}, weights {model['hash']}). States are moved by the "
            "difference of two labels' centroids; a switch is the other label's answer to the same "
            "input. At query and last, centroids are those of label and input."
        ),
        scatter(points, "switch rate by layer", x_label="layer", y_label="rate", joined=True),
        table(
            ["position", "layer", "switched", "kept the answer", "random shift"],
            [
                [
                    r["at"], str(r["layer"]), interval(r["switched"], r["low"], r["high"], 2),
                    f"{r['kept']:.2f}", f"{r['random']:.2f}",
                ]
                for r in rows
            ],
        ),
    ]  # fmt: skip
    return page("Moved centroids", parts)
