"""The frame of a page: self-contained, without script, font or network."""

from collections.abc import Sequence
from html import escape

_STYLE = (
    ":root{color-scheme:light dark}"
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem}"
    "h1{font-size:1.6rem;margin-bottom:.2rem}h2{margin-top:2rem;border-bottom:1px solid #8884}"
    "p.note{color:#777}p.warning{border-left:4px solid #d55e00;padding-left:.7rem}"
    "table{border-collapse:collapse;font-size:13.5px;display:block;overflow-x:auto}"
    "th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #8883;white-space:nowrap}"
    "th:first-child,td:first-child{text-align:left}svg{max-width:100%;height:auto}"
)


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML document."""
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def note(text: str) -> str:
    """A paragraph in grey."""
    return f'<p class="note">{escape(text)}</p>'


def warning(text: str) -> str:
    """A paragraph that stands out."""
    return f'<p class="warning">{escape(text)}</p>'


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are figures."""
    head = "".join(f"<th>{escape(name)}</th>" for name in headers)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def interval(value: float | None, low: float | None, high: float | None, digits: int = 3) -> str:
    """A figure with its interval, as far as there are any: +0.12 [+0.05, +0.19]."""
    if value is None:
        return "-"
    ends = "" if low is None or high is None else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{value:+.{digits}f}{ends}"
