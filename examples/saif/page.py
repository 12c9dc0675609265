"""Write a page of what `run.py`, `sweep` and `evaluate` measured; no figure is typed by hand.

    python examples/saif/page.py --results runs/saif/results --reports runs/saif/report-* \
        --rankings runs/saif/plan-* --head examples/saif/head.md -o docs/saif.md

Every sentence about a result is computed from the files given, also the ones about what failed.
"""

import argparse
import html
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saesteer.steering.evaluation.rates import Rate
from saesteer.steering.reports.evaluation_report import grade_words

Report = Mapping[str, Any]

CLAIMS = {
    "latents": "one latent does almost nothing, under 5 little, about 15 is good, 30 may decline",
    "layers": "the last block is clearly better than middle blocks",
    "width": "the method holds across SAE widths",
    "position": "the instruction after the content is better than before it",
    "read": "samples are read at their last token",
    "beta": "alpha = mu + beta sigma, with beta a dial",
    "variants": "several wordings make the latents about the instruction, not about one wording",
    "logit-bias": "(not in the paper) how much of the last block's effect a constant bias explains",
}
"""What the paper says of each experiment."""

KINDS = {
    "unsteered": "unsteered",
    "prompted": "prompted",
    "steered": "steered",
    "steered+prompted": "steered + prompted",
    "random": "random latents",
    "meandiff": "mean difference",
    "logit-bias": "logit bias",
}
"""Arms by kind, as columns are headed."""

WIDTH = 40
"""Characters between 0 and 1 in a plot."""


# --- what the reports hold -----------------------------------------------------------------------


@dataclass(frozen=True)
class Steered:
    """One plan of one task, with its controls."""

    label: str
    task: Report
    arm: Report

    def arms(self, kind: str) -> list[Report]:
        """The arms of a kind that belong to this plan."""
        if kind == "steered":
            return [self.arm]
        shared = kind in ("unsteered", "prompted") or len(self.task["plans"]) == 1
        marker = f" ({self.arm['name']})"
        return [
            arm
            for arm in self.task["arms"]
            if arm["kind"] == kind and (shared or arm["name"].endswith(marker))
        ]

    def rate(self, kind: str, measure: str) -> Report | None:
        """A rate with its interval; draws of random latents are pooled content by content."""
        arms = self.arms(kind)
        if not arms:
            return None
        if len(arms) == 1:
            return figures(arms[0][measure])
        hits = [hit(row, measure) for arm in arms for row in self.task["answers"][arm["name"]]]
        pooled = Rate.of(hits, len(arms) * len(self.task["seeds"]))
        return {"value": pooled.value, "low": pooled.low, "high": pooled.high}

    def test(self, kind: str, measure: str) -> Report | None:
        """The paired test against a kind of arm."""
        names = {arm["name"] for arm in self.arms(kind)} | (
            {"random"} if kind == "random" else set()
        )
        names |= {f"random ({self.arm['name']})"} if kind == "random" else set()
        for test in self.task["tests"]:
            if test["ours"] == self.arm["name"] and test["measure"] == measure:
                if test["theirs"] in names:
                    return dict(test)
        return None

    @property
    def plan(self) -> Report:
        found: Report = self.task["plans"][self.arm["name"]]
        return found


def hit(row: Report, measure: str) -> bool:
    if measure == "degenerate":
        return bool(row["degenerate"])
    return bool(row[measure])


def steered_arms(reports: Mapping[str, Report]) -> list[Steered]:
    """Every steered arm of the reports, which are given by the names of their folders."""
    found = [
        (folder, task, arm)
        for folder, report in reports.items()
        for task in report["tasks"]
        for arm in task["arms"]
        if arm["kind"] == "steered"
    ]
    times = Counter(task["task"]["name"] for _, task, _ in found)
    rows = []
    for folder, task, arm in found:
        name = task["task"]["name"]
        if times[name] > 1:
            name += f" ({folder if len(task['plans']) == 1 else arm['name']})"
        rows.append(Steered(name, task, arm))
    return rows


# --- how figures are written ---------------------------------------------------------------------


def figures(found: Any) -> Report | None:
    """A rate by its names: grades are `[rate, low, high]`, or None where not graded."""
    if found is None or isinstance(found, Mapping):
        return dict(found) if found else None
    return dict(zip(("value", "low", "high"), found, strict=True))


def rate(found: Report | None) -> str:
    if found is None:
        return "–"
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def gap(test: Report | None) -> str:
    """A paired difference; bold where its interval excludes 0, starred where Holm's p is small."""
    if test is None:
        return "–"
    text = f"{test['difference']:+.2f} [{test['low']:+.2f}, {test['high']:+.2f}]"
    if test["low"] > 0 or test["high"] < 0:
        text = f"**{text}**"
    return text + (" \\*" if test["p_holm"] <= 0.05 else "")


def number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else f"{value:{form}}"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(rows: Sequence[tuple[str, Report | None]]) -> str:
    """Rates as points on their intervals, one a line, in a block of text."""
    left = max(len(label) for label, _ in rows) + 2
    axis = [" "] * (WIDTH + 1)
    for share in (0, 0.25, 0.5, 0.75, 1):
        name = f"{share:g}".removeprefix("0") or "0"
        end = round(WIDTH * share) + len(name) // 2 + 1
        axis[end - len(name) : end] = name
    lines = [" " * left + "".join(axis)]
    for label, found in rows:
        if found is None:
            continue
        cells = ["·" if place % (WIDTH // 4) == 0 else " " for place in range(WIDTH + 1)]
        low, middle, high = (round(WIDTH * found[key]) for key in ("low", "value", "high"))
        cells[low : high + 1] = "─" * (high + 1 - low)
        cells[middle] = "●"
        lines.append(f"{label:<{left}}{''.join(cells)}  {found['value']:.2f}")
    return "```\n" + "\n".join(lines) + "\n```"


def sentence(parts: Sequence[str], none: str = "none") -> str:
    return ", ".join(parts) or none


# --- tasks ---------------------------------------------------------------------------------------


def follows(one: Steered) -> bool:
    """Whether the prompted model follows the instruction at .5 or more (follows)."""
    prompted = one.rate("prompted", "follows")
    return prompted is not None and prompted["value"] >= 0.5


def wins(one: Steered, kind: str) -> bool:
    """Whether the interval of the gain over a kind of arm lies above 0 (follows)."""
    test = one.test(kind, "follows")
    return test is not None and test["low"] > 0


def tasks_section(rows: Sequence[Steered]) -> Iterator[str]:
    met = [
        one.label for one in rows if follows(one) and wins(one, "unsteered") and wins(one, "random")
    ]
    asked = [one.label for one in rows if follows(one)]
    yield (
        f"The prompted model follows {len(asked)} of {len(rows)} instructions at .5 or more "
        f"(follows). On {len(met)} of those, steering without the instruction beats both the "
        "unsteered model and random latents of the same ‖delta‖, with 95 % intervals above zero: "
        f"{sentence(met)}."
    )
    drawn = ("unsteered", "random", "steered", "prompted")
    points = [
        (f"{one.label}, {KINDS[kind]}", one.rate(kind, "follows")) for one in rows for kind in drawn
    ]
    yield plot(points)
    for measure, what in (
        ("follows", "Follows: the check passes, as it is or on a loose reading"),
        (
            "strict",
            "Strict: follows, fluent and faithful",
        ),
        ("degenerate", "Degenerate answers: one 4-gram covers more than a fifth of the tokens"),
    ):
        yield f"**{what}.**"
        cells = [[one.label, *(rate(one.rate(kind, measure)) for kind in KINDS)] for one in rows]
        yield table(["task", *KINDS.values()], cells)
    others = {kind: name for kind, name in KINDS.items() if kind != "steered"}
    for measure in ("follows", "strict"):
        yield (
            f"**Steered minus each, {measure}**, paired by content: mean, 95 % bootstrap interval "
            "(bold where it excludes zero), \\* where p is at most .05 after Holm's correction "
            "within the task."
        )
        cells = [[one.label, *(gap(one.test(kind, measure)) for kind in others)] for one in rows]
        yield table(["task", *others.values()], cells)
    yield (
        "**Damage.** Perplexity: of the answers, under the unsteered model. The rest on neutral "
        "questions, in nats a token; flips are questions answered right before and wrong when "
        "steered."
    )
    yield damage_table(rows)
    yield "**The first test content of each task**, not a chosen one:"
    yield table(["task", "content", "prompted", "steered"], [first_answers(one) for one in rows])
    yield "**Chosen on development contents**, before any test content was answered:"
    yield table(
        ["task", "layer", "latents", "scale", "beta", "scope", "test contents", "seeds"],
        [
            [
                one.label,
                str(one.plan["layer"]),
                ", ".join(map(str, one.plan["latents"])),
                f"{one.plan['scale']:g}",
                f"{one.plan['beta']:g}",
                one.plan["scope"],
                str(one.task["n"]),
                str(len(one.task["seeds"])),
            ]
            for one in rows
        ],
    )


def first_answers(one: Steered) -> list[str]:
    """The first content with the answers to it."""
    cells = [one.label, one.task["answers"][one.arm["name"]][0]["content"]]
    for kind in ("prompted", "steered"):
        arms = one.arms(kind)
        row = one.task["answers"][arms[0]["name"]][0] if arms else None
        cells.append("–" if row is None else f"{row['output'].strip()} ({grade_words(row)[1]})")
    return [" ".join(html.escape(cell, quote=False).replace("|", "\\|").split()) for cell in cells]


def damage_table(rows: Sequence[Steered]) -> str:
    cells = []
    for one in rows:
        for kind in ("unsteered", "steered", "random", "meandiff"):
            for arm in one.arms(kind)[:1]:
                found = arm["damage"] or {}
                flips = "–"
                if found.get("right_to_wrong") is not None:
                    flips = f"{found['right_to_wrong']} of {found['right_before']}"
                cells.append(
                    [
                        one.label,
                        arm["name"],
                        number(arm["fluency"]["perplexity"], ".1f"),
                        *(
                            number(found.get(key))
                            for key in ("relative_dose", "kl", "delta_ce", "top1_agreement")
                        ),
                        flips,
                    ]
                )
    headers = ["task", "arm", "perplexity", "‖delta‖/‖h‖", "KL", "ΔCE", "top-1 kept", "flips"]
    return table(headers, cells)


def rankings_section(rankings: Mapping[str, Report]) -> Iterator[str]:
    rows, parts = [], []
    for name, found in rankings.items():
        label = f"{found['task']['name']} ({name})"
        for row in found["latents"][:5]:
            lens = " ".join(f"`{token.strip() or repr(token)}`" for token in row["lens"])
            rows.append(
                [
                    label,
                    str(row["id"]),
                    number(row["score"], ".3f"),
                    number(row["rate_positive"], ".3f"),
                    number(row["rate_negative"], ".3f"),
                    number(row["mu"], ".1f"),
                    lens.replace("|", "\\|"),
                ]
            )
        alike = found["stability"]
        parts.append(
            [
                label,
                found["by"],
                found["read"],
                str(found["discoveries"]["latents"]),
                *(
                    number(alike.get(part, {}).get("jaccard"))
                    for part in ("variants", "languages", "contents")
                ),
            ]
        )
    yield "The best five latents of each ranking, and what they say through the unembedding:"
    yield table(["task", "latent", "score", "on with", "on without", "mu", "lens"], rows)
    best = next(iter(rankings.values()))["stability"]["k"]
    yield (
        "How many latents differ at a false discovery rate of .05, and how far the top "
        f"{best} agree (mean Jaccard index) between wordings, between their languages and between "
        "quarters of the contents:"
    )
    yield table(
        ["task", "by", "read", "latents that differ", "wordings", "languages", "contents"], parts
    )


def failures(rows: Sequence[Steered], reports: Mapping[str, Report]) -> list[str]:
    """What went wrong, a line each."""
    said = []
    for one in rows:
        label = f"**{one.label}**"
        if not follows(one):
            prompted = rate(one.rate("prompted", "follows"))
            said.append(f"{label}: the prompted model follows it in {prompted} only.")
        for kind in ("unsteered", "random", "meandiff", "logit-bias"):
            test = one.test(kind, "follows")
            if test is not None and not test["low"] > 0:
                verb = "does worse than" if test["high"] < 0 else "is not shown to beat"
                said.append(f"{label}: steering {verb} {KINDS[kind]}, follows: {gap(test)}.")
        prompted_test = one.test("prompted", "follows")
        if prompted_test is not None and prompted_test["high"] < 0:
            said.append(f"{label}: prompting is better, follows: {gap(prompted_test)}.")
        strict = one.test("unsteered", "strict")
        if strict is not None and not strict["low"] > 0:
            said.append(
                f"{label}: no strict gain over the unsteered model is shown: {gap(strict)}."
            )
        broken = one.arm["degenerate"]
        if broken["value"] > 0.2:
            said.append(f"{label}: {broken['value']:.0%} of the steered answers are degenerate.")
        damage = one.arm["damage"] or {}
        if damage.get("leaves_norm_range"):
            said.append(
                f"{label}: the dose leaves the model's usual norms "
                f"({damage['norm_ratio']:.2g} times the unedited length)."
            )
        if damage.get("right_before") and damage["right_to_wrong"] > damage["right_before"] / 2:
            said.append(
                f"{label}: {damage['right_to_wrong']} of {damage['right_before']} neutral "
                "questions turn from right to wrong."
            )
        for warning in (one.task.get("sweep") or {}).get("warnings", ()):
            said.append(f"{label}: sweep warned: {warning}.")
    said += [
        f"{note}."
        for report in reports.values()
        for task in report["tasks"]
        for note in task["notes"]
    ]
    return list(dict.fromkeys(said))


# --- the paper's claims and experiments ----------------------------------------------------------


def claims_table(rows: Sequence[Steered], experiments: Sequence[Report]) -> str:
    cells = []
    if rows:
        good = [one for one in rows if one.arm["strict"] is not None and one.arm["strict"][0] > 0.3]
        told = [f"{one.label} {rate(figures(one.arm['strict']))}" for one in rows]
        cells.append(
            [
                "steered strict accuracy over .30 across tasks",
                f"above .30 in {len(good)} of {len(rows)}: {sentence(told)}",
            ]
        )
        tests = [(one, one.test("prompted", "follows")) for one in rows]
        known = [(one, test) for one, test in tests if test is not None]
        near = sum(test["high"] >= 0 for _, test in known)
        told = [f"{one.label} {gap(test)}" for one, test in known]
        cells.append(
            [
                "steered loose accuracy comparable with prompting",
                f"the interval of steered minus prompted reaches 0 in {near} of "
                f"{len(known)}: {sentence(told)}",
            ]
        )
    for report in experiments:
        facts = report["settings"]
        told = [f"{arm['name']} {arm['follows'][0]:.2f}" for arm in report["arms"]]
        cells.append(
            [
                f"{facts['experiment']}: {CLAIMS[facts['experiment']]}",
                f"{facts['task']}, {where(facts)}, follows: {sentence(told)}",
            ]
        )
    return table(["the paper says", "measured here"], cells)


def where(facts: Report) -> str:
    """Layers, and where samples were read and by what latents were ranked, unless that varies."""
    layers = dict.fromkeys(sae["layer"] for sae in facts["sae"])
    said = [f"layer{'s' if len(layers) > 1 else ''} {sentence(list(map(str, layers)))}"]
    if facts["experiment"] != "read":
        said.append(f"read {facts['read']}, by {facts['by']}")
    return ", ".join(said)


def experiment_section(report: Report) -> Iterator[str]:
    facts = report["settings"]
    name = facts["experiment"]
    saes = ", ".join(f"layer {s['layer']} with {s['d_sae']} latents" for s in facts["sae"])
    n = report["arms"][0]["n"]
    yield f"### {name}: {facts['task']}, {where(facts)}"
    yield f"The paper: {CLAIMS[name]}."
    yield (
        f"{saes}; read {facts['read']}, by {facts['by']}, k {facts['k']}, scale "
        f"{facts['scale']:g}, scope {facts['scope']}, {n} test contents, temperature "
        f"{facts['temperature']:g}. Follows:"
    )
    yield plot([(arm["name"], figures(arm["follows"])) for arm in report["arms"]])
    yield table(
        ["arm", "follows", "minus unsteered", "strict", "degenerate", "‖delta‖/‖h‖"],
        [
            [
                arm["name"],
                rate(figures(arm["follows"])),
                gain(arm.get("gain")),
                rate(figures(arm["strict"])),
                rate(arm["degenerate"]),
                number(arm["relative_dose"]),
            ]
            for arm in report["arms"]
        ],
    )


def gain(found: Report | None) -> str:
    if found is None:
        return "–"
    return f"{found['value']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, help="folder that run.py wrote")
    parser.add_argument("--reports", type=Path, nargs="*", default=[], help="folders of evaluate")
    parser.add_argument("--rankings", type=Path, nargs="*", default=[], help="folders of rank")
    parser.add_argument("--head", type=Path, help="text to put first")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args(argv)

    def read(folders: Sequence[Path], name: str) -> dict[str, Any]:
        found = {}
        for folder in folders:
            if (folder / name).is_file():
                found[folder.name] = json.loads((folder / name).read_text("utf-8"))
            else:
                print(f"left out: {folder} holds no {name}", file=sys.stderr)
        return found

    parts = [] if args.head is None else [args.head.read_text(encoding="utf-8").strip()]
    reports, rankings = read(args.reports, "report.json"), read(args.rankings, "ranking.json")
    files = sorted(args.results.glob("*.json")) if args.results else []
    experiments = [json.loads(path.read_text("utf-8")) for path in files]
    experiments.sort(key=lambda report: list(CLAIMS).index(report["settings"]["experiment"]))
    rows = steered_arms(reports)
    if rows or experiments:
        parts += ["## The paper's claims beside what was measured", claims_table(rows, experiments)]
    if rows:
        model = next(iter(reports.values()))["model"]
        graders = sentence(list(dict.fromkeys(report["graded_by"] for report in reports.values())))
        parts += [
            "## Steered beside every control",
            f"{model['name']}, {model['dtype']}; graded by {graders}.",
        ]
        parts += tasks_section(rows)
        said = failures(rows, reports)
        parts += ["## What failed", "\n".join(f"- {line}" for line in said) or "Nothing above."]
    if rankings:
        parts += ["## Latents", *rankings_section(rankings)]
    if experiments:
        parts.append("## One experiment after the other")
        for report in experiments:
            parts += experiment_section(report)
    args.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(
        f"{len(reports)} reports, {len(rankings)} rankings and {len(files)} experiments: {args.out}"
    )


if __name__ == "__main__":
    main()
