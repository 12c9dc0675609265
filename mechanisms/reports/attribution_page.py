"""The page of attributions, made from its document alone."""

from collections.abc import Mapping
from html import escape
from typing import Any

from saesteer.mechanisms.reports.page import interval, note, page, table
from saesteer.sae.reports.svg import diverging_map

MAPS = 2
"""Prompts with a whole map of prompt by reply; all have coloured text."""


def render_attribution(document: Mapping[str, Any]) -> str:
    """Means, tests, coloured prompts, and maps of the first."""
    model, settings, summary = document["model"], document["settings"], document["summary"]
    parts = [
        note(
            f"{model['name']} ({model['dtype']}, weights {model['hash']}); "
            f"{len(document['prompts'])} prompts, {document['short']} left out for replies under "
            f"five tokens; method {settings['method']}, target {settings['target']}, seed "
            f"{settings['seed']}."
        ),
        table(
            ["figure", "mean"],
            [
                [name, interval(summary[key]["value"], summary[key]["low"], summary[key]["high"])]
                for name, key in (
                    ("I of the instruction", "score"),
                    ("I of a random span of equal length", "random_score"),
                    (f"log-probability lost without the {settings['ablate']} densest tokens",
                     "drop"),
                    ("lost without as many random tokens", "random_drop"),
                    (f"I where the reply follows ({summary['followed']['n']})", "followed"),
                    (f"I where it does not ({summary['unfollowed']['n']})", "unfollowed"),
                )
            ],
        ),
    ]  # fmt: skip
    found = document["comparison"]
    if found:
        parts += ["<h2>Against the tuned model</h2>", _comparison(found)]
    parts.append("<h2>Prompts</h2>")
    parts.append(note("The darker, the denser; the instruction is underlined."))
    for number, prompt in enumerate(document["prompts"]):
        parts.append(f"<p>{_coloured(prompt)}</p>")
        parts.append(note(f"I {prompt['score']:.3f}; reply: {prompt['reply']}"))
        if number < MAPS:
            label = "attribution of each reply token (columns) to each prompt token (rows)"
            parts.append(
                diverging_map(prompt["scores"], prompt["tokens"], prompt["outputs"], label)
            )
    return page("Attribution", parts)


def _coloured(prompt: Mapping[str, Any]) -> str:
    start, end = prompt["span"]
    words = []
    for place, (token, density) in enumerate(zip(prompt["tokens"], prompt["density"], strict=True)):
        line = "text-decoration:underline;" if start <= place < end else ""
        words.append(
            f'<span style="{line}background:rgba(213,94,0,{0.85 * density:.2f})" '
            f'title="{density:.3f}">{escape(token.replace("Ġ", " ").replace("Ċ", " "))}</span>'
        )
    return "".join(words)


def _comparison(found: Mapping[str, Any]) -> str:
    return note(
        f"{found['tuned']['name']} on the same {found['n']} prompts; replies have "
        f"{found['reply_tokens'][0]:.1f} and {found['reply_tokens'][1]:.1f} tokens on average, "
        "which alone can move I."
    ) + table(
        ["figure", "value"],
        [
            ["I of the base", f"{found['base_score']:.3f}"],
            ["I of the tuned model", f"{found['tuned_score']:.3f}"],
            ["paired difference", interval(found["difference"], found["low"], found["high"])],
            ["sign test", f"{found['above']} up, {found['below']} down, p {found['sign_p']:.2g}"],
            ["Welch, one-sided p", "-" if found["welch_p"] is None else f"{found['welch_p']:.2g}"],
        ],
    )
