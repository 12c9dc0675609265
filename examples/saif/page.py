"""Write a page of what `run.py`, `sweep` and `evaluate` measured; no figure is typed by hand.

python examples/saif/page.py --results runs/saif/results --reports runs/saif/report-* -o page.md
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def rate(found: Mapping[str, Any]) -> str:
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def experiment_section(report: Mapping[str, Any]) -> str:
    facts = report["settings"]
    name = facts["experiment"]
    saes = ", ".join(f"layer {s['layer']} with {s['d_sae']} latents" for s in facts["sae"])
    n = report["arms"][0]["n"]
    rows = [
        [
            arm["name"], rate(arm["loose"]), rate(arm["strict"]), rate(arm["degenerate"]),
            "" if arm["relative_dose"] is None else f"{arm['relative_dose']:.2f}",
        ]
        for arm in report["arms"]
    ]  # fmt: skip
    return "\n\n".join(
        [
            f"### {name}: {facts['task']}",
            f"The paper: {CLAIMS[name]}.",
            f"{saes}; read {facts['read']}, by {facts['by']}, k {facts['k']}, scale "
            f"{facts['scale']:g}, scope {facts['scope']}, {n} test contents, temperature "
            f"{facts['temperature']:g}.",
            table(["arm", "loose", "strict", "degenerate", "‖delta‖/‖h‖"], rows),
        ]
    )


def find(task: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    return next((arm for arm in task["arms"] if arm["kind"] == kind), None)


def reports_section(reports: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    kinds = ("unsteered", "prompted", "steered", "steered+prompted", "meandiff", "logit-bias")
    for measure in ("loose", "strict", "degenerate"):
        rows = []
        for report in reports:
            for task in report["tasks"]:
                row = [task["task"]["name"]]
                for kind in kinds:
                    arm = find(task, kind)
                    row.append("–" if arm is None else rate(arm[measure]))
                draws = [arm for arm in task["arms"] if arm["kind"] == "random"]
                hits = sum(arm[measure]["successes"] for arm in draws)
                total = sum(arm[measure]["n"] for arm in draws)
                row.append(f"{hits / total:.2f}" if total else "–")
                rows.append(row)
        parts.append(f"**{measure}**\n\n" + table(["task", *kinds, "random (mean)"], rows))
    rows = []
    for report in reports:
        for task in report["tasks"]:
            for test in task["tests"]:
                if test["measure"] != "loose":
                    continue
                gap = f"{test['difference']:+.2f} [{test['low']:+.2f}, {test['high']:+.2f}]"
                row = [task["task"]["name"], test["theirs"], gap]
                rows.append([*row, f"{test['p']:.2g}", f"{test['p_holm']:.2g}"])
    parts.append(
        "Steered minus each, loose, content by content:\n\n"
        + table(["task", "against", "difference", "p", "p (Holm)"], rows)
    )
    rows = []
    for report in reports:
        for task in report["tasks"]:
            for arm in task["arms"]:
                damage = arm["damage"]
                if damage is None or arm["kind"] not in ("steered", "meandiff"):
                    continue
                flips = f"{damage['right_to_wrong']} of {damage['right_before']}"
                rows.append(
                    [
                        task["task"]["name"], arm["name"], f"{damage['kl']:.2f}",
                        f"{damage['delta_ce']:.2f}", f"{damage['relative_dose']:.2f}", flips,
                    ]
                )  # fmt: skip
    parts.append(
        "On neutral questions:\n\n"
        + table(["task", "arm", "KL", "ΔCE", "‖delta‖/‖h‖", "right → wrong"], rows)
    )
    chosen = []
    for report in reports:
        for task in report["tasks"]:
            (plan,) = task["plans"].values()
            latents = ", ".join(map(str, plan["latents"]))
            chosen.append(
                [
                    task["task"]["name"], str(plan["layer"]), latents, f"{plan['scale']:g}",
                    plan["scope"], str(task["n"]),
                ]
            )  # fmt: skip
    headers = ["task", "layer", "latents", "scale", "scope", "test contents"]
    parts.append("Chosen on development contents:\n\n" + table(headers, chosen))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, help="folder that run.py wrote")
    parser.add_argument("--reports", type=Path, nargs="*", default=[], help="folders of evaluate")
    parser.add_argument("--head", type=Path, help="text to put first")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args(argv)

    parts = [] if args.head is None else [args.head.read_text(encoding="utf-8").strip()]
    reports = [json.loads((folder / "report.json").read_text()) for folder in args.reports]
    if reports:
        model = reports[0]["model"]
        parts.append(f"## Steered beside every control\n\n{model['name']}, {model['dtype']}.")
        parts.append(reports_section(reports))
    files = sorted(args.results.glob("*.json")) if args.results else []
    if files:
        parts.append("## One experiment after the other")
        parts += [experiment_section(json.loads(path.read_text())) for path in files]
    args.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"{len(reports)} reports and {len(files)} experiments: {args.out}")


if __name__ == "__main__":
    main()
