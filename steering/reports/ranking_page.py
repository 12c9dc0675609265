"""The page of a ranking, made from ranking.json alone."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saesteer.checkpoints.files import plain, write_text
from saesteer.checkpoints.provenance import versions
from saesteer.sae.reports.page import render
from saesteer.sae.reports.parts import box, charts, note, table
from saesteer.sae.reports.svg import Bar, bars
from saesteer.steering.evaluation.intervals import wilson
from saesteer.steering.reports.sweep_charts import stability_section

FEW_CONTENTS = 10
CHARTED = 10
"""Latents whose firing rates are drawn; the table has all of the plan."""


def save_ranking_page(folder: str | Path, document: Mapping[str, Any], command: str = "") -> Path:
    """Write `ranking.html` beside the ranking; returns its path.

    Args:
        document: what `ranking_document` or `save_ranking` returns.
        command: the command that made the ranking, shown at the foot of the page.
    """
    page = Path(folder) / "ranking.html"
    write_text(page, render_ranking(plain(document), command))
    return page


def render_ranking(document: Mapping[str, Any], command: str = "") -> str:
    """The page: what was found beside what chance finds, and the latents of the plan."""
    task, model = document["task"]["name"], document["model"]
    parts = [
        note(
            f"{model['name']}, layer {document['layer']} ({document['site']}); by "
            f"{document['by']}, read {document['read']}; {document['positives']} positive and "
            f"{document['negatives']} negative samples."
        ),
        *_boxes(document),
        "<h2>Latents of the plan</h2>",
        note(
            "on: share of instructed samples in which the latent is active; off: of plain ones. mu "
            "and sigma: where it is active. Lens: the tokens that its direction makes likelier."
        ),
        table(
            ["rank", "latent", document["by"], "on", "off", "mu", "sigma", "q", "lens"],
            [_row(row) for row in document["latents"]],
        ),
    ]
    first = document["latents"][:CHARTED]
    if first:
        samples = {"positive": document["positives"], "negative": document["negatives"]}
        figures = [
            (
                f"active in {kind} samples",
                bars([_bar(row, kind, n) for row in first], f"Latents in {kind} samples"),
            )
            for kind, n in samples.items()
            if n
        ]
        parts.append(charts(figures))
    parts.append(stability_section(document["stability"], document["shuffled"]))
    software = versions()
    provenance = {
        **({"command": command} if command else {}),
        "date": time.strftime("%Y-%m-%d"),
        "model": f"{model['name']}, weights {model['hash']}",
        "SAE": f"{document['sae']['source']}, SHA-256 {str(document['sae']['sha256'])[:16]}",
        **{name: software[name] for name in ("saesteer", "torch", "transformers")},
    }
    return render(
        "parts.html",
        title=f"Ranking: {task}",
        provenance=provenance,
        refresh=None,
        parts=parts,
    )


def _boxes(document: Mapping[str, Any]) -> list[str]:
    """Whether the ranking found more than chance, and what to be careful about."""
    found, chance, boxes = document["discoveries"], document["shuffled"], []
    title = f"{found['latents']:,} latents differ at a false discovery rate of {found['max_fdr']:g}"
    if chance:
        best = chance["best"]
        clear = best["real"] > best["highest"]
        said = (
            f"The best {chance['by']} is {best['real']:.3g}; with labels shuffled within each "
            f"content it is {best['mean']:.3g} on average and at most {best['highest']:.3g} "
            f"({chance['shuffles']} times)."
        )
        verdict = "more than chance finds" if clear else "no more than chance finds"
        boxes.append(box("good" if clear else "bad", f"{title}: {verdict}", [said]))
    else:
        boxes.append(box("plain", title, ["Chance was not tried (shuffles 0)."]))
    used, given = document["contents_used"]
    if used < FEW_CONTENTS:
        boxes.append(
            box("warn", f"Only {used} of {given} contents", ["More contents make a surer ranking."])
        )
    if document["replies_used"]:
        passed, answered = document["replies_used"]
        boxes.append(note(f"{passed} of {answered} instructed replies pass the check and count."))
    return boxes


def _row(row: Mapping[str, Any]) -> list[str]:
    figures = [row[key] for key in ("score", "rate_positive", "rate_negative", "mu", "sigma", "q")]
    shown = ["–" if value is None else f"{value:.3g}" for value in figures]
    lens = " ".join(repr(token) for token in row["lens"])
    return [str(row["rank"]), str(row["id"]), *shown, lens]


def _bar(row: Mapping[str, Any], kind: str, n: int) -> Bar:
    rate = row[f"rate_{kind}"]
    low, high = wilson(round(rate * n), n)
    colour = 0 if kind == "positive" else 6
    return Bar(f"latent {row['id']}", rate, low, high, colour)
