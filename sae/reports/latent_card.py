"""A latent's card as HTML: what is known of it as text and figures, for its page and notebooks."""

from collections.abc import Callable, Mapping
from functools import cache
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from saesteer.sae.reading.pieces import visible
from saesteer.sae.reports.page import fragment
from saesteer.sae.reports.svg import histogram

if TYPE_CHECKING:
    from saesteer.sae.reading.card import Context, Description, LatentCard

Link = Callable[[int], str | None]
"""The page of a latent; None where it has none."""

OFFLINE_NOTE = "its most telling tokens by log-odds; no model was asked"
MODEL_NOTE = "described by {}"


def card_html(card: "LatentCard") -> str:
    """The card with its style, as a notebook shows it."""
    inside = fragment("latent_card.html", card=shown(card, lambda latent: None))
    return f"<style>{asset('latents.css')}</style>{inside}"


@cache
def asset(name: str) -> str:
    """The text of a file beside the templates."""
    return files("saesteer.sae.reports.templates").joinpath(name).read_text(encoding="utf-8")


def shown(card: "LatentCard", link: Link) -> Mapping[str, Any]:
    """What the template shows of a card. `link` gives the page of another latent."""
    from markupsafe import Markup

    most = abs(card.max) or 1.0
    steered = card.steered
    picture = histogram(
        card.histogram, f"Activations of latent {card.id}", x_label="activation"
    ) if card.histogram else ""  # fmt: skip
    return {
        "id": card.id,
        "descriptions": [_description(one) for one in card.descriptions],
        "stats": [
            ("density", percent(card.density)),
            ("fires on", f"{card.fired:,} of {card.rows:,} tokens"),
            ("mean when active", number(card.mean)),
            ("deviation", number(card.std)),
            ("strongest", number(card.max)),
        ],
        "histogram": Markup(picture),
        "top": [_context(one, most) for one in card.top],
        "quantiles": [
            {
                "name": f"{number(part.low)} to {number(part.high)}",
                "contexts": [_context(one, most) for one in part.contexts],
            }
            for part in reversed(card.quantiles)
        ],
        "lens_up": [_chip(one.token, f"{one.logit:+.2f}") for one in card.lens_up],
        "lens_down": [_chip(one.token, f"{one.logit:+.2f}") for one in card.lens_down],
        "telling": [_chip(one.token, f"{one.fired} of {one.rows}") for one in card.telling],
        "near": [
            {"id": one.id, "figure": f"{one.value:.2f}", "href": link(one.id)} for one in card.near
        ],
        "cofires": [
            {"id": one.id, "figure": f"{one.value:.2f}, {one.together:,}", "href": link(one.id)}
            for one in card.cofires
        ],
        "tasks": [
            {
                "task": one.task,
                "rank": one.rank,
                "score": "–" if one.score is None else number(one.score),
                "by": one.by or "–",
                "folder": one.folder,
            }
            for one in card.tasks
        ],
        "steered": steered
        and {
            "dose": f"{steered.dose:g}",
            "prompt": steered.prompt,
            "completion": steered.completion,
            "baseline": steered.baseline,
            "kl": number(steered.kl),
            "raised": [
                _chip(one.token, f"{percent(one.before)} to {percent(one.after)}")
                for one in steered.raised
            ],
        },
    }


def _description(one: "Description") -> dict[str, Any]:
    judged = one.detection
    if judged is None or judged.score is None:
        score = title = ""
    else:
        score = f"{judged.score:.2f}"
        title = (
            f"balanced accuracy on held-out windows: {judged.found} of {judged.positives} in which "
            f"it fires, {judged.refused} of {judged.negatives} in which it does not"
        )
        if judged.unanswered:
            title += f"; {judged.unanswered} without an answer"
    by = OFFLINE_NOTE if one.by == "log-odds" else MODEL_NOTE.format(one.by)
    return {"text": one.text, "by": by, "score": score, "title": title}


def _context(context: "Context", most: float) -> dict[str, Any]:
    """A context as HTML: tokens on which the latent fires in <b>, shaded by how strongly.

    Written here, not by the template: a page has a thousand tokens, and a site thousands of pages.
    """
    from markupsafe import Markup

    parts = []
    for place, (token, act) in enumerate(zip(context.tokens, context.acts, strict=True)):
        text = escape(visible(token), quote=False)
        if not act and place != context.index:
            parts.append(text)
            continue
        names = [name for name, has in (("m", act < 0), ("p", place == context.index)) if has]
        classes = f' class="{" ".join(names)}"' if names else ""
        share = min(1.0, max(0.05, abs(act) / most))
        # A token that is part of a character has no text of its own.
        parts.append(f'<b{classes} style="--A:{share:.2f}" title="{act:.3g}">{text or "·"}</b>')
    return {"act": number(context.act), "html": Markup("".join(parts))}


def _chip(token: str, figure: str) -> dict[str, str]:
    # Spaces at the ends of a token are part of it.
    return {"token": visible(token).replace(" ", "␣"), "figure": figure}


def number(value: float) -> str:
    """A number in three digits."""
    return f"{value:.3g}"


def percent(share: float) -> str:
    """A share of 0 to 1 in percent, in two digits."""
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"
