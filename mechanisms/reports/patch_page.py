"""The files of a patch grid: report.json, report.html and effects.safetensors."""

import json
from html import escape
from pathlib import Path
from typing import Any

import torch

from saesteer.checkpoints.files import write_json, write_tensors, write_text
from saesteer.mechanisms.reports.page import interval, note, page, table, warning
from saesteer.mechanisms.reports.patch_result import PatchResult
from saesteer.sae.reports.parts import wide
from saesteer.sae.reports.svg import Point, cloud, diverging_map

SHOWN = 30
"""Rows of the table on the page; report.json has all."""


def save_patch(folder: str | Path, result: PatchResult) -> dict[str, Any]:
    """Write the result into a folder that exists; returns the document of report.json."""
    folder = Path(folder)
    document = result.document()
    tensors = {"effects": torch.from_numpy(result.effects).float()}
    if result.fast is not None:
        tensors["fast"] = torch.from_numpy(result.fast).float()
    cells = [[c.node.site, c.node.layer, c.node.head, c.at] for c in result.cells]
    axes = {"pairs": json.dumps(list(result.groups)), "cells": json.dumps(cells)}
    write_tensors(folder / "effects.safetensors", tensors, axes)
    write_text(folder / "report.html", render_patch(result))
    write_json(folder / "report.json", document)
    return document


def render_patch(result: PatchResult) -> str:
    """The page of a grid."""
    config, model = result.config, result.model
    base, source = ("clean", "corrupt") if config.direction == "noise" else ("corrupt", "clean")
    parts = [
        note(
            f"{model['name']} ({model['dtype']}, weights {model['hash']}); {len(result.base)} "
            f"pairs in {result.n_groups} groups; metric {result.metric}; seed {config.seed}; "
            f"{result.seconds:.0f} s."
        ),
        note(
            f"Values of the {source} run are put into the {base} run ({config.direction}), one "
            f"node at a time. Unpatched, {result.metric} is {result.base.mean():.3f} in the {base} "
            f"run and {result.source.mean():.3f} in the {source} run; a share is the mean effect "
            f"over their difference {result.total:+.3f}. Intervals are 95 %, by bootstrap over "
            "groups; p is a sign test over groups, adjusted by Benjamini and Hochberg."
        ),
        *map(warning, result.warnings()),
    ]
    kind = "effect" if config.fast is None else f"effect, by {config.fast} where not exact"
    parts.append(note("In the maps rows are blocks; columns are heads, or positions."))
    for title, rows, columns, values in result.maps():
        parts.append(f"<h2>{escape(title)}</h2>")
        parts.append(
            wide(diverging_map(values.tolist(), rows, columns, f"{title}: {kind} by block"))
        )
    if result.agreement is not None:
        parts += _agreement(result)
    parts.append("<h2>Largest effects</h2>")
    best = sorted(result.summary, key=lambda row: -abs(row["effect"]))[:SHOWN]
    parts.append(
        table(
            ["node", "effect", "share", "p adjusted", "how"],
            [
                [
                    row["name"],
                    interval(row["effect"], row["low"], row["high"]),
                    interval(row["share"], row["share_low"], row["share_high"], 2),
                    "-" if row["p_adjusted"] is None else f"{row['p_adjusted']:.2g}",
                    "exact" if row["exact"] else str(config.fast),
                ]
                for row in best
            ],
        )
    )
    return page("Patches", parts)


def _agreement(result: PatchResult) -> list[str]:
    known = [row for row in result.summary if row["exact"] and row["fast"] is not None]
    points = [Point(row["fast"], row["effect"], "", row["name"]) for row in known]
    label = f"exact effect against {result.config.fast}"
    return [
        "<h2>How good the shortcut is</h2>",
        note(f"{result.config.fast} against exact patches: {result.agreement}."),
        cloud(points, label, x_label=str(result.config.fast), y_label="exact"),
    ]
