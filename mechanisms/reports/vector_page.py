"""The files of instruction vectors: report.json, report.html and vectors.safetensors."""

import json
from html import escape
from pathlib import Path
from typing import Any

import torch

from saesteer.checkpoints.files import write_json, write_tensors, write_text
from saesteer.mechanisms.reports.page import interval, lines, note, page, table, warning
from saesteer.mechanisms.reports.vector_result import VectorResult
from saesteer.sae.reports.svg import Point, diverging_map

SHOWN = 30


def save_vectors(folder: str | Path, result: VectorResult) -> dict[str, Any]:
    """Write the result into a folder that exists; returns the document of report.json."""
    folder = Path(folder)
    document = result.document()
    tensors = {
        "effects": torch.from_numpy(result.effects).float(),
        "vectors": result.vectors.float(),
    }
    axes = {
        "pairs": json.dumps(list(result.groups)),
        "sets": json.dumps([one.name for one in result.sets]),
        "layers": json.dumps(list(result.layers)),
    }
    write_tensors(folder / "vectors.safetensors", tensors, axes)
    write_text(folder / "report.html", render_vectors(result))
    write_json(folder / "report.json", document)
    return document


def render_vectors(result: VectorResult) -> str:
    """The page of instruction vectors."""
    config, model = result.config, result.model
    added = "is put in the place of the state" if not config.doses else "is added, at each dose,"
    parts = [
        note(
            f"{model['name']} ({model['dtype']}, weights {model['hash']}); {len(result.base)} "
            f"pairs in {len(set(result.groups))} groups; metric {result.metric}; seed "
            f"{config.seed}; {result.seconds:.0f} s."
        ),
        note(
            f"The state after a block at the instruction's last token (run: {config.taken}) "
            f"{added} at {config.at} of the prompt without the instruction. f is the metric then "
            f"minus {result.base.mean():.3f}, the prompt's own; the instruction in words gives "
            f"{result.whole:+.3f}. Intervals are 95 %, by bootstrap over groups."
        ),
        *map(warning, result.warnings()),
    ]
    rows = result.summary
    singles = [row for row in rows if len(row["layers"]) == 1]
    points = [
        Point(float(row["layers"][0]), row["effect"],
              "vector" if row["dose"] is None else f"dose {row['dose']:g}", row["set"])
        for row in singles
    ]  # fmt: skip
    points += [
        Point(float(row["layers"][0]), row["controls"][name], name, row["set"])
        for name in result.controls
        for row in singles
        if row["controls"][name] is not None
    ]
    parts += ["<h2>One layer</h2>", lines(points, "f by layer", "layer")]
    if any(len(row["layers"]) == 2 for row in rows):
        parts += _pairs(result)
    parts.append("<h2>Largest effects</h2>")
    parts.append(
        table(
            ["layers", "f", "share of the instruction", "over the other instruction",
             *result.controls],
            [
                [
                    row["set"],
                    interval(row["effect"], row["low"], row["high"]),
                    interval(row["share"], row["share_low"], row["share_high"], 2),
                    interval(*row.get("over_other", (None, None, None))),
                    *(interval(row["controls"][name], None, None) for name in result.controls),
                ]
                for row in sorted(rows, key=lambda row: -row["effect"])[:SHOWN]
            ],
        )
    )  # fmt: skip
    return page("Instruction vectors", parts)


def _pairs(result: VectorResult) -> list[str]:
    names = [str(layer) for layer in result.layers]
    parts = ["<h2>Two layers</h2>", note("The diagonal is one layer; the rest is blank below it.")]
    for dose in dict.fromkeys(one.dose for one in result.sets):
        grid = [[float("nan")] * len(names) for _ in names]
        for row in result.summary:
            if row["dose"] == dose and len(row["layers"]) < 3:
                one = row["layers"]
                grid[result.layers.index(one[0])][result.layers.index(one[-1])] = row["effect"]
        title = "f" if dose is None else f"f, dose {dose:g}"
        parts += [f"<h3>{escape(title)}</h3>", diverging_map(grid, names, names, title)]
    if result.superadditivity:
        parts += [
            "<h3>Do two layers do more than their sum?</h3>",
            note(
                "The best pairs were chosen on half of the groups and are tested on the other: "
                "I = f(both) - f(one) - f(other); p by sign test, with Holm's correction."
            ),
            table(
                ["layers", "I", "groups above 0", "p"],
                [
                    [row["set"], interval(row["interaction"], row["low"], row["high"]),
                     f"{row['positive']} of {row['groups']}", f"{row['p_holm']:.2g}"]
                    for row in result.superadditivity
                ],
            ),
        ]  # fmt: skip
    return parts
