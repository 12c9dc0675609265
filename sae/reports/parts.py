"""Parts of a page that every report uses: tables, notes, boxes, the menu of arms and answers.

All text is escaped here; what these functions return goes into a page as it is.
"""

from collections.abc import Sequence
from html import escape
from typing import Literal

Tone = Literal["good", "bad", "warn", "plain"]


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table that scrolls by itself where it is too wide; the first cell of a row names it."""
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in headers)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{told}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def note(text: str) -> str:
    """A paragraph in grey."""
    return f'<p class="quiet">{escape(text)}</p>'


def warning(text: str) -> str:
    """A paragraph that stands out."""
    return f'<p class="bad">{escape(text)}</p>'


def box(tone: Tone, title: str, lines: Sequence[str] = ()) -> str:
    """A box that stands out: what went well, what went wrong, what to be careful about.

    The tone is said in the title as well: nobody has to tell colours apart.
    """
    told = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<div class="box tone-{tone}"><p class="title">{escape(title)}</p>{told}</div>'


def section(title: str, name: str) -> str:
    """A heading that the contents lead to."""
    return f'<h2 id="{escape(name, quote=True)}">{escape(title)}</h2>'


def contents(entries: Sequence[tuple[str, str]]) -> str:
    """Links to the sections of a page: title and name of each."""
    links = "".join(
        f'<li><a href="#{escape(name, quote=True)}">{escape(title)}</a></li>'
        for title, name in entries
    )
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>'


def wide(svg: str) -> str:
    """A chart that keeps its size, and scrolls, where the screen is narrower."""
    return f'<div class="scroll wide">{svg}</div>'


def charts(figures: Sequence[tuple[str, str]]) -> str:
    """Charts side by side as far as there is room: caption and SVG of each."""
    shown = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"
        for caption, svg in figures
    )
    return f'<div class="charts">{shown}</div>'
