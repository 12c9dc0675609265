"""Charts are well-formed SVG whose marks lie where their numbers say."""

import re
import xml.etree.ElementTree as ET

import pytest

from saesteer.sae.reports.svg import Bar, Point, bars, curves, heat_map, scatter

NS = "{http://www.w3.org/2000/svg}"


def test_bars_are_as_long_as_their_shares() -> None:
    svg = ET.fromstring(bars([Bar("a <b>", 0.25, 0.1, 0.5), Bar("c", 0.5, 0.4, 0.6, 1)], "x & y"))
    first, second = svg.findall(f"{NS}rect")
    assert float(second.get("width", 0)) == pytest.approx(2 * float(first.get("width", 0)), abs=0.2)
    texts = [text.text for text in svg.findall(f"{NS}text")]
    assert "a <b>" in texts and "0.25 [0.10, 0.50]" in texts
    assert svg.get("aria-label") == "x & y"


def test_bars_of_a_group_stand_under_its_name() -> None:
    rows = [Bar("a", 0.5, 0.4, 0.6, 0, "one"), Bar("b", 0.5, 0.4, 0.6, 0, "one"),
            Bar("c", 0.5, 0.4, 0.6, 0, "two")]  # fmt: skip
    svg = ET.fromstring(bars(rows, "x"))
    heights = {text.text: float(text.get("y", 0)) for text in svg.findall(f"{NS}text")}
    order = ["one", "a", "b", "two", "c"]
    assert sorted(order, key=lambda name: heights[name]) == order
    assert heights["c"] < float(svg.get("height", 0)) - 20


def test_a_limit_is_drawn_where_it_lies_on_the_axis() -> None:
    points = [Point(0.0, 0.0, "a", "low"), Point(2.0, 1.0, "a", "high")]

    def dotted(limit: float) -> list[float]:
        text = scatter(points, "s", x_label="x", y_label="y", limit=limit)
        lines = ET.fromstring(text).findall(f"{NS}line")
        return [float(line.get("x1", 0)) for line in lines if line.get("stroke-dasharray")]

    (half,), (whole,) = dotted(1.0), dotted(2.0)
    marks = re.findall(r'cx="([\d.]+)" cy="[\d.]+" r="4" fill="[^"]+" fill-opacity',
                       scatter(points, "s", x_label="x", y_label="y"))  # fmt: skip
    assert whole == float(marks[1]) and half == pytest.approx(sum(map(float, marks)) / 2, abs=0.1)
    assert dotted(50.0) == []


def test_scatter_places_points_notes_rings_and_the_front() -> None:
    points = [Point(0.0, 0.0, "one", "low"), Point(2.0, 1.0, "two", "high <1>", True)]
    text = scatter(points, "s", x_label="KL", y_label="success", front=points)
    svg = ET.fromstring(text)
    marks = {
        mark.findtext(f"{NS}title"): (float(mark.get("cx", 0)), float(mark.get("cy", 0)))
        for mark in svg.findall(f"{NS}circle")
        if mark.find(f"{NS}title") is not None
    }
    assert marks["low"][0] < marks["high <1>"][0] and marks["low"][1] > marks["high <1>"][1]
    rings = [c for c in svg.findall(f"{NS}circle") if c.get("fill") == "none"]
    assert [float(ring.get("cx", 0)) for ring in rings] == [marks["high <1>"][0]]
    (front,) = svg.findall(f"{NS}polyline")
    assert len(front.get("points", "").split()) == 3  # a stair


def test_lines_join_the_points_of_a_series_in_order_of_dose() -> None:
    points = [Point(x, 0.5, "k 1") for x in (0.8, 0.2, 0.5)]
    svg = ET.fromstring(scatter(points, "s", x_label="x", y_label="y", joined=True))
    (line,) = svg.findall(f"{NS}polyline")
    xs = [float(pair.split(",")[0]) for pair in line.get("points", "").split()]
    assert xs == sorted(xs) and len(set(xs)) == 3


@pytest.mark.parametrize("x", [0.0, 1e-6, 3.2, 250.0])
def test_one_point_is_enough(x: float) -> None:
    svg = ET.fromstring(scatter([Point(x, 0.2, "a")], "s", x_label="x", y_label="y"))
    assert "nan" not in ET.tostring(svg, encoding="unicode").lower()
    assert [title.text for title in svg.iter(f"{NS}title")], "the point is drawn"


def test_heat_map_shows_every_figure() -> None:
    svg = heat_map([[1.0, 0.25], [0.25, 1.0]], ["en 1", "de"], ["en 1", "de"], "h")
    assert len(ET.fromstring(svg).findall(f"{NS}rect")) == 4
    assert re.findall(r">(\d\.\d\d)<", svg) == ["1.00", "0.25", "0.25", "1.00"]


def test_curves_lie_where_their_numbers_say() -> None:
    points = [Point(x, y, name, f"{name} {y}") for name, y in (("a", 1.0), ("b", 0.5))
              for x in (1000.0, 2000.0, 4000.0)]  # fmt: skip
    svg = ET.fromstring(curves(points, "FVU", x_label="tokens"))
    lines = svg.findall(f"{NS}polyline")
    assert [line.find(f"{NS}title").text for line in lines] == ["a", "b"]  # type: ignore[union-attr]
    places = [[tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]
              for line in lines]  # fmt: skip
    (first, second, third), (below, *_) = places
    assert third[0] - second[0] == pytest.approx(2 * (second[0] - first[0]), abs=0.2)
    assert first[1] < below[1]  # higher values lie higher
    assert "4k" in [text.text for text in svg.findall(f"{NS}text")]


def test_a_curve_of_one_point_at_zero_is_drawn() -> None:
    assert ET.fromstring(curves([Point(0.0, 0.0, "a")], "x", x_label="x")) is not None
