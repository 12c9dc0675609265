"""The parts of a page: paragraphs and tables, escaped, in the frame of all pages."""

from collections.abc import Sequence

from saesteer.checkpoints.provenance import versions
from saesteer.sae.reports.page import render
from saesteer.sae.reports.parts import note as note
from saesteer.sae.reports.parts import table as table
from saesteer.sae.reports.parts import warning as warning


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML document; `parts` are HTML already."""
    software = versions()
    provenance = {name: software[name] for name in ("saesteer", "torch", "transformers")}
    return render("parts.html", title=title, provenance=provenance, refresh=None, parts=parts)


def interval(value: float | None, low: float | None, high: float | None, digits: int = 3) -> str:
    """A figure with its interval, as far as there are any: +0.12 [+0.05, +0.19]."""
    if value is None:
        return "-"
    ends = "" if low is None or high is None else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{value:+.{digits}f}{ends}"
