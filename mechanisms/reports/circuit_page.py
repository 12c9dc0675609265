"""The page of a circuit, made from its report.json alone."""

from collections.abc import Mapping
from html import escape
from typing import Any

from saesteer.mechanisms.reports.page import interval, note, page, table
from saesteer.sae.reports.parts import wide
from saesteer.sae.reports.svg import Point, cloud, diverging_map


def render_circuit(document: Mapping[str, Any]) -> str:
    """Heads and scores of each group, and what the circuit does alone."""
    model, test, circuit = document["model"], document["test"], document["circuit"]
    parts = [
        note(
            f"{model['name']} ({model['dtype']}, weights {model['hash']}). Heads were found by "
            f"path patching on {document['n_found_on']} pairs; the circuit was made smaller and "
            f"tested on {document['n_tested_on']} others (seed {document['settings']['seed']}, "
            f"{document['seconds']:.0f} s)."
        ),
        "<h2>Heads</h2>",
        table(
            ["group", "at", "reaches", "head", f"share of {circuit['metric']}"],
            [
                [
                    g["name"],
                    g["at"],
                    _reached(g["receivers"]),
                    f"({layer},{head})",
                    interval(*head_score(g, layer, head)),
                ]
                for g in circuit["groups"]
                for layer, head in g["heads"]
            ],
        ),  # fmt: skip
    ]
    for g in circuit["groups"]:
        if g["scores"] is not None:
            rows = [str(layer) for layer in range(model["n_layers"])]
            columns = [str(head) for head in range(len(g["scores"][0]))]
            title = f"{g['name']} at {g['at']}: share of {circuit['metric']} that a head loses"
            parts.append(f"<h3>{escape(title)}</h3>")
            parts.append(
                note(
                    "Rows are blocks, columns heads. A share is the mean change over the mean in "
                    "the clean run; -1 is all of it."
                )
            )
            parts.append(wide(diverging_map(g["scores"], rows, columns, title)))
    parts += ["<h2>Test</h2>", _test(test), *_completeness(test)]
    for mask in document["masks"]:
        title = f"Mask learned at {mask['at']} for {mask['wanted']}"
        parts.append(f"<h2>{escape(title)}</h2>")
        parts.append(_mask(mask))
    if document["overlap"]:
        parts += ["<h2>The tuned model's own circuit</h2>", _overlap(document["overlap"])]
    if document["cross"]:
        parts += ["<h2>Against the tuned model</h2>", _cross(document["cross"])]
    return page("Circuit", parts)


def head_score(
    group: Mapping[str, Any], layer: int, head: int
) -> tuple[float | None, float | None, float | None]:
    """Score of a head in a group of circuit.json, and its interval, where there are any."""
    if group["scores"] is None:
        return None, None, None
    if group["intervals"] is None:
        return group["scores"][layer][head], None, None
    low, high = (end[layer][head] for end in group["intervals"])
    return group["scores"][layer][head], low, high


def _reached(receivers: Mapping[str, Any]) -> str:
    by = f", {receivers['by']}" if receivers["by"] else ""
    return f"{receivers['to']}{by}"


def _test(test: Mapping[str, Any]) -> str:
    rows = [
        [name, interval(test[key]["value"], test[key]["low"], test[key]["high"])]
        for name, key in (
            ("F of the model: answer minus wrong logit", "full"),
            ("F of the circuit alone", "alone"),
            ("F with every head ablated", "nothing"),
            ("F(C) / F(M)", "ratio"),
            ("faithfulness (F(C) - F(nothing)) / (F(M) - F(nothing))", "faithfulness"),
        )
    ]
    rows.append(["largest gap of completeness", f"{test['completeness_gap']:.3f}"])
    if test["random"]:
        best = max(test["random"])
        rows.append([f"best of {len(test['random'])} random circuits of its size", f"{best:+.3f}"])
    rows += [
        [f"cost of ({head[0]},{head[1]}) of {name}", f"{lost:+.3f}"]
        for name, head, lost in test["minimality"]
    ]
    return note(f"Heads outside are ablated by {test['ablate']}; 95 % intervals.") + table(
        ["figure", "value"], rows
    )


def _completeness(test: Mapping[str, Any]) -> list[str]:
    points = [Point(without, alone, "", name) for name, alone, without in test["completeness"]]
    if not points:
        return []
    title = "Completeness: the circuit without K against the model without K"
    return [
        f"<h3>{title}</h3>",
        cloud(points, title, x_label="F(M without K)", y_label="F(C without K)"),
    ]


def _overlap(overlap: Mapping[str, Any]) -> str:
    return note(
        "Found on the same pairs, before pruning. Heads at positions in both over those in "
        f"either: {overlap['jaccard']:.2f}, by chance {overlap['random']:.2f}; share of this "
        f"model's heads that the tuned one has too: {overlap['kept']:.2f}."
    ) + table(
        ["group", "heads of the tuned model"],
        [
            [name, ", ".join(f"({layer},{head})" for layer, head in heads)]
            for name, heads in overlap["tuned"]
        ],
    )


def _cross(cross: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            interval(value["value"], value["low"], value["high"], 2),
            f"{cross['accuracy'][name]:.2f}",
        ]
        for name, value in cross["recovered"].items()
    ]
    return note(
        "The tuned model's z is put into the base at the circuit's positions, on "
        f"{cross['n_pairs']} clean prompts. F is {cross['base']:.2f} in the base (accuracy "
        f"{cross['accuracy']['base']:.2f}) and {cross['tuned']:.2f} in the tuned model "
        f"({cross['accuracy']['tuned']:.2f}); recovered is the share of that difference."
    ) + table(["heads", "recovered", "answer beats the wrong one"], rows)


def _mask(mask: Mapping[str, Any]) -> str:
    def share(value: Mapping[str, float]) -> str:
        return f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"

    return note(
        f"Share of {mask['n_test']} prompts that give the answer that is wanted once these heads' "
        f"z at {mask['at']} is that of another prompt: "
        + (
            "its own answer"
            if mask["wanted"] == "answer"
            else f"the answer of the pairs made for {mask['wanted']}"
        )
        + f"; overlap of seeds (Jaccard) {mask['jaccard']:.2f}."
    ) + table(
        ["heads", "share"],
        [
            [", ".join(f"({a},{b})" for a, b in mask["heads"]) or "none", share(mask["accuracy"])],
            ["as many at random", share(mask["random"])],
            ["all", share(mask["every"])],
        ],
    )
