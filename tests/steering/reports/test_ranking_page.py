"""The page of a ranking shows what ranking.json holds, and whether chance finds as much."""

import copy
from pathlib import Path
from typing import Any

import pytest

from saesteer.steering.reports.ranking_page import render_ranking, save_ranking_page

DOCUMENT: dict[str, Any] = {
    "task": {"name": "french", "hash": "h"},
    "model": {"name": "tiny<1>", "hash": "abc"},
    "sae": {"source": "runs/sae", "sha256": "0123456789abcdef0123"},
    "layer": 2, "site": "resid_post", "by": "saif", "read": "last", "position": "post",
    "positives": 24, "negatives": 12, "replies_used": [5, 8],
    "discoveries": {"max_fdr": 0.1, "latents": 1234},
    "stability": {"by": "saif", "k": 3},
    "shuffled": {
        "by": "saif", "test": "mcnemar", "k": 3, "shuffles": 20,
        **{
            name: {"real": 0.92, "mean": 0.11, "highest": 0.19}
            for name in ("best", "last", "best_auroc", "discoveries", "overlap")
        },
    },
    "contents_used": [48, 96],
    "latents": [
        {"rank": 1, "id": 21, "score": 0.875, "rate_positive": 0.75, "rate_negative": 0.125,
         "mu": 12.5, "sigma": 3.25, "q": None, "lens": [" <le>", " la"]},
    ],
}  # fmt: skip


def test_every_figure_is_shown_and_text_is_escaped() -> None:
    page = render_ranking(DOCUMENT, "saesteer rank --sae runs/sae")
    for figure in (
        "0.875", "12.5", "3.25", "&#x27; &lt;le&gt;&#x27;", "tiny&lt;1&gt;", "latent 21",
        "1,234 latents differ at a false discovery rate of 0.1: more than chance finds",
        "5 of 8 instructed replies", "saesteer rank --sae runs/sae", "SHA-256 0123456789abcdef",
        # Wilson intervals of 18 of 24 and of 2 of 12 (0.125 of 12, rounded to whole samples)
        "0.75 [0.55, 0.88]", "0.12 [0.05, 0.45]",
    ):  # fmt: skip
        assert figure in page, figure
    assert "<script" not in page and "<le>" not in page


@pytest.mark.parametrize(("highest", "tone"), [(0.19, "good"), (0.95, "bad")])
def test_chance_is_told(highest: float, tone: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    document["shuffled"]["best"]["highest"] = highest
    assert f'class="box tone-{tone}"' in render_ranking(document)


def test_few_contents_and_no_shuffles(tmp_path: Path) -> None:
    document = {**DOCUMENT, "contents_used": [3, 8], "shuffled": None}
    page = save_ranking_page(tmp_path, document).read_text(encoding="utf-8")
    assert "Only 3 of 8 contents" in page and "Chance was not tried" in page
