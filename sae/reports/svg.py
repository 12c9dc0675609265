"""Small charts as SVG text: bars with intervals, scatter with a front, lines, heat maps.

Everything is inline and self-contained: no script, no font, no network.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#00946b", "#bf6497", "#a97500", "#3d8fc4", "#737373", "#857a00")
"""Colours that most colour-blind readers can distinguish: Okabe and Ito's, the light ones darkened
until each stands out from white and from the dark ground alike (3 to 1, WCAG 1.4.11)."""

_TEXT = 'font-family="system-ui, sans-serif" font-size="12" fill="currentColor"'
_CHAR = 6.6  # pixels of a character of 12 px text, on average


@dataclass(frozen=True)
class Bar:
    """One bar: a share with its interval."""

    label: str
    value: float
    low: float
    high: float
    colour: int = 0
    group: str = ""
    """Bars of one group stand together under its name."""


@dataclass(frozen=True)
class Point:
    """One mark of a scatter or a line."""

    x: float
    y: float
    series: str
    note: str = ""
    """Shown when the mouse rests on it."""
    marked: bool = False
    """Drawn with a ring."""


def _svg(width: float, height: float, label: str, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'role="img" aria-label="{escape(label, quote=True)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(body)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start", extra: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {_TEXT} {extra}>'
        f"{escape(text)}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


_FAINT = 'stroke="currentColor" stroke-opacity="0.18"'
_FIRM = 'stroke="currentColor" stroke-width="1.4"'


def bars(rows: Sequence[Bar], label: str, width: float = 340.0) -> str:
    """Horizontal bars from 0 to 1 with their intervals as whiskers.

    Label and figures stand above each bar, so that the chart is shown unscaled on a telephone.
    """
    left, right, top = 2.0, 10.0, 4.0
    span = width - left - right
    step, y, group = 36.0, top, ""
    body, marks = [], []
    for row in rows:
        if row.group != group:
            group = row.group
            body.append(_text(left, y + 16, group, "start", 'font-weight="bold"'))
            y += 24
        figures = f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]"
        room = int((span - _CHAR * len(figures)) / _CHAR) - 1
        name = row.label if len(row.label) <= room else f"{row.label[: room - 1]}…"
        full = "" if name == row.label else f"<title>{escape(row.label)}</title>"
        marks.append(f"{_text(left, y + 13, name)[:-7]}{full}</text>")
        marks.append(_text(left + span, y + 13, figures, "end"))
        middle = y + 24
        marks.append(
            f'<rect x="{left:.1f}" y="{middle - 6:.1f}" width="{max(span * row.value, 0.8):.1f}" '
            f'height="12" fill="{COLOURS[row.colour % len(COLOURS)]}"/>'
        )
        low, high = left + span * row.low, left + span * row.high
        marks.append(_line(low, middle, high, middle, _FIRM))
        marks += [_line(x, middle - 4, x, middle + 4, _FIRM) for x in (low, high)]
        y += step
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + span * tick
        body.append(_line(x, top, x, y + 2, _FAINT))
        anchor = "start" if not tick else "end" if tick == 1 else "middle"
        body.append(_text(x, y + 16, f"{tick:g}", anchor))
    return _svg(width, y + 22, label, [*body, *marks])


def _ticks(low: float, high: float) -> list[float]:
    """A few round numbers that cover the range."""
    if high <= low:
        high = low + 1
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def _short(value: float) -> str:
    """A tick's number in a few characters: 0.25, 1.5e-3, 250k, 2M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.4g}".replace("e-0", "e-")


class _Frame:
    """Axes of a chart with numbers on both."""

    def __init__(
        self,
        points: Sequence[Point],
        x_label: str,
        y_label: str,
        y_ticks: Sequence[float] | None,
        legend: Sequence[str],
        width: float,
        height: float,
        x_end: float | None = None,
        colours: Mapping[str, int] | None = None,
    ) -> None:
        """`x_end`: where the axis ends; by default at a tick, after the last point. `colours`:
        those of the legend's names, by default in their order."""
        self.colours = colours or {name: place for place, name in enumerate(legend)}
        self.left, self.top = 56.0, 14.0
        self.width, self.height = width, height + 18 * len(legend)
        self.bottom = height - 44
        self.edge = width - 16
        xs = [point.x for point in points] or [0.0]
        ys = [point.y for point in points] or [0.0]
        self.x_ticks = _ticks(min(0.0, *xs), max(xs)) if len(xs) > 1 else _ticks(0.0, xs[0] or 1.0)
        self.x_end = self.x_ticks[-1] if x_end is None else x_end
        self.x_ticks = [tick for tick in self.x_ticks if tick <= self.x_end]
        self.y_ticks = list(y_ticks) if y_ticks is not None else _ticks(min(0.0, *ys), max(ys))
        self.body: list[str] = []
        for tick in self.x_ticks:
            x = self.x(tick)
            self.body.append(_line(x, self.top, x, self.bottom, _FAINT))
            self.body.append(_text(x, self.bottom + 16, _short(tick), "middle"))
        for tick in self.y_ticks:
            y = self.y(tick)
            self.body.append(_line(self.left, y, self.edge, y, _FAINT))
            self.body.append(_text(self.left - 6, y + 4, _short(tick), "end"))
        middle = (self.left + self.edge) / 2
        self.body.append(_text(middle, height - 8, x_label, "middle"))
        y = (self.top + self.bottom) / 2
        turned = f'transform="rotate(-90 14 {y:.1f})"'
        self.body.append(_text(14.0, y, y_label, "middle", turned))
        for place, name in enumerate(legend):
            y = height + 10 + 18 * place
            x = self.left
            self.body.append(f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{self.colour(name)}"/>')
            self.body.append(_text(x + 9, y, name))

    def colour(self, name: str) -> str:
        return COLOURS[self.colours[name] % len(COLOURS)]

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_end
        return self.left + (value - low) / (high - low) * (self.edge - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def draw(self, label: str) -> str:
        return _svg(self.width, self.height, label, self.body)


_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def scatter(
    points: Sequence[Point],
    label: str,
    *,
    x_label: str,
    y_label: str,
    front: Sequence[Point] = (),
    limit: float | None = None,
    joined: bool = False,
    colours: Mapping[str, int] | None = None,
    width: float = 358.0,
    height: float = 300.0,
) -> str:
    """Shares against a cost: one colour a series, the front as a stair, series joined by lines.

    `limit` is drawn as a dotted vertical line, if it is within the axis. `colours` gives the series
    the colours that they have elsewhere. Narrow enough to be shown unscaled on a telephone.
    """
    series = list(dict.fromkeys(point.series for point in points))
    frame = _Frame(
        [*points, *front], x_label, y_label, _SHARES, series, width, height, colours=colours
    )
    if front:
        steps = []
        for place, point in enumerate(front):
            if place:
                steps.append((frame.x(point.x), frame.y(front[place - 1].y)))
            steps.append((frame.x(point.x), frame.y(point.y)))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in steps)
        frame.body.append(
            f'<polyline points="{path}" fill="none" stroke="currentColor" '
            'stroke-opacity="0.55" stroke-dasharray="5 4"/>'
        )
    if limit is not None and limit <= frame.x_ticks[-1]:
        x = frame.x(limit)
        style = 'stroke="currentColor" stroke-dasharray="2 4"'
        frame.body.append(_line(x, frame.top, x, frame.bottom, style))
    for name in series:
        colour = frame.colour(name)
        own = [point for point in points if point.series == name]
        if joined:
            own.sort(key=lambda point: point.x)
            path = " ".join(f"{frame.x(p.x):.1f},{frame.y(p.y):.1f}" for p in own)
            frame.body.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
            )
        for point in own:
            x, y = frame.x(point.x), frame.y(point.y)
            ring = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="none" {_FIRM}/>'
            frame.body.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" fill-opacity="0.85">'
                f"<title>{escape(point.note)}</title></circle>{ring if point.marked else ''}"
            )
    return frame.draw(label)


def curves(
    points: Sequence[Point],
    label: str,
    *,
    x_label: str,
    width: float = 344.0,
    height: float = 220.0,
) -> str:
    """Values over time: a line a series, in the order and with the colours of `series_of`.

    Narrow enough to be shown unscaled on a telephone, and without a legend: several charts of the
    same series share one.
    """
    x_end = max((point.x for point in points), default=0.0) or None
    frame = _Frame(points, x_label, "", None, (), width, height, x_end)
    for place, name in enumerate(series_of(points)):
        own = [point for point in points if point.series == name]
        path = " ".join(f"{frame.x(p.x):.1f},{frame.y(p.y):.1f}" for p in own)
        frame.body.append(
            f'<polyline points="{path}" fill="none" stroke="{COLOURS[place % len(COLOURS)]}" '
            f'stroke-width="1.6"><title>{escape(name)}</title></polyline>'
        )
        last = own[-1]
        frame.body.append(
            f'<circle cx="{frame.x(last.x):.1f}" cy="{frame.y(last.y):.1f}" r="2.5" '
            f'fill="{COLOURS[place % len(COLOURS)]}"><title>{escape(last.note)}</title></circle>'
        )
    return frame.draw(label)


def series_of(points: Sequence[Point]) -> list[str]:
    """The names of the series, in the order of their first points."""
    return list(dict.fromkeys(point.series for point in points))


def histogram(
    bins: Sequence[tuple[float, float, int]],
    label: str,
    *,
    x_label: str,
    width: float = 344.0,
    height: float = 150.0,
) -> str:
    """Counts in bins of equal width on a logarithmic axis: (lower border, upper border, count).

    Each bar shows its borders and its count while the mouse rests on it. Bars rise with the square
    root of the count, so that a single one is still seen beside a thousand; the axis says so.
    """
    left, right, top, bottom = 8.0, 8.0, 12.0, height - 36.0
    most = max((count for _, _, count in bins), default=0) or 1
    step = (width - left - right) / max(1, len(bins))
    body = [_line(left, bottom, width - right, bottom, _FAINT)]
    for place, (low, high, count) in enumerate(bins):
        if not count:
            continue
        tall = max(1.0, (bottom - top) * math.sqrt(count / most))
        body.append(
            f'<rect x="{left + step * place:.1f}" y="{bottom - tall:.1f}" '
            f'width="{max(step - 1, 0.8):.1f}" height="{tall:.1f}" fill="{COLOURS[0]}">'
            f"<title>{_short(low)} to {_short(high)}: {count:,}</title></rect>"
        )
    borders = [bins[0][0], *(high for _, high, _ in bins)] if bins else []
    every = max(1, math.ceil(len(borders) * 72 / width))
    for place in range(0, len(borders), every):
        x = left + step * place
        anchor = "start" if not place else "end" if place == len(borders) - 1 else "middle"
        body.append(_line(x, bottom, x, bottom + 3, _FIRM))
        body.append(_text(x, bottom + 15, f"{borders[place]:.3g}", anchor))
    note = f"{x_label}; heights by square root, the highest is {most:,}"
    body.append(_text(width / 2, height - 5, note, "middle"))
    return _svg(width, height, label, body)


def heat_map(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], label: str
) -> str:
    """Values between 0 and 1 as shades, with the figure in every cell."""
    left = 12 + _CHAR * max(map(len, rows), default=0)
    longest = max(map(len, columns), default=0)
    turn = longest * _CHAR > 36
    cell, top = 40.0, 20 + (0.62 * _CHAR * longest if turn else 2.0)
    body = []
    for place, name in enumerate(columns):
        x = left + cell * (place + 0.5)
        turned = f'transform="rotate(-38 {x:.1f} {top - 8:.1f})"'
        body.append(
            _text(x, top - 8, name, "start", turned) if turn else _text(x, top - 8, name, "middle")
        )
    for i, name in enumerate(rows):
        y = top + cell * i
        body.append(_text(left - 6, y + cell / 2 + 4, name, "end"))
        for j, value in enumerate(values[i]):
            x = left + cell * j
            body.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell - 1}" height="{cell - 1}" '
                f'fill="{COLOURS[0]}" fill-opacity="{0.08 + 0.52 * min(max(value, 0), 1):.2f}"/>'
            )
            body.append(_text(x + cell / 2, y + cell / 2 + 4, f"{value:.2f}", "middle"))
    overhang = 0.8 * _CHAR * longest if turn else 6
    width = left + cell * len(columns) + overhang
    return _svg(width, top + cell * len(rows) + 6, label, body)


def diverging_map(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], label: str
) -> str:
    """Values around 0: blue below, white at 0, orange above, with a legend; grey where there is
    none (NaN).

    Both ends of the scale are the largest size, so that equal shades are equal sizes. A cell shows
    its figure while the mouse rests on it.
    """
    most = max((abs(v) for line in values for v in line if math.isfinite(v)), default=0.0) or 1.0
    left = 14 + _CHAR * max(map(len, rows), default=0)
    longest = max(map(len, columns), default=0)
    cell = 22.0 if len(columns) <= 40 else max(8.0, 880 / len(columns))
    turn = longest * _CHAR > cell
    top = 12.0 + (0.8 * _CHAR * longest + 6 if turn else 14.0)
    body = []
    for place, name in enumerate(columns):
        x = left + cell * (place + 0.5)
        turned = f'transform="rotate(-60 {x:.1f} {top - 5:.1f})"'
        body.append(
            _text(x, top - 5, name, "start", turned) if turn else _text(x, top - 5, name, "middle")
        )
    height = max(12.0, min(cell, 22.0))
    for i, name in enumerate(rows):
        y = top + height * i
        body.append(_text(left - 6, y + height / 2 + 4, name, "end"))
        for j, value in enumerate(values[i]):
            title = f"{name}, {columns[j]}: {value:+.4g}"
            body.append(
                f'<rect x="{left + cell * j:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" '
                f'height="{height - 1:.1f}" fill="{_shade(value, most)}">'
                f"<title>{escape(title)}</title></rect>"
            )
    under = top + height * len(rows) + 10
    for step in range(-4, 5):
        x = left + 26.0 * (step + 4)
        body.append(
            f'<rect x="{x:.1f}" y="{under:.1f}" width="26" height="10" '
            f'fill="{_shade(step / 4 * most, most)}"/>'
        )
    for step, anchor in ((-4, "start"), (0, "middle"), (4, "end")):
        x = left + 26.0 * 4.5 + 26.0 * 4.5 * step / 4
        body.append(_text(x, under + 24, f"{step / 4 * most:+.3g}" if step else "0", anchor))
    width = left + max(cell * len(columns) + _CHAR * longest * turn, 250.0)
    return _svg(width, under + 32, label, body)


def _shade(value: float, most: float) -> str:
    """A colour between blue (-most), white (0) and orange (+most); grey for NaN."""
    if not math.isfinite(value):
        return "#9a9a9a"
    share = min(1.0, abs(value) / most)
    end = (0, 114, 178) if value < 0 else (213, 94, 0)
    mixed = (round(255 + (channel - 255) * share) for channel in end)
    return f"rgb({','.join(map(str, mixed))})"


def cloud(
    points: Sequence[Point], label: str, *, x_label: str, y_label: str, width: float = 420.0
) -> str:
    """Two numbers of each point, of any size, with the line where they are equal."""
    frame = _Frame(points, x_label, y_label, None, (), width, 320.0)
    low = max(frame.x_ticks[0], frame.y_ticks[0])
    high = min(frame.x_ticks[-1], frame.y_ticks[-1])
    style = 'stroke="currentColor" stroke-opacity="0.5" stroke-dasharray="5 4"'
    frame.body.append(_line(frame.x(low), frame.y(low), frame.x(high), frame.y(high), style))
    for point in points:
        frame.body.append(
            f'<circle cx="{frame.x(point.x):.1f}" cy="{frame.y(point.y):.1f}" r="3.5" '
            f'fill="{COLOURS[0]}" fill-opacity="0.7"><title>{escape(point.note)}</title></circle>'
        )
    return frame.draw(label)
