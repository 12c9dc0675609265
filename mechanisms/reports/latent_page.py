"""The files of a patch in latents: report.json, report.html and effects.safetensors."""

import json
from html import escape
from pathlib import Path
from typing import Any

import torch

from saesteer.checkpoints.files import write_json, write_tensors, write_text
from saesteer.mechanisms.latents.comparing import LatentDiff
from saesteer.mechanisms.reports.latent_result import LatentResult, order_of
from saesteer.mechanisms.reports.page import interval, lines, note, page, table, warning
from saesteer.sae.reports.svg import Point, cloud

SHOWN = 30


def save_latents(
    folder: str | Path, result: LatentResult, diff: LatentDiff | None = None
) -> dict[str, Any]:
    """Write the result into a folder that exists; returns the document of report.json. `diff` is
    the same latents over whole prompts of both models, where the source is another model."""
    folder = Path(folder)
    document = result.document()
    if diff is not None:
        document["diff"] = diff.document()
    tensors = {
        name: torch.from_numpy(getattr(result, name)).float().contiguous()
        for name in ("site", "latents", "error", "effects", "fast", "changes", "marks")
    }
    axes = {"pairs": json.dumps(list(result.groups)), "latents": json.dumps(list(result.ids))}
    write_tensors(folder / "effects.safetensors", tensors, axes)
    write_text(folder / "report.html", render_latents(result, diff))
    write_json(folder / "report.json", document)
    return document


def render_latents(result: LatentResult, diff: LatentDiff | None = None) -> str:
    """The page of a patch in latents."""
    model, sae, shares = result.model, result.sae, result.shares
    fvu = [f"{x:.2f}" if x is not None else "-" for x in result.unexplained]
    parts = [
        note(
            f"{model['name']} ({model['dtype']}, weights {model['hash']}); SAE {sae['source']}, "
            f"{sae['d_sae']} latents at {sae['site']} {sae['layer']}, FVU {fvu[0]} on the base "
            f"runs' states and {fvu[1]} on the source runs'; {len(result.groups)} pairs; metric "
            f"{result.metric}; seed {result.config.seed}; {result.seconds:.0f} s."
        ),
        note(
            "A latent's effect is the metric once its activation alone is the source run's; the "
            "error is what the SAE leaves of the state, a node of its own. All latents and the "
            "error together are the whole site. Effects of sets need not add up."
        ),
        *map(warning, result.warnings()),
        "<h2>Shares of the site's effect</h2>",
        table(
            ["put in", "share"],
            [
                [name, interval(shares[key].value, shares[key].low, shares[key].high, 2)]
                for name, key in (
                    ("all latents", "latents"),
                    ("the error alone", "error"),
                    (f"the {len(result.chosen)} chosen latents", "chosen"),
                    (f"the same on {len(result.held_out)} held-out runs", "held out"),
                )
            ],
        ),
        note(f"Chosen: {order_of(result.chosen)}. The whole site moves the metric by "
             f"{result.site.mean():+.3f}."),
        "<h2>How many latents does it take?</h2>",
        lines(
            [Point(float(row["k"]), row["held_out"], row["order"], f"{row['k']}")
             for row in result.curve_table()],
            "share of the site's effect by number of latents, held-out runs", "latents",
        ),
        "<h2>Do latents that carry also mark?</h2>",
        note(
            f"In common: {', '.join(f'{k} {v:.2f}' for k, v in result.overlap.items())}. t is that "
            "of a latent's change over pairs: how well it tells the runs apart."
        ),
        cloud(
            [Point(abs(row["t"]) if abs(row["t"]) < 1e6 else 1e6, abs(row["effect"]), "",
                   str(row["latent"])) for row in result.summary],
            "effect of a latent against how well it marks", x_label="|t|", y_label="|effect|",
        ),
        "<h2>Latents</h2>",
        table(
            ["latent", "effect", "estimate", "change", "t", "carries", "marks", "chosen"],
            [
                [str(row["latent"]), interval(row["effect"], row["low"], row["high"]),
                 interval(row["fast"], None, None), f"{row['change']:+.3g}", f"{row['t']:.3g}",
                 str(row["carries"]), str(row["marks"]), "yes" if row["chosen"] else ""]
                for row in result.summary[:SHOWN]
            ],
        ),
    ]  # fmt: skip
    if diff is not None:
        parts += _diff(result, diff)
    return page(escape("Patches of latents"), parts)


def _diff(result: LatentResult, diff: LatentDiff) -> list[str]:
    effects = {row["latent"]: row["effect"] for row in result.summary}
    return [
        f"<h2>{escape(diff.names[0])} against {escape(diff.names[1])}</h2>",
        note(
            f"Over {diff.n_tokens} tokens of the clean prompts; FVU {diff.unexplained[0]:.2f} and "
            f"{diff.unexplained[1]:.2f}. Beta is how much of a latent's direction each model has "
            "where the tuned model's is active: near 0 in the base, it is new; else louder."
        ),
        *map(warning, diff.warnings()),
        table(
            ["latent", "effect", "active, base", "tuned", "change", "p", "beta, base", "tuned"],
            [
                [str(row["latent"]), interval(row["effect"], None, None),
                 *(f"{x:.2f}" for x in row["rate"]), interval(row["change"], row["low"],
                                                              row["high"]),
                 f"{row['p_adjusted']:.2g}",
                 *("-" if x is None else f"{x:.2f}" for x in row["beta"])]
                for row in diff.summary(effects)[:SHOWN]
            ],
        ),
    ]  # fmt: skip
