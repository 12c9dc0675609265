"""The page of instruction vectors, made from their document alone."""

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from saesteer.mechanisms.reports.page import interval, note, page, table
from saesteer.sae.reports.svg import diverging_map

SHOWN = 20


def render_vectors(document: Mapping[str, Any]) -> str:
    """Single blocks beside controls, the triangle of pairs, and the test of superadditivity."""
    model, settings = document["model"], document["settings"]
    sets = document["sets"]
    singles = [row for row in sets if len(row["layers"]) == 1]
    names = [str(row["layers"][0]) for row in singles]
    rows = ["instruction", *document["controls"]]
    values = [[row["effect"] for row in singles]]
    values += [[cell["effect"] for cell in cells[: len(singles)]]
               for cells in document["controls"].values()]  # fmt: skip
    parts = [
        note(
            f"{model['name']} ({model['dtype']}, weights {model['hash']}); "
            f"{document['n_queries']} queries. States of the instruction "
            f"{document['instruction']!r} ({settings['iv_from']}) are put at {settings['at']} of "
            f"the prompt without it. {document['metric']} is {document['base']:.3f} there and "
            f"{document['full']:.3f} with the instruction; a share is of {document['total']:+.3f}."
        ),
        "<h2>Single blocks</h2>",
        diverging_map(values, rows, names, "effect by block"),
    ]
    pairs = {tuple(row["layers"]): row["effect"] for row in sets if len(row["layers"]) == 2}
    if pairs:
        alone = {row["layers"][0]: row["effect"] for row in singles}
        grid = [[alone[a] if a == b else pairs.get((a, b), math.nan) for b in alone] for a in alone]
        parts += [
            "<h2>Pairs of blocks</h2>",
            note("The diagonal is one block alone."),
            diverging_map(grid, names, names, "effect by pair of blocks"),
        ]
    parts += ["<h2>Best sets</h2>", _best(sets)]
    if document["superadditivity"]:
        parts += ["<h2>Do pairs add up?</h2>", _tests(document)]
    return page(f"Instruction vectors: {escape(document['instruction'])}", parts)


def _best(sets: list[Mapping[str, Any]]) -> str:
    best = sorted(sets, key=lambda row: -row["effect"])[:SHOWN]
    return table(
        ["blocks", "effect", "share", "minus the other instruction"],
        [
            [
                ", ".join(map(str, row["layers"])),
                interval(row["effect"], row["low"], row["high"]),
                "-" if row["share"] is None else f"{row['share']:.2f}",
                "-" if row["specific"] is None else f"{row['specific']:+.3f}",
            ]
            for row in best
        ],
    )


def _tests(document: Mapping[str, Any]) -> str:
    rows = [
        [
            ", ".join(map(str, row["layers"])),
            f"{row['effect']:+.3f}",
            interval(row["interaction"], row["low"], row["high"]),
            f"{row['above']} of {row['above'] + row['below']}",
            f"{row['p_adjusted']:.2g}",
        ]
        for row in document["superadditivity"]
    ]
    said = note(
        "I = f(pair) - f(one) - f(other), on queries that did not choose the pairs; one-sided "
        "exact sign test, adjusted by Holm."
    ) + table(["blocks", "f", "I", "I > 0", "p adjusted"], rows)
    doses = [[f"{d['dose']:g}", f"{d['interaction']:+.4f}", f"{d['by_square']:+.4f}"]
             for d in document["doses"]]  # fmt: skip
    return said + note(
        "Added instead of put in place, a linear code is additive to first order: I / dose² is its "
        "curvature."
    ) + table(["dose", "mean I", "I / dose²"], doses)  # fmt: skip
