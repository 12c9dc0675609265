"""A chart for a notebook, and as a file."""

from pathlib import Path

from saesteer.sae.reports.chart import Chart


def test_a_chart_is_short_shown_and_kept(tmp_path: Path) -> None:
    chart = Chart("<svg></svg>", "FVU by tokens")
    assert repr(chart) == "Chart('FVU by tokens'; show it in a notebook, or .save('chart.svg'))"
    assert "<svg></svg>" in chart._repr_html_()
    chart.save(tmp_path / "chart.svg")
    assert (tmp_path / "chart.svg").read_text() == "<svg></svg>"
