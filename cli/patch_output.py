"""What `saesteer patch` prints."""

from saesteer.cli.output import Document, number, print_table

_SHOWN = 15


def print_grid(document: Document) -> None:
    """The largest effects of nodes."""
    best = sorted(document["cells"], key=lambda cell: -abs(cell["effect"]))[:_SHOWN]
    rows = [
        [
            cell["name"],
            number(cell["effect"]),
            "-" if cell["low"] is None else f"[{number(cell['low'])}, {number(cell['high'])}]",
            "-" if cell["share"] is None else f"{cell['share']:.2f}",
            number(cell["p_adjusted"], 2),
            "exact" if cell["exact"] else document["settings"]["fast"],
        ]
        for cell in best
    ]
    print_table(
        ["node", "effect", "95 % interval", "share", "p adjusted", "how"],
        rows,
        left="node,95 % interval,how",
    )
    settings = document["settings"]
    print(
        f"{document['metric']} {number(document['base'])} unpatched, "
        f"{number(document['source'])} in the other run ({settings['direction']}); "
        f"{document['n_pairs']} pairs in {document['n_groups']} groups, "
        f"{len(document['cells'])} nodes"
    )
    if document["agreement"]:
        found = document["agreement"]
        print(
            f"{settings['fast']} against exact on {found['nodes']} nodes: Pearson "
            f"{number(found['pearson'], 2)}, Spearman {number(found['spearman'], 2)}, sign "
            f"{number(found['sign'], 2)}"
        )


def print_vectors(document: Document) -> None:
    """The best layers, and whether two do more than their sum."""
    rows = [
        [
            row["set"],
            number(row["effect"]),
            _ends(row["low"], row["high"]),
            f"{row['share']:.2f}",
            *(number(value) for value in row["controls"].values()),
        ]
        for row in sorted(document["sets"], key=lambda row: -row["effect"])[:_SHOWN]
    ]
    names = list(document["sets"][0]["controls"])
    print_table(
        ["layers", "f", "95 % interval", "share", *names], rows, left="layers,95 % interval"
    )
    print(
        f"the instruction in words moves {document['metric']} by {number(document['whole'])}; "
        f"{document['n_pairs']} pairs in {document['n_groups']} groups; the last columns are "
        "controls"
    )
    if document["superadditivity"]:
        best = max(document["superadditivity"], key=lambda row: row["interaction"])
        print(
            f"more than the sum: {best['set']} by {number(best['interaction'])} "
            f"{_ends(best['low'], best['high'])}, p {number(best['p_holm'], 2)} (sign test on "
            "held-out groups, Holm)"
        )


def print_latents(document: Document) -> None:
    """The latents of the largest effects, and how few bring most."""
    rows = [
        [
            str(row["latent"]),
            number(row["effect"]),
            _ends(row["low"], row["high"]),
            number(row["change"]),
            str(row["carries"]),
            str(row["marks"]),
            "yes" if row["chosen"] else "",
        ]
        for row in document["patched"][:_SHOWN]
    ]
    print_table(
        ["latent", "effect", "95 % interval", "change", "carries", "marks", "chosen"], rows,
        left="95 % interval,chosen",
    )  # fmt: skip
    shares = {
        name: f"{value['value']:.2f}"
        + ("" if value["low"] is None else f" {_ends(value['low'], value['high'])}")
        for name, value in document["shares"].items()
    }
    print(
        f"the whole site moves {document['metric']} by {number(document['site'])}; all latents "
        f"bring {shares['latents']} of it, the error alone {shares['error']}"
    )
    print(
        f"{len(document['chosen'])} latents bring {shares['chosen']}, on held-out groups "
        f"{shares['held out']}; of the first 10 that carry, "
        f"{document['overlap']['first 10']:.0%} are among the first 10 that mark"
    )
    if "diff" in document:
        diff = document["diff"]
        changed = sum(row["p_adjusted"] <= 0.05 for row in diff["latents"])
        print(
            f"{diff['names'][0]} -> {diff['names'][1]}: {changed} latents change over "
            f"{diff['n_tokens']} tokens; FVU {diff['unexplained'][0]:.2f} and "
            f"{diff['unexplained'][1]:.2f}"
        )


def _ends(low: float | None, high: float | None) -> str:
    return "-" if low is None else f"[{number(low)}, {number(high)}]"
