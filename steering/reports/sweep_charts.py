"""Charts of a report: what a sweep tried, and how stable a ranking is."""

from collections.abc import Mapping
from html import escape
from typing import Any

from saesteer.sae.reports.parts import wide
from saesteer.sae.reports.svg import Point, heat_map, scatter

_LONGEST_PART = 44
"""Characters of a part's name next to a heat map."""


def pareto_chart(sweep: Mapping[str, Any]) -> str:
    """Settings of a sweep: success against KL, the front dashed, the chosen one ringed."""
    latest = [row for row in sweep["trials"] if row["latest"] and row["damage"]]
    latest.sort(key=_series_order)
    chosen = sweep["chosen"]
    points = [
        Point(
            row["damage"]["kl"],
            _success(row),
            _series(row),
            _setting(row),
            _setting(row) == _setting(chosen) and row["n"] == chosen["n"],
        )
        for row in latest
    ]
    points.append(Point(0.0, _success(sweep["unsteered"]), "unsteered", "unsteered"))
    front = sorted(
        (Point(r["damage"]["kl"], _success(r), "") for r in latest if r["on_front"]),
        key=lambda point: point.x,
    )
    budget = sweep.get("budget") or {}
    return scatter(
        points,
        "Success against KL",
        front=front,
        limit=budget["limit"] if budget.get("kind") == "kl" else None,
        x_label="KL on neutral questions (nats per token)",
        y_label=f"{measure(sweep)} (dev)",
    )


def _success(row: Mapping[str, Any]) -> float:
    """The rate of success of an arm; of a sweep made before there were grades, the loose one."""
    return float((row.get("success") or row["loose"])["value"])


def measure(sweep: Mapping[str, Any]) -> str:
    """What counted as success in a sweep."""
    return str((sweep["chosen"].get("success") or {"measure": "loose"})["measure"])


def dose_response(sweep: Mapping[str, Any]) -> str:
    """Success by dose, one line for each number of latents and scope."""
    first = sweep["trials"][0]["n"]
    rows = [row for row in sweep["trials"] if row["n"] == first]
    rows.sort(key=_series_order)
    points = [
        Point(row["relative_dose"], _success(row), _series(row), _setting(row)) for row in rows
    ]
    title = f"<h3>Dose and response</h3><p>First round: {first} development contents a setting.</p>"
    return title + scatter(
        points,
        "Success by relative dose",
        joined=True,
        x_label="‖delta‖ / ‖h‖ (median over edited positions)",
        y_label=f"{measure(sweep)} (dev)",
    )


def _series(row: Mapping[str, Any]) -> str:
    name = f"k {row['k']}, {row['scope']}"
    if row["beta"]:
        name += f", beta {row['beta']:g}"
    return f"{row['plan']}: {name}" if row["plan"] else name


def _series_order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The same series has the same colour in every chart."""
    return row["plan"], row["k"], row["scope"], row["beta"]


def _setting(row: Mapping[str, Any]) -> str:
    return f"layer {row['layer']}, {_series(row)}, scale {row['scale']:g}"


def stability_section(
    stability: Mapping[str, Any] | None, shuffled: Mapping[str, Any] | None
) -> str:
    """How alike the rankings of parts of the texts are, and what shuffled labels give."""
    groups = {
        name: found
        for name, found in (stability or {}).items()
        if isinstance(found, Mapping) and "jaccard" in found
    }
    parts = [f"<p>{_null(shuffled)}</p>"] if shuffled else []
    if any(found.get("jaccard_pairs") for found in groups.values()):
        best = (stability or {}).get("k", "latents")
        parts.append(
            f"<p>The ranking again on parts of the texts. Above the diagonal: overlap of the top "
            f"{best} of two parts (Jaccard index); below it: rank correlation (Spearman); on it: "
            "the part itself.</p>"
        )
    for name, found in groups.items():
        parts.append(
            f"<h4>{escape(name)}</h4><p>Jaccard {found['jaccard']:.2f} on average, at least "
            f"{found['jaccard_lowest']:.2f}; Spearman {found['spearman']:.2f}, at least "
            f"{found['spearman_lowest']:.2f}.</p>"
        )
        if found.get("jaccard_pairs"):
            parts.append(_pairs_map(name, found))
    return "<h3>Stability of the ranking</h3>" + "".join(parts) if parts else ""


def _pairs_map(name: str, found: Mapping[str, Any]) -> str:
    rows = range(len(found["parts"]))
    values = [
        [found["jaccard_pairs" if j >= i else "spearman_pairs"][i][j] for j in rows] for i in rows
    ]
    labels = [
        f"{number}. {part if len(part) <= _LONGEST_PART else part[: _LONGEST_PART - 1] + '…'}"
        for number, part in enumerate(found["parts"], 1)
    ]
    columns = [str(i + 1) for i in rows]
    return wide(heat_map(values, labels, columns, f"Agreement between {name}"))


def _null(found: Mapping[str, Any]) -> str:
    """What the ranking finds with shuffled labels, in a sentence."""

    def against(name: str, form: str) -> str:
        one = found[name]
        return (
            f"{one['mean']:{form}} (at most {one['highest']:{form}}) against {one['real']:{form}}"
        )

    return (
        f"With labels shuffled within each content, {found['shuffles']} times, against the real "
        f"ones: best {escape(str(found['by']))} {against('best', '.3g')}; best AUROC "
        f"{against('best_auroc', '.2f')}; latents that differ ({escape(str(found['test']))}) "
        f"{against('discoveries', '.3g')}; "
        f"overlap of the top {found['k']} with the real one {found['overlap']['mean']:.2f}."
    )
