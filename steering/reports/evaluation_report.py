"""The report of an evaluation: a JSON document, and a self-contained page of the same figures.

The page is made from the document alone, so nothing in it can differ from `report.json`.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from saesteer.checkpoints.provenance import versions
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.reading.found_pages import link
from saesteer.sae.reports.page import render
from saesteer.sae.reports.parts import charts, contents, note, section, table
from saesteer.sae.reports.svg import Bar, Point, bars, scatter
from saesteer.steering.evaluation.compare import Comparison, comparison_document
from saesteer.steering.evaluation.intervals import difference_text, rate_text
from saesteer.steering.evaluation.rates import Rate
from saesteer.steering.grades.grade import DEFINITIONS, GRADES
from saesteer.steering.reports.answers import answers_section, answers_style
from saesteer.steering.reports.answers import grade_words as grade_words
from saesteer.steering.reports.sweep_charts import dose_response, pareto_chart, stability_section
from saesteer.steering.reports.verdict import verdict

SCHEMA_VERSION = 2

GRADED_BY = "programs (not a language model)"


def report_document(
    lm: LanguageModel,
    comparisons: Sequence[Comparison],
    *,
    sweeps: Mapping[str, Any] | None = None,
    stability: Mapping[str, Any] | None = None,
    shuffled: Mapping[str, Any] | None = None,
    ifeval: Mapping[str, Any] | None = None,
    judge: str | None = None,
) -> dict[str, Any]:
    """Everything measured, JSON-ready.

    Args:
        sweeps: documents of `Sweep.document`, by task name.
        stability: the `stability` of `ranking.json`, by task name; `shuffled` likewise.
        ifeval: what `evaluate_ifeval` returns.
        judge: the name of the language model that graded as well.
    """
    tasks = []
    for one in comparisons:
        document = comparison_document(one)
        document["sweep"] = (sweeps or {}).get(one.task.name)
        document["stability"] = (stability or {}).get(one.task.name)
        document["shuffled"] = (shuffled or {}).get(one.task.name)
        document["answers"] = {arm.name: [a.row() for a in arm.answers] for arm in one.arms}
        tasks.append(document)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {"name": lm.name, "hash": lm.fingerprint, "dtype": str(lm.dtype).split(".")[-1]},
        "graded_by": GRADED_BY,
        "judge": judge,
        "made": {"date": time.strftime("%Y-%m-%d"), "versions": versions(), "command": None},
        "tasks": tasks,
        "ifeval": ifeval,
    }


# --- the page ------------------------------------------------------------------------------------

_KIND_COLOURS = {
    "unsteered": 6,
    "prompted": 2,
    "steered": 0,
    "steered+prompted": 5,
    "random": 7,
    "meandiff": 4,
    "logit-bias": 3,
}


def render_html(document: Mapping[str, Any]) -> str:
    """The page: no script, no font, nothing from a network."""
    model, tasks = document["model"], document["tasks"]
    names = ", ".join(task["task"]["name"] for task in tasks) or "IFEval"
    judge = f"; also graded by the language model {document['judge']}" if document["judge"] else ""
    entries = [(task["task"]["name"], f"task-{i}") for i, task in enumerate(tasks)]
    if document.get("ifeval"):
        entries.append(("IFEval", "ifeval"))
    graded = f"Graded by {document['graded_by']}{judge}; {model['name']} in {model['dtype']}."
    parts = [note(graded)]
    if len(entries) > 1:
        parts.append(contents(entries))
    if len(tasks) > 1:
        parts.append(_overview(tasks))
    pages = document.get("latent_pages", {})
    parts += [_task_section(task, i, pages) for i, task in enumerate(tasks)]
    if document.get("ifeval"):
        parts.append(_ifeval_section(document["ifeval"]))
    words = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in DEFINITIONS.items())
    parts.append(f"<h2>What the grades mean</h2><dl>{words}</dl><p>Intervals are 95 %.</p>")
    return render(
        "report.html",
        title=f"Steering evaluation: {names}",
        provenance=_provenance(document),
        refresh=None,
        style=answers_style(max((len(task["arms"]) for task in tasks), default=0)),
        parts=parts,
    )


def _provenance(document: Mapping[str, Any]) -> dict[str, Any]:
    """Where the figures come from; reports from before this was recorded say less."""
    model, made = document["model"], document.get("made") or {}
    software = made.get("versions") or {}
    known = {name: software.get(name) for name in ("saesteer", "torch", "transformers")}
    found = {
        "command": made.get("command"),
        "date": made.get("date"),
        "model": f"{model['name']}, {model['dtype']}, weights {model['hash']}",
        **known,
    }
    return {name: value for name, value in found.items() if value}


def _overview(tasks: Sequence[Mapping[str, Any]]) -> str:
    kinds = ("unsteered", "prompted", "steered", "random", "meandiff", "logit-bias")
    rows = []
    for task in tasks:
        for kind in kinds:
            arms = [arm for arm in task["arms"] if arm["kind"] == kind]
            shown = [(arm["name"], arm["success"]) for arm in arms]
            if kind == "random" and arms:
                shown = [("random latents", _pooled(task, arms))]
            rows += [
                _bar(name, rate, _KIND_COLOURS[kind], task["task"]["name"]) for name, rate in shown
            ]
    return "<h2>All tasks, success</h2>" + bars(rows, "Success by task and arm", 358.0)


def _pooled(task: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Success of several arms as one, their draws counted like seeds."""
    names = arms[0]["success"]["measure"].split(" and ")
    rows = [row for arm in arms for row in task["answers"][arm["name"]]]
    hits = [all(row[name] for name in names) for row in rows]
    return dataclasses.asdict(Rate.of(hits, len(arms) * len(task["seeds"])))


def _bar(label: str, rate: Mapping[str, Any], colour: int, group: str = "") -> Bar:
    return Bar(label, rate["value"], rate["low"], rate["high"], colour, group)


def _task_section(task: Mapping[str, Any], place: int, pages: Mapping[str, Any]) -> str:
    facts = task["task"]
    decoding = task["decoding"]
    how = "greedy" if not decoding["temperature"] else f"temperature {decoding['temperature']:g}"
    parts = [
        section(facts["name"], f"task-{place}"),
        f"<p>“{escape(facts['instruction'])}” · check: {escape(str(facts['check']))} · "
        f"{task['n']} contents of the {escape(task['split'])} split, {len(task['seeds'])} "
        f"seed{'s' if len(task['seeds']) > 1 else ''}, {how}, at most {facts['max_new_tokens']} "
        "new tokens</p>",
        *(finding.html() for finding in verdict(task)),
        "".join(f"<p>{line}</p>" for line in _in_short(task)),
        "<h3>Success</h3>",
    ]
    figures = []
    for measure in GRADES:
        rows = [
            Bar(arm["name"], value, low, high, _KIND_COLOURS.get(arm["kind"], 6))
            for arm in task["arms"]
            if arm[measure] is not None
            for value, low, high in [arm[measure]]
        ]
        missing = task["grades"]["not_graded"].get(measure)
        told = f"{measure}: {missing}" if missing else measure
        if rows:
            figures.append((told, bars(rows, f"{measure} by arm")))
        else:
            parts.append(note(told))
    parts.append(charts(figures))
    parts.append(_grades_table(task["arms"]))
    parts.append(_tests_table(task["tests"]))
    parts.append(_damage_tables(task["arms"]))
    parts.append(_pareto(task))
    if task.get("sweep"):
        parts.append(dose_response(task["sweep"]))
    parts.append(answers_section(task, place))
    parts.append("<h3>What steered</h3>")
    parts += [f"<p>{_plan_line(name, plan, pages)}</p>" for name, plan in task["plans"].items()]
    parts += [note(f"Note: {one}") for one in task["notes"]]
    parts.append(stability_section(task.get("stability"), task.get("shuffled")))
    return "\n".join(parts)


def _in_short(task: Mapping[str, Any]) -> list[str]:
    """Of each steered arm: its rates, and what it gains over the others."""
    lines = []
    for arm in task["arms"]:
        if arm["kind"] != "steered":
            continue
        gaps = [
            f"{difference_text(test)} over {escape(test['theirs'])}"
            for test in task["tests"]
            if test["ours"] == arm["name"] and test["measure"] == arm["success"]["measure"]
        ]
        lines.append(
            f"<b>{escape(arm['name'])}, in short</b>: "
            + ", ".join(f"{name} {grade_text(arm[name])}" for name in GRADES)
            + (f". {escape(arm['success']['measure'])}: {'; '.join(gaps)}." if gaps else ".")
        )
    return lines


def _plan_line(name: str, plan: Mapping[str, Any], pages: Mapping[str, Any]) -> str:
    parts = [_part_words(part, pages) for part in plan.get("parts", [plan])]
    return f"<b>{escape(name)}</b>: {'; '.join(parts)}"


def _part_words(plan: Mapping[str, Any], pages: Mapping[str, Any]) -> str:
    length = "" if plan["delta_norm"] is None else f", ‖delta‖ {plan['delta_norm']:.4g}"
    if plan["unit"] == "rel":
        length = f", ‖delta‖ = {plan['scale']:g} ‖h‖"
    says = plan.get("lens") or [[]] * len(plan["latents"])
    latents = [
        _latent(i, plan, pages)
        + (
            f" ({escape(' '.join(token.strip() or repr(token) for token in lens[:3]))})"
            if lens
            else ""
        )
        for i, lens in zip(plan["latents"][:30], says, strict=False)
    ]
    return (
        f"layer {plan['layer']} ({escape(plan['site'])}), {plan['k']} "
        f"latent{'' if plan['k'] == 1 else 's'}: {', '.join(latents)}; {escape(plan['method'])}, "
        f"scale {plan['scale']:g}, beta {plan['beta']:g}, scope {escape(plan['scope'])}{length}"
    )


def _latent(latent: int, plan: Mapping[str, Any], pages: Mapping[str, Any]) -> str:
    """The number of a latent, with a link to its page where it has one."""
    to = link(pages, (plan.get("sae") or {}).get("sha256", ""), latent)
    return str(latent) if to is None else f'<a href="{escape(to)}">{latent}</a>'


def _figure(value: Any, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _grades_table(arms: Sequence[Mapping[str, Any]]) -> str:
    judged = any("judged" in arm for arm in arms)
    headers = [
        "arm",
        "n",
        *GRADES,
        "degenerate",
        "undetermined",
        "log p, instructed",
        "above plain",
    ]
    headers += ["overlap above floor"]
    headers += ["judge: loose", "judge: strict"] if judged else []
    rows = []
    for arm in arms:
        row = [arm["name"], str(arm["n"]), *(grade_text(arm[name]) for name in GRADES)]
        row += [rate_text(arm["degenerate"]), rate_text(arm["undetermined"])]
        row += [_figure(arm["instructed"][key]) for key in ("log_prob", "gain")]
        row.append(rate_text(arm["overlap"]["above_floor"]))
        if judged:
            found = arm.get("judged")
            row += [rate_text(found[m]) if found else "–" for m in ("loose", "strict")]
        rows.append(row)
    return table(headers, rows) + _thresholds(arms)


def _thresholds(arms: Sequence[Mapping[str, Any]]) -> str:
    """The floors of the grades and of the overlap, in a line each."""
    floors = ", ".join(
        f"{name.replace('_', ' ')} {_floor(value)}"
        for name, value in arms[0]["thresholds"].items()
        if value is not None
    )
    overlaps = ", ".join(f"{arm['name']} {arm['overlap']['floor']:.2f}" for arm in arms)
    return (
        f'<p class="quiet">Thresholds: {escape(floors)}.</p><p class="quiet">Overlap with '
        f"{escape(arms[0]['overlap']['with'])}, no grade: F1 of content words; the floor is what "
        f"95 % of answers reach with the references of other contents: {escape(overlaps)}.</p>"
    )


def _floor(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return " to ".join(f"{one:.3g}" for one in value)
    return f"{value:.3g}"


def grade_text(found: Sequence[float] | None) -> str:
    """A grade's rate with its interval; a dash where it could not be graded."""
    if found is None:
        return "–"
    return rate_text(dict(zip(("value", "low", "high"), found, strict=True)))


def _tests_table(tests: Sequence[Mapping[str, Any]]) -> str:
    if not tests:
        return ""
    rows = [
        [
            f"{test['ours']} − {test['theirs']}",
            test["measure"],
            difference_text(test),
            f"{test['wins']} / {test['losses']}",
            _figure(test["p"], 2),
            _figure(test["p_holm"], 2),
        ]
        for test in tests
    ]
    headers = ["difference", "measure", "mean [95 %]", "more / less", "p", "p, Holm"]
    return (
        "<h3>Paired tests</h3><p>Content by content; paired bootstrap interval, exact sign test "
        "(McNemar's with one seed), Holm over the tests of this task.</p>" + table(headers, rows)
    )


_ANSWERS = {
    "perplexity": "perplexity",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "repetition": "repetition",
    "zlib_ratio": "zlib",
    "truncated": "truncated",
}
_NEUTRAL = {
    "relative_dose": "‖delta‖/‖h‖",
    "kl": "KL(plain‖steered)",
    "kl_reverse": "KL(steered‖plain)",
    "delta_ce": "ΔCE",
    "top1_agreement": "top-1 kept",
    "norm_ratio": "length",
}


def _damage_tables(arms: Sequence[Mapping[str, Any]]) -> str:
    answers = [
        [arm["name"], *(_figure(arm["fluency"].get(key)) for key in _ANSWERS)] for arm in arms
    ]
    neutral = []
    for arm in arms:
        damage = arm["damage"]
        if damage is None:
            continue
        flips = "–"
        if damage.get("right_to_wrong") is not None:
            flips = f"{damage['right_to_wrong']} of {damage['right_before']}"
        neutral.append([arm["name"], *(_figure(damage.get(key)) for key in _NEUTRAL), flips])
    parts = [
        "<h3>Damage</h3><p>The answers: perplexity under the unsteered model, without the prompt; "
        "shares of distinct n-grams; share covered by the most repeated 4-gram; how far zlib "
        "packs them; share cut off at the longest length.</p>",
        table(["arm", *_ANSWERS.values()], answers),
    ]
    if neutral:
        parts += [
            "<p>Neutral questions, teacher forced on the unsteered model's answers, in nats per "
            "token; length: of edited residuals over unedited ones; right → wrong: of the "
            "questions that were answered right before.</p>",
            table(["arm", *_NEUTRAL.values(), "right → wrong"], neutral),
        ]
    return "".join(parts)


def _pareto(task: Mapping[str, Any]) -> str:
    if task.get("sweep"):
        budget = task["sweep"].get("budget")
        over = len(task["sweep"].get("skipped") or ())
        spent = ""
        if budget:
            dotted = ", dotted," if budget["kind"] == "kl" else ""
            spent = (
                f" The budget{dotted} is {escape(budget['kind'])} {budget['limit']:g}; {over} "
                "settings over it answered nothing."
            )
        return (
            "<h3>Success against damage</h3><p>Settings of the sweep on development contents, each "
            "on as many as it came to. Ringed: the one chosen. Dashed: the front, which no setting "
            f"beats in success without more KL.{spent}</p>" + pareto_chart(task["sweep"])
        )
    # The colour of an arm is the same in every chart.
    points = [
        Point(arm["damage"]["kl"], arm["success"]["value"], arm["kind"], arm["name"])
        for arm in task["arms"]
        if arm["damage"]
    ]
    if not points:
        return ""
    unsteered = next(arm for arm in task["arms"] if arm["kind"] == "unsteered")
    points.insert(0, Point(0.0, unsteered["success"]["value"], "unsteered", "unsteered"))
    return "<h3>Success against damage</h3>" + scatter(
        points,
        "Success against KL",
        x_label="KL on neutral questions (nats per token)",
        y_label=unsteered["success"]["measure"],
        colours=_KIND_COLOURS,
    )


def _ifeval_section(ifeval: Mapping[str, Any]) -> str:
    parts = [section("IFEval", "ifeval"), f"<p>{ifeval['prompts']} prompts.</p>"]
    keys = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
    rows = [
        [name, *(rate_text(arm["scores"][key]) for key in keys)]
        for name, arm in ifeval["arms"].items()
    ]
    parts.append(table(["arm", *(key.replace("_", " level, ") for key in keys)], rows))
    if ifeval.get("tests"):
        rows = [
            [
                f"{test['ours']} − {test['theirs']}",
                test["measure"],
                difference_text(test),
                _figure(test["p"], 2),
            ]
            for test in ifeval["tests"]
        ]
        parts.append("<p>Prompt by prompt:</p>")
        parts.append(table(["difference", "measure", "mean [95 %]", "p"], rows))
    names = list(ifeval["arms"])
    types = sorted(ifeval["arms"][names[0]]["scores"]["by_type"])
    rows = []
    for kind in types:
        found = [ifeval["arms"][name]["scores"]["by_type"][kind] for name in names]
        rows.append(
            [kind, str(found[0]["loose"]["n"]), *(rate_text(one["loose"]) for one in found)]
        )
    parts.append("<h3>Loose, by instruction</h3>" + table(["instruction", "n", *names], rows))
    for name, what in ifeval["stand_ins"].items():
        parts.append(f'<p class="quiet">{escape(name)}: judged with {escape(what)}.</p>')
    return "\n".join(parts)
