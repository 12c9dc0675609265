"""The figures of an SAE as a mapping, a table and a chart."""

import json

import pytest

from saesteer.sae.measuring.result import Metrics

FIGURE = {"value": 0.25, "low": 0.125, "high": 0.5}


@pytest.fixture
def found() -> Metrics:
    return Metrics(
        sae={"source": "runs/sae", "d_sae": 16}, layer=2, tokens=1234, dead_fraction=0.125,
        dead_latents=2, seen_in_training=False, fvu=FIGURE, l0={**FIGURE, "value": 3.0},
        ce_recovered={**FIGURE, "low": -0.5}, density_histogram=[1, 2],
    )  # fmt: skip


def test_it_is_the_document(found: Metrics) -> None:
    assert json.loads(json.dumps(found))["fvu"] == FIGURE and found["tokens"] == 1234
    assert repr(found).startswith("Metrics(sae=runs/sae, layer=2, tokens=1234, fvu=0.25, l0=3")


def test_the_table_has_every_number(found: Metrics) -> None:
    frame = found.to_frame()
    assert list(frame.loc["fvu"]) == [0.25, 0.125, 0.5]
    assert frame.loc["dead_latents", "value"] == 2 and frame.loc["dead_latents"].isna().sum() == 2
    assert {"seen_in_training", "layer", "density_histogram"}.isdisjoint(frame.index)


def test_the_chart_has_what_lies_between_0_and_1(found: Metrics) -> None:
    svg = found.plot().svg
    assert "0.25 [0.12, 0.50]" in svg and "0.25 [0.00, 0.50]" in svg  # cut at 0
    assert svg.count("<rect") == 2 and "1,234 tokens" in svg
