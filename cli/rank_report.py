"""What `saesteer rank` prints: the table of latents, findings, and reports of single latents."""

import os
from argparse import Namespace

from saesteer.cli.output import Document, amount, print_next, print_page, print_table
from saesteer.cli.output import number as figure

_COLUMNS = {
    "score": "score",
    "on+": "rate_positive",
    "on-": "rate_negative",
    "mu": "mu",
    "sigma": "sigma",
}


def print_ranking(args: Namespace, document: Document) -> None:
    """Print a ranking document: latents, `--explain` reports, findings, and the next command."""
    samples = f"{document['positives']} positive and {document['negatives']} negative samples"
    print(
        f"{document['task']['name']} at layer {document['layer']} ({document['site']}), by "
        f"{document['by']}, read {document['read']}, {samples}"
    )
    if document["replies_used"]:
        passed, answered = document["replies_used"]
        print(f"{passed} of {answered} instructed replies pass the check and count")
    rows = [
        [
            str(row["rank"]),
            str(row["id"]),
            *(figure(row[key]) for key in _COLUMNS.values()),
            _shown(row["lens"]),
        ]
        for row in document["latents"]
    ]
    print_table(["rank", "latent", *_COLUMNS, "lens"], rows, left="lens")
    for row in document.get("explain", ()):
        print()
        _print_report(document, row)
    if "explain" in document:
        print()
    for line in _findings(document):
        print(line)
    used, given = document["contents_used"]
    print(
        f"ranked with {used} of {given} contents (of the train split); "
        f"{amount(document['excluded']['sinks'])} attention sinks left out"
    )
    if args.out is not None:
        print(f"plan written to {document['plan']}")
        if pages := [row["page"] for row in document["latents"] if row.get("page")]:
            index = args.out / pages[0].rpartition("/latents/")[0] / "index.html"
            print(f"pages of {len(pages)} of these latents: {os.path.normpath(index)}")
        print_next(
            "steer",
            "--model",
            document["model"]["name"],
            "--plan",
            args.out,
            "-p",
            "TEXT",
            "--baseline",
        )
        print_page(args.out / "ranking.html", show=args.open)


def _findings(document: Document) -> list[str]:
    """Lines about tests, filters, stability over parts of the texts, and overlap of scores."""
    found, parts = document["discoveries"], document["stability"]
    lines = [
        f"{amount(found['latents'])} latents differ at a false discovery rate of "
        f"{found['max_fdr']:g} ({document['test']})"
    ]
    counts = ", ".join(f"{name} {amount(n)}" for name, n in document["filters"].items())
    dropped = ",".join(document["dropped"]) or "none"
    lines.append(f"latents that each filter finds: {counts}; dropped: {dropped}")
    alike = [
        f"{name} {figure(parts[name]['jaccard'])} / {figure(parts[name]['spearman'])}"
        for name in ("variants", "languages", "contents")
        if name in parts
    ]
    if alike:
        lines.append(
            f"agreement by {parts['by']} (Jaccard@{parts['k']} / Spearman): {', '.join(alike)}"
        )
    others = {name: x for name, x in document["overlap"].items() if name != document["by"]}
    shared = ", ".join(f"{name} {x:.2f}" for name, x in others.items())
    lines.append(f"top {parts['k']} shared with those by other scores (Jaccard): {shared}")
    if document["shuffled"]:
        lines += _chance(document["shuffled"])
    if document["unsteered"]:
        plain = document["unsteered"]
        lines.append(f"unsteered, {plain['successes']} of {plain['n']} answers pass")
    return lines


def _chance(found: Document) -> list[str]:
    """Lines that compare the ranking with rankings by shuffled labels."""

    def against(name: str) -> str:
        one = found[name]
        return (
            f"{figure(one['mean'], 3)} (at most {figure(one['highest'], 3)}) against "
            f"{figure(one['real'], 3)}"
        )

    return [
        f"with shuffled labels ({found['shuffles']} times): best {found['by']} {against('best')}, "
        f"best auroc {against('best_auroc')},",
        f"  latents that differ ({found['test']}) {against('discoveries')}, top {found['k']} "
        f"shared with the real one {figure(found['overlap']['mean'], 2)}",
    ]


def _print_report(document: Document, row: Document) -> None:
    """Print everything known about one latent."""
    place = next((r["rank"] for r in document["latents"] if r["id"] == row["id"]), None)
    where = f"rank {place}" if place else "not in the plan"
    print(f"latent {row['id']} ({where}), {document['by']} {figure(row['score'])}")
    active = f"mu {figure(row['mu'])}, sigma {figure(row['sigma'])}, max {figure(row['max'])}"
    rates = f"on {figure(row['rate_positive'])}, without {figure(row['rate_negative'])}"
    lines = [
        ("lens", _shown(row["lens"])),
        ("with it", rates),
        ("when on", active),
        (
            "elsewhere",
            f"on at {figure(row['control_rate'])} of plain text's tokens, "
            f"{figure(row['template_rate'])} of the template's",
        ),
        ("scores", ", ".join(f"{name} {figure(x)}" for name, x in row["scores"].items())),
        ("chance", f"p {figure(row['p'])}, q {figure(row['q'])} ({document['test']})"),
    ]
    if row.get("shuffled"):
        chance = row["shuffled"]
        lines.append(
            (
                "shuffled",
                f"{document['shuffled']['by']} {figure(chance['score'])}, reached by the "
                f"best latent of {chance['reached']:.0%} of the shuffles: p "
                f"{figure(chance['p'], 2)} for all latents at once "
                f"(by auroc {figure(chance['auroc_p'], 2)})",
            )
        )
    lines += [
        (
            name,
            f"{document['stability']['by']} from {figure(part['lowest'])} to "
            f"{figure(part['highest'])}, in the top {document['stability']['k']} of "
            f"{part['in_top']:.0%}",
        )
        for name, part in row["stability"].items()
    ]
    lines += [
        (
            "steered",
            f"at relative dose {trial['dose']:g}, {trial['successes']} of {trial['n']} "
            f"answers pass, {trial['degenerate']} degenerate",
        )
        for trial in row.get("trials", ())
    ]
    lines += [
        (name, f"{why}; {'dropped' if name in document['dropped'] else 'kept'}")
        for name, why in row["filters"].items()
    ]
    for name, text in lines:
        print(f"  {name:<10} {text}")


def _shown(tokens: list[str]) -> str:
    """Tokens in quotation marks, so that spaces are visible."""
    return " ".join(repr(token) for token in tokens)
