"""The page of what `find` found, for one task or several, made from the contents of find.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from saesteer.checkpoints.provenance import versions
from saesteer.sae.reading.found_pages import link
from saesteer.sae.reports.page import render
from saesteer.sae.reports.svg import Bar, bars
from saesteer.steering.grades.grade import GRADES

FEW = 30
"""Fewer contents than this are called few."""
_TRIED = 12
_ORDER = (
    "unsteered", "prompted", "mean_difference", "steered", "directions_at_saes", "steered_latents",
    "tail_only", "replies_only", "random", "steered+prompted",
)  # fmt: skip
"""Arms in the order, and with the colours, that every page gives them."""
_WORDS = {
    "mean_difference": "mean difference, best single layer",
    "steered": "steered",
    "directions_at_saes": "directions at the SAEs' layers",
    "steered_latents": "steered, in latents",
    "tail_only": "tail alone",
    "replies_only": "replies alone",
    "random": "random directions",
    "steered+prompted": "steered and prompted",
}


def arm_words(name: str) -> str:
    """What an arm is called on pages and screens."""
    return _WORDS.get(name, name)


def verdict(document: Mapping[str, Any]) -> tuple[str, bool]:
    """Success and damage in one sentence, and whether it is a warning.

    A warning: the plan is over its budget, or follows less than half as often as prompting.
    """
    arms = document["arms"]
    said = []
    for name in ("steered", "steered_latents", "prompted", "unsteered"):
        if name in arms:
            rates = ", ".join(
                f"{grade} {rate}"
                for grade in ("follows", "strict")
                if (rate := _rate(arms[name][grade])) != "–"
            )
            said.append(f"{arm_words(name)}: {rates}")
    harm = [damage_words(document, name) for name in document["damage"]]
    text = f"{'; '.join(said)}. Unrelated questions: {'; '.join(harm)}."
    follows = [arms[name]["follows"][0] for name in ("steered", "prompted")]
    return text, bool(document["over_budget"]) or follows[0] < follows[1] / 2


def damage_words(document: Mapping[str, Any], name: str) -> str:
    """What a plan does to unrelated questions, in words."""
    damage = document["damage"][name]
    conditional = document["when"] is not None
    who = {
        "steered": "with its condition" if conditional else "steered",
        "steered_without_condition": "without it",
        "steered_latents": "in latents",
    }[name]
    cost = max(damage["delta_ce"], 0.0) + 0.0
    return (
        f"{damage['right_to_wrong']} of {damage['right_before']} right answers lost "
        f"({cost:.2f} nats a token) {who}"
    )


def render_find(
    documents: Sequence[Mapping[str, Any]],
    title: str = "Found",
    pages: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """A self-contained page: for each task the verdict, rates, answers, settings and latents.

    `pages` are those of latents that are there already, as `found_pages.latent_pages` tells them.
    """
    software = versions()
    model = documents[0]["model"]
    weights = f"{model['name']}, {model['dtype']}, weights {model['hash']}"
    provenance = {
        "model": weights,
        **{name: software[name] for name in ("saesteer", "torch", "transformers")},
    }
    tasks = [_section(document, pages or {}) for document in documents]
    return render(
        "find.html", title=title, provenance=provenance, refresh=None, tasks=tasks,
        definitions=documents[0]["definitions"], model=weights,
    )  # fmt: skip


def _section(document: Mapping[str, Any], pages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    arms = {name: document["arms"][name] for name in _ORDER if name in document["arms"]}
    text, bad = verdict(document)
    n = next(iter(arms.values()))["n"]
    tried = sorted(document["tried"], key=lambda row: (-row["n"], -row["value"]))[:_TRIED]
    latents = document["latents"]
    return {
        "name": document["task"]["name"],
        "verdict": text,
        "bad": bad,
        "over": document["over_budget"],
        "n": n,
        "few": n < FEW,
        "minutes": document["seconds"] / 60,
        "chart": _chart(arms, document["task"]["name"]),
        "arms": [
            {"name": arm_words(name), "rates": [interval_words(arm[grade]) for grade in GRADES]}
            for name, arm in arms.items()
        ],
        "grades": GRADES,
        "answers": _answers(arms),
        "tried": [
            {
                "says": row["says"],
                "rates": [_rate(row[grade]) for grade in GRADES],
                "value": f"{row['value']:.3f}",
                "n": row["n"],
                "answer": row["samples"][0]["answer"] if row["samples"] else "",
            }
            for row in tried
        ],
        "all_tried": len(document["tried"]),
        "latents": None if latents is None else _latents(latents, pages),
    }


def _chart(arms: Mapping[str, Mapping[str, Any]], task: str) -> str:
    rows = [
        Bar(arm_words(name), value, low, high, colour=_ORDER.index(name), group=grade)
        for grade in GRADES
        for name, arm in arms.items()
        if arm[grade] is not None
        for value, low, high in [arm[grade]]
    ]
    return bars(rows, f"{task}: rates of each arm with 95 % Wilson intervals")


def _answers(arms: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The sampled answers of every arm, by content."""
    by_content: dict[str, list[dict[str, Any]]] = {}
    for name, arm in arms.items():
        for sample in arm["samples"]:
            failed = [grade for grade in GRADES if sample.get(grade) is False]
            passed = [grade for grade in GRADES if sample.get(grade) is True]
            by_content.setdefault(sample["content"], []).append(
                {
                    "arm": arm_words(name),
                    "answer": sample["answer"].strip() or "(nothing)",
                    "passed": ", ".join(passed) or "none",
                    "failed": bool(failed),
                }
            )
    return [{"content": content, "arms": rows} for content, rows in by_content.items()]


def _latents(latents: Mapping[str, Any], pages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    kept = latents["effect_kept"]
    rows = [
        {
            "layer": layer["layer"],
            "phase": phase,
            "count": len(layer[phase]["latents"]),
            "share": f"{layer[phase]['squared_length_explained']:.2f}",
            "named": [
                {
                    "id": number,
                    "lens": " ".join(lens),
                    "page": link(pages, layer.get("sae_sha256", ""), number),
                }
                for number, lens in zip(
                    layer[phase]["latents"], layer[phase].get("lens", ()), strict=False
                )
            ],
        }
        for layer in latents["layers"]
        for phase in ("tail", "replies")
    ]
    return {
        "count": latents["latents"],
        "kept": "no effect to keep" if kept is None else f"{kept:.0%} of the directions' effect",
        "rows": rows,
    }


def _rate(value: Sequence[float] | None) -> str:
    return "–" if value is None else f"{value[0]:.2f}"


def interval_words(value: Sequence[float] | None) -> str:
    """A rate with its interval; a dash where no program can tell."""
    return "–" if value is None else f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"
