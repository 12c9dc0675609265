"""The parts of a page: paragraphs and tables, escaped, in the frame of all pages."""

from collections.abc import Sequence
from html import escape

from saesteer.checkpoints.provenance import versions
from saesteer.sae.reports.page import render
from saesteer.sae.reports.parts import note as note
from saesteer.sae.reports.parts import table as table
from saesteer.sae.reports.parts import warning as warning
from saesteer.sae.reports.svg import COLOURS, Point, curves, series_of


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML document; `parts` are HTML already."""
    software = versions()
    provenance = {name: software[name] for name in ("saesteer", "torch", "transformers")}
    return render("parts.html", title=title, provenance=provenance, refresh=None, parts=parts)


def lines(points: Sequence[Point], label: str, x_label: str) -> str:
    """A line a series, with its legend as text above, so that it can be read on a telephone."""
    keys = "".join(
        f'<span class="key"><i style="background:{COLOURS[place % len(COLOURS)]}"></i>'
        f"{escape(name)}</span>"
        for place, name in enumerate(series_of(points))
    )
    return f"<p>{keys}</p>{curves(points, label, x_label=x_label)}"


def interval(value: float | None, low: float | None, high: float | None, digits: int = 3) -> str:
    """A figure with its interval, as far as there are any: +0.12 [+0.05, +0.19]."""
    if value is None:
        return "-"
    ends = "" if low is None or high is None else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{value:+.{digits}f}{ends}"
