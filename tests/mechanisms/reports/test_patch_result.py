"""Figures of a grid: intervals, shares, adjusted p; its table, its document and its page."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from saesteer.mechanisms.config import PatchConfig
from saesteer.mechanisms.patching.agreement import agreement
from saesteer.mechanisms.patching.sites import Node
from saesteer.mechanisms.reports.patch_page import render_patch, save_patch
from saesteer.mechanisms.reports.patch_result import Cell, PatchResult


def result(pairs: int = 20, **changes: Any) -> PatchResult:
    drawn = np.random.default_rng(0)
    cells = tuple(Cell(Node("z", layer, head), at) for layer in (1, 3) for head in (0, 2)
                  for at in ("last", "<a>"))  # fmt: skip
    effects = drawn.normal(0, 0.1, (pairs, 8))
    effects[:, 2] -= 2
    given: dict[str, Any] = {
        "model": {"name": "m", "hash": "0", "dtype": "float32", "n_layers": 4},
        "config": PatchConfig(sites=("z",), at=("last", "<a>")),
        "metric": "logit-diff", "cells": cells, "effects": effects, "fast": None,
        "agreement": None, "base": np.full(pairs, 3.0), "source": np.full(pairs, -1.0),
        "groups": tuple(str(i) for i in range(pairs)),
    }  # fmt: skip
    return PatchResult(**{**given, **changes})


def fast_result() -> PatchResult:
    plain = result()
    exact = plain.effects.copy()
    exact[:, 4:] = np.nan
    compared = agreement(plain.effects[:, :4].mean(0), -plain.effects[:, :4].mean(0))
    return result(
        effects=exact,
        fast=-plain.effects,
        agreement=compared,
        config=PatchConfig(sites=("z",), at=("last", "<a>"), fast="atp"),
    )


def test_the_summary() -> None:
    rows = result().summary
    best = rows[2]
    assert best["name"] == "z 1.2 at last" and best["low"] < best["effect"] < best["high"] < -1.9
    assert best["share"] == pytest.approx(best["effect"] / -4)
    assert best["share_low"] < best["share"] < best["share_high"]
    # 20 of 20 groups are below 0: 2 / 2^20, times 8 cells over rank 1.
    assert best["p_adjusted"] == pytest.approx(8 * 2 / 2**20)
    assert all(row["p_adjusted"] > 0.05 for row in rows if row is not best)
    frame = result().to_frame()
    assert len(frame) == 8 and list(frame["effect"]) == [row["effect"] for row in rows]


def test_few_groups_give_no_interval() -> None:
    few = result(groups=("a", "b") * 10)
    assert few.summary[0]["low"] is None and few.summary[0]["p_adjusted"] is None
    assert "2 groups are fewer than 8" in few.warnings()[0]


def test_equal_runs_have_no_share() -> None:
    assert result(source=np.full(20, 3.0)).summary[0]["share"] is None


def test_maps_are_blocks_by_heads() -> None:
    maps = result().maps()
    assert [title for title, *_ in maps] == ["z at last", "z at <a>"]
    _, rows, columns, values = maps[0]
    assert (rows, columns, values.shape) == (["1", "3"], ["0", "2"], (2, 2))
    assert values[0, 1] == result().summary[2]["effect"]


def test_a_shortcut_is_shown_with_its_agreement() -> None:
    found = fast_result()
    assert [row["exact"] for row in found.summary] == [True] * 4 + [False] * 4
    assert found.summary[7]["effect"] == pytest.approx(found.fast[:, 7].mean())  # type: ignore[index]
    assert "orders nodes unlike exact patches (Spearman -1.00)" in found.warnings()[0]
    page = render_patch(found)
    assert "How good the shortcut is" in page and "Spearman -1.00" in page


def test_the_files(tmp_path: Path) -> None:
    document = save_patch(tmp_path, fast_result())
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["cells"][2] == document["cells"][2] and stored["agreement"]["nodes"] == 4
    page = (tmp_path / "report.html").read_text()
    assert "&lt;a&gt;" in page and "at <a>" not in page and "<script" not in page
    assert page.count("<svg") == 3 and "http" not in page.replace("http://www.w3.org", "")
    with safe_open(tmp_path / "effects.safetensors", "pt") as file:
        assert file.get_tensor("effects").shape == file.get_tensor("fast").shape == (20, 8)
        assert json.loads(file.metadata()["cells"])[2] == ["z", 1, 2, "last"]
