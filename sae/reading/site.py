"""The pages of latents: a list with search and filters, and a page each, for any browser.

Everything is in files beside each other and opens from disk: no server, no network. Each page can
be read without its script.
"""

import json
import math
from pathlib import Path
from typing import Any

from saesteer.checkpoints.durable import writing
from saesteer.checkpoints.files import write_json, write_text
from saesteer.checkpoints.provenance import versions
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.reading.card import LatentCard, short
from saesteer.sae.reading.neuronpedia import Names, NeuronpediaExport
from saesteer.sae.reading.pieces import visible
from saesteer.sae.reading.result import Latents
from saesteer.sae.reports.latent_card import asset, number, shown
from saesteer.sae.reports.page import render
from saesteer.sae.reports.svg import histogram

SCHEMA_VERSION = 1
_AROUND = 9
"""Tokens beside the strongest one that the list shows."""


def save_latents(
    found: Latents,
    folder: str | Path,
    names: Names | None = None,
    *,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write `index.html` with a page for each latent, `latents.jsonl`, `latents.json` (what was
    read, and of what) and `neuronpedia/`, the export that Neuronpedia imports.

    `index.html` and `latents.json` come last: where they are, the rest is whole.

    Args:
        names: what the export calls model, source and creator.

    Returns:
        What `latents.json` holds.
    """
    folder = Path(folder)
    pages = folder / "latents"
    pages.mkdir(parents=True, exist_ok=True)
    for name in ("latents.css", "latents.js"):
        write_text(folder / name, asset(name))
    has_page = set(found.ids)
    foot = _provenance(found)
    rows: list[list[Any]] = []
    export = NeuronpediaExport(folder / "neuronpedia", found, names or Names())
    progress("latents: write", 0, len(found.ids), "pages")
    lines = folder / "latents.jsonl"
    with writing(lines), open(lines.with_suffix(".jsonl.tmp"), "w", encoding="utf-8") as out:
        for place, card in enumerate(found):
            row = card.row()
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            before = found.ids[place - 1] if place else None
            after = found.ids[place + 1] if place + 1 < len(found.ids) else None
            page = render(
                "latent.html",
                title=f"Latent {card.id}: {card.description.text}",
                provenance=foot,
                refresh=None,
                before=before,
                after=after,
                card=shown(card, lambda other: f"{other}.html" if other in has_page else None),
            )
            (pages / f"{card.id}.html").write_text(page, encoding="utf-8")
            export.add(card, row)
            rows.append(_index_row(card))
            progress("latents: write", place + 1, len(found.ids), "pages")
    lines.with_suffix(".jsonl.tmp").replace(lines)
    export.close()
    data = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
    write_text(folder / "latents-data.js", f"window.LATENTS={data};\n")
    write_text(folder / "index.html", _index(found, foot))
    document = {
        "schema_version": SCHEMA_VERSION,
        **found.facts,
        "latents": len(found.ids),
        "ids": found.ids,
        "page": str(folder / "index.html"),
        "neuronpedia": str(export.folder),
    }
    write_json(folder / "latents.json", document)
    return document


def _index_row(card: LatentCard) -> list[Any]:
    """What the list shows and searches of a latent: as latents.js reads it."""
    judged = card.description.detection
    before = peak = after = ""
    if card.top:
        best = card.top[0]
        first = max(0, best.index - _AROUND)
        before = visible("".join(best.tokens[first : best.index]))
        peak = visible(best.tokens[best.index])
        after = visible("".join(best.tokens[best.index + 1 : best.index + 1 + _AROUND]))
    searched = [one.token for one in card.telling] + [one.token for one in card.lens_up]
    searched += ["".join(context.tokens) for context in card.top[:2]]
    return [
        card.id,
        short(card.density),
        short(card.max),
        short(card.mean),
        None if judged is None or judged.score is None else short(judged.score),
        [f"{one.task} {one.rank}" for one in card.tasks],
        card.description.text,
        before,
        peak,
        after,
        "\n".join(searched),
    ]


def _index(found: Latents, foot: dict[str, Any]) -> str:
    from markupsafe import Markup

    facts, tally = found.facts, found.collected.tally
    density = tally.density().cpu()
    alive = density[density > 0].log10()
    low = math.floor(2 * float(alive.min())) if len(alive) else -1
    counts = [0] * max(1, -low)
    for value in alive.tolist():
        counts[min(len(counts) - 1, math.floor(2 * value) - low)] += 1
    bins = [
        (10 ** ((low + i) / 2), 10 ** ((low + i + 1) / 2), count) for i, count in enumerate(counts)
    ]
    dead = f"{facts['dead']:,} of {len(density):,} latents never fire"
    summary = (
        f"{len(found.ids):,} of {len(density):,} latents of {facts['sae']['source']}, at layer "
        f"{facts['layer']} ({facts['site']}) of {facts['model']['name']}, on "
        f"{tally.rows:,} tokens. {number(facts['l0'])} fire on a token; {dead} on these."
    )
    return render(
        "latents_index.html",
        title="Latents",
        provenance=foot,
        refresh=None,
        summary=summary,
        chart=Markup(
            histogram(
                bins, "Latents by density", x_label="share of the tokens (density)", width=560.0
            )
        ),
        chart_note=f"All latents of the SAE by the share of tokens on which each fires; {dead}.",
        any_tasks=bool(found.tasks),
        some=found.ids[:200],
    )


def _provenance(found: Latents) -> dict[str, Any]:
    facts, software = found.facts, versions()
    excluded = facts["excluded"]
    return {
        "SAE": f"{facts['sae']['source']} ({str(facts['sae']['sha256'])[:12]})",
        "model": f"{facts['model']['name']} ({str(facts['model']['hash'])[:12]}, "
        f"{facts['model']['dtype']})",
        "read at": facts["hook_name"],
        "text": f"{', '.join(found.config.text.data)}, {facts['tokens']:,} tokens in contexts of "
        f"{facts['context']}; left out {excluded['special']:,} special tokens, "
        f"{excluded['template']:,} of templates, {excluded['sinks']:,} sinks",
        "co-firing": f"counted on {facts['cofiring_rows']:,} tokens",
        "saesteer": software["saesteer"],
        "torch": software["torch"],
    }
