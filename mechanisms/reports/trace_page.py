"""The pages of a trace and of a comparison of traces, made from their documents alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from saesteer.mechanisms.reports.page import interval, note, page, table
from saesteer.mechanisms.reports.path_chart import path_chart
from saesteer.sae.reports.svg import diverging_map

SHOWN = 30


def render_trace(document: Mapping[str, Any]) -> str:
    """Masses of tokens, blocks and heads, and the routes as a diagram."""
    model = document["model"]
    tokens, layers = document["tokens"], range(model["n_layers"])
    reads, heads = np.array(document["read_mass"]), np.array(document["head_mass"])
    against = "the mean of the vocabulary" if document["wrong"] is None else document["wrong"]
    rows = [str(layer) for layer in layers]
    found = [(one["hops"], one["token"], one["mass"]) for one in document["routes"]]
    parts = [
        note(
            f"{model['name']} ({model['dtype']}, weights {model['hash']}). The logit of "
            f"{document['answer']!r} minus {against!r} is {document['logit']:+.4f}: tokens "
            f"{sum(document['token_mass']):+.4f}, biases {document['biases']:+.4f}, rounding "
            f"{document['gap']:+.1e}."
        ),
        note(document["caution"]),
        "<h2>Tokens</h2>",
        diverging_map([document["token_mass"]], ["mass"], tokens, "mass of each token"),
        "<h2>Routes</h2>",
        note(
            f"{len(found)} routes explain {document['explained']:.2f} of the mass of the first "
            f"block's input; dropped ones sum to {document['lost']:.3g} by size. Orange adds to "
            "the logit, blue takes away."
        ),
        path_chart(tokens, len(rows), found, "routes from tokens to the answer"),
        table(
            ["route", "mass"],
            [[one["route"], f"{one['mass']:+.4f}"] for one in document["routes"][:SHOWN]],
        ),
        "<h2>Read by attention</h2>",
        note("What the heads of each block brought from each token."),
        diverging_map(reads.sum(1).tolist(), rows, tokens, "mass read at each token by block"),
        "<h2>Heads</h2>",
        diverging_map(
            heads.sum(-1).tolist(), rows, [str(h) for h in range(heads.shape[1])], "mass of heads"
        ),
        "<h2>MLPs</h2>",
        diverging_map(document["mlp_mass"], rows, tokens, "mass of each MLP by token"),
    ]
    return page("Trace", parts)


def render_comparison(document: Mapping[str, Any]) -> str:
    """Two maps over heads, their difference, and the heads that differ."""
    model = document["model"]
    n_heads = 1 + max(row["head"] for row in document["heads"])
    rows, columns = [str(i) for i in range(model["n_layers"])], [str(i) for i in range(n_heads)]
    parts = [
        note(
            f"{model['name']} ({model['dtype']}, weights {model['hash']}); {document['n_pairs']} "
            f"pairs in {document['n_groups']} groups. Mass that each head reads at "
            f"{document['at']}, of a logit difference of {document['clean_logit']:.3f} in the "
            f"clean prompts and {document['corrupt_logit']:.3f} in the corrupt ones."
        ),
        note(document["caution"] + " Patch the heads that differ."),
    ]
    for key in ("difference", "clean", "corrupt"):
        values = [row[key] for row in document["heads"]]
        grid = [values[i : i + n_heads] for i in range(0, len(values), n_heads)]
        parts += [f"<h2>{key.capitalize()}</h2>", diverging_map(grid, rows, columns, key)]
    best = sorted(document["heads"], key=lambda row: -abs(row["difference"]))[:SHOWN]
    parts.append(
        table(
            ["head", "clean", "corrupt", "difference", "p adjusted"],
            [
                [
                    f"{row['layer']}.{row['head']}",
                    f"{row['clean']:+.3f}",
                    f"{row['corrupt']:+.3f}",
                    interval(row["difference"], row["low"], row["high"]),
                    "-" if row["p_adjusted"] is None else f"{row['p_adjusted']:.2g}",
                ]
                for row in best
            ],
        )
    )
    return page("Traces of two tasks", parts)
