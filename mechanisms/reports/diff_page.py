"""The page of a comparison of weights, made from its document alone."""

from collections.abc import Mapping
from typing import Any

from saesteer.mechanisms.reports.page import note, page, table
from saesteer.sae.reports.svg import Point, diverging_map, scatter


def render_diff(document: Mapping[str, Any]) -> str:
    """Word pairs by head, verbs against other verbs, overlap of MLPs by block."""
    base, tuned, settings = document["base"], document["tuned"], document["settings"]
    parts = [
        note(
            f"Base {base['name']} (weights {base['hash']}), tuned {tuned['name']} (weights "
            f"{tuned['hash']}), {base['dtype']}. Noise is the base plus noise of the norm of the "
            "change, matrix by matrix."
        )
    ]
    if document["heads"]:
        grid = [[float(h["tuned"] - h["base"]) for h in row] for row in document["pairs"]]
        rows = [str(i) for i in range(len(grid))]
        columns = [str(i) for i in range(len(grid[0]))]
        related = (
            "related by the base's own input embeddings, a stand-in for word vectors"
            if settings["related"] == "embeddings" else "of any kind"
        )  # fmt: skip
        parts += [
            "<h2>Word pairs of heads</h2>",
            note(
                f"{document['n_words']} words, pairs {related}, in more than one dimension; "
                f"distances {', '.join(map(str, settings['distance']))}. Tuned minus base; rows "
                "are blocks."
            ),
            diverging_map(grid, rows, columns, "word pairs, tuned minus base, by head"),
            "<h3>Instruction verbs against verbs of like frequency</h3>",
            note("Share of heads with more pairs of a word, among heads where it changed."),
            table(
                ["blocks", "verbs", "others", "p adjusted", "noise: verbs", "others", "p adjusted"],
                [[f"{r['blocks'][0]}-{r['blocks'][1]}", *_shares(r["tuned"]), *_shares(r["noise"])]
                 for r in document["heads"]],
            ),
        ]  # fmt: skip
    if document["concepts"]:
        found = document["concepts"]
        points = [
            Point(float(row["layer"]), row[key], name)
            for name, key in (("tuned", "overlap"), ("noise", "noise"),
                              ("block before", "between_blocks"))
            for row in found if row[key] is not None
        ]  # fmt: skip
        parts += [
            "<h2>What MLPs write</h2>",
            note(
                f"Overlap of the subspaces of {found[0]['k']} leading directions with the base's; "
                f"unrelated ones overlap by {found[0]['unrelated']:.3f}."
            ),
            scatter(points, "overlap by block", x_label="block", y_label="overlap", joined=True),
            table(
                ["block", "overlap", "noise", "largest angle", "words of the first direction"],
                [
                    [
                        str(row["layer"]), f"{row['overlap']:.4f}", f"{row['noise']:.4f}",
                        f"{row['largest_angle']:.1f}°", " / ".join(
                            " ".join(end[:5]) for end in row["words"][0]
                        ),
                    ]
                    for row in found
                ],
            ),
        ]  # fmt: skip
    return page("Base against tuned", parts)


def _shares(one: Mapping[str, Any]) -> list[str]:
    return [
        "-" if one.get(key) is None else f"{one[key]:.3f}"
        for key in ("verbs", "others", "p_adjusted")
    ]
