"""Colours of pages and charts: enough contrast for everybody (WCAG 2.1 AA), light and dark."""

import itertools
import re
from pathlib import Path

import pytest

import saesteer.sae.reports.svg as svg

FRAME = Path(svg.__file__).parent / "templates" / "frame.html"


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def palettes() -> dict[str, dict[str, str]]:
    """The colours by name that the frame gives light and dark screens."""
    light, dark = re.findall(r":root \{([^}]*)\}", FRAME.read_text())
    named = [dict(re.findall(r"--(\w+): (#\w{6})\b", text)) for text in (light, dark)]
    return {"light": named[0], "dark": named[1]}


def test_the_formula_on_known_pairs() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("screen", ["light", "dark"])
def test_text_stands_out_from_its_ground(screen: str) -> None:
    colours = palettes()[screen]
    texts = ("text", "quiet", "bad", "good", "warn", "link")
    for text, ground in itertools.product(texts, ("ground", "card")):
        found = contrast(colours[text], colours[ground])
        assert found >= 4.5, f"{screen}: --{text} on --{ground} is {found:.2f}"


@pytest.mark.parametrize("screen", ["light", "dark"])
def test_marks_of_charts_stand_out(screen: str) -> None:
    ground = palettes()[screen]["ground"]
    for colour in svg.COLOURS:
        assert contrast(colour, ground) >= 3, f"{screen}: {colour} {contrast(colour, ground):.2f}"


@pytest.mark.parametrize("screen", ["light", "dark"])
def test_figures_stand_out_from_their_cells(screen: str) -> None:
    colours = palettes()[screen]
    shades = re.findall(
        r'fill-opacity="([\d.]+)"', svg.heat_map([[0.0, 0.5, 1.0]], ["a"], "bcd", "x")
    )
    for shade in map(float, shades):
        pairs = zip(
            *(bytes.fromhex(c[1:]) for c in (svg.COLOURS[0], colours["ground"])), strict=True
        )
        cell = "#" + "".join(f"{round(shade * a + (1 - shade) * b):02x}" for a, b in pairs)
        assert contrast(colours["text"], cell) >= 4.5, f"{screen}, {shade}"
    assert len(shades) == 3
