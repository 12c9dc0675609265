"""The curves of a training run: read from its logs, shown as a page or as lines of text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.files import read_json, read_jsonl
from saesteer.sae.reports.svg import COLOURS, Point, curves

Rows = Sequence[Mapping[str, Any]]
"""The lines of a `metrics.jsonl`."""


@dataclass(frozen=True)
class Curve:
    """One quantity of the log."""

    key: str
    """Its name in `metrics.jsonl`."""
    title: str
    note: str


CURVES = (
    Curve("fvu", "FVU", "variance that the reconstruction leaves, on the rows of training"),
    Curve("l0", "L0", "active latents per token"),
    Curve("dead_fraction", "dead latents", "share that has not fired for long"),
    Curve("lr", "learning rate", "of the matrices"),
    Curve("tokens_per_second", "tokens per second", "of all SAEs of the run together"),
    Curve("stall_model", "waiting for rows", "share of the time that training waits"),
    Curve("stall_trainer", "waiting for training", "share of the time that rows wait"),
)

SECONDS_BETWEEN_PAGES = 10


@dataclass(frozen=True)
class RunCurves:
    """The logs of the SAEs of one or several runs."""

    logs: dict[str, Rows]
    """The log of each SAE, by the name that is shown."""
    tokens: int | None
    """Activations that the run is to see; None when no record says so."""
    complete: bool
    """Whether every SAE is finished."""


def read_curves(folders: Sequence[str | Path]) -> RunCurves:
    """The logs of runs that `train` writes or has written.

    Raises UserError for a folder without a run.
    """
    logs: dict[str, Rows] = {}
    records: list[Mapping[str, Any]] = []
    for given in folders:
        folder = Path(given).expanduser()
        inside = sorted(folder.glob("*/metrics.jsonl"))
        own = [folder / "metrics.jsonl"] if (folder / "metrics.jsonl").is_file() else []
        found = own or inside
        if not found:
            raise UserError(
                f"{folder} holds no training run: give a folder that train writes, with a "
                "metrics.jsonl in it or in its sub-folders"
            )
        for path in found:
            name = path.parent.name if len(folders) == 1 else _name(folder, path.parent)
            logs[name] = read_jsonl(path)
            if (path.parent / "run.json").is_file():
                records.append(read_json(path.parent / "run.json"))
    tokens = [_tokens(record) for record in records]
    known = [count for count in tokens if count is not None]
    return RunCurves(
        logs=logs,
        tokens=max(known) if known else None,
        complete=len(records) == len(logs) and all(r.get("complete") for r in records),
    )


def _name(folder: Path, place: Path) -> str:
    return folder.name if place == folder else f"{folder.name}/{place.name}"


def _tokens(record: Mapping[str, Any]) -> int | None:
    config = record.get("config")
    tokens = config.get("tokens") if isinstance(config, Mapping) else None
    return tokens if isinstance(tokens, int) else None


def training_page(run: RunCurves, title: str = "Training") -> str:
    """A page with a chart for each quantity and a table of the latest values.

    While the run goes on the page reloads itself in a browser.
    """
    from markupsafe import Markup

    from saesteer.checkpoints.provenance import versions
    from saesteer.sae.reports.page import render

    shown = [curve for curve in CURVES if any(_has(rows, curve.key) for rows in run.logs.values())]
    charts = []
    for curve in shown:
        points = [
            Point(
                float(row["tokens"]),
                float(row[curve.key]),
                name,
                f"{name}: {figure(row[curve.key])}",
            )
            for name, rows in run.logs.items()
            for row in rows
            if row.get(curve.key) is not None
        ]
        svg = curves(points, f"{curve.title} by tokens", x_label="tokens")
        charts.append({"title": curve.title, "note": curve.note, "svg": Markup(svg)})
    columns = [Curve("tokens", "tokens", ""), *shown]
    runs = [
        {
            "name": name,
            "colour": COLOURS[place % len(COLOURS)],
            "latest": [figure(rows[-1].get(c.key) if rows else None) for c in columns],
        }
        for place, (name, rows) in enumerate(run.logs.items())
    ]
    software = versions()
    return render(
        "training.html",
        title=title,
        state=progress_text(run),
        refresh=None if run.complete else SECONDS_BETWEEN_PAGES,
        runs=runs,
        charts=charts,
        columns=[curve.title for curve in columns],
        provenance={"saesteer": software["saesteer"], "torch": software["torch"]},
    )


def progress_text(run: RunCurves) -> str:
    """How far a run is: "finished", "1,000 of 4,000 tokens", or that nothing is logged yet."""
    if run.complete:
        return "finished"
    done = max((rows[-1]["tokens"] for rows in run.logs.values() if rows), default=0)
    if not done:
        return "nothing is logged yet"
    return f"{done:,} of {run.tokens:,} tokens" if run.tokens else f"{done:,} tokens"


def spark_line(values: Sequence[int | float], width: int) -> str:
    """Values as a line of block characters, at most `width` of them, from lowest to highest."""
    if not values:
        return ""
    step = max(1.0, len(values) / width)
    count = min(width, len(values))
    picked = [values[min(len(values) - 1, int((i + 1) * step) - 1)] for i in range(count)]
    low, high = min(picked), max(picked)
    blocks = "▁▂▃▄▅▆▇█"
    span = high - low
    return "".join(blocks[round((v - low) / span * 7) if span else 0] for v in picked)


def figure(value: float | int | None) -> str:
    """A value of the log in a few characters; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _has(rows: Rows, key: str) -> bool:
    return any(row.get(key) is not None for row in rows)
