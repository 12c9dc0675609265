"""The tables of `docs/quality.md`, from the rows and sums that `quality.py` has left."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side

from saesteer.sae.measuring.figures import OF_ROWS

OURS = "saesteer"
_DRAWS = 2000
_ERROR, _VARIANCE = OF_ROWS.index("error"), OF_ROWS.index("variance")

Row = dict[str, Any]


def write_page(page: Path, rows: Sequence[Row], work: Path) -> None:
    """Rewrite the part of the page between its two marks."""
    side_by_side.write_page(page, "quality", tables(rows, work))


def tables(rows: Sequence[Row], work: Path) -> str:
    """A table for each set of rows and architecture."""
    text = []
    for data in dict.fromkeys(row["data"] for row in rows):
        for arch in dict.fromkeys(row["arch"] for row in rows if row["data"] == data):
            own = [row for row in rows if (row["data"], row["arch"]) == (data, arch)]
            text.append(_table(data, arch, own, work))
    return "\n".join(text)


def of_tools(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """Rows by tool and rate, each list in the order of seeds; ours first."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: (row["tool"] != OURS, row["tool"], row["seed"])):
        found.setdefault(row["tool"], {}).setdefault(row["rate"], []).append(row)
    return found


def chosen_rate(by_rate: dict[str, list[Row]]) -> str:
    """The rate that was best for the first seed: the one that all seeds were run with."""
    return min(by_rate, key=lambda rate: by_rate[rate][0]["fvu"])


def paired_interval(ours: Sequence[Row], theirs: Sequence[Row], work: Path) -> tuple[float, ...]:
    """(ours - theirs) / theirs of FVU, and its 95 % interval: seeds and contexts are drawn.

    Seed by seed both were trained on the same rows in the same order, and both are measured on the
    same contexts.
    """
    seeds = sorted({row["seed"] for row in ours} & {row["seed"] for row in theirs})
    a, b = (
        np.stack([np.load(work / _name(row) / "sums.npy") for row in rows if row["seed"] in seeds])
        for rows in (ours, theirs)
    )
    rng = np.random.default_rng(0)
    value = _difference(a, b)
    drawn = []
    for _ in range(_DRAWS):
        some = rng.integers(len(seeds), size=len(seeds))
        contexts = rng.integers(a.shape[1], size=a.shape[1])
        drawn.append(_difference(a[some][:, contexts], b[some][:, contexts]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return value, float(low), float(high)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    fvu = [float((s[..., _ERROR].sum(1) / s[..., _VARIANCE].sum(1)).mean()) for s in (a, b)]
    return fvu[0] / fvu[1] - 1


def _name(row: Row) -> str:
    tool = row["tool"].replace(" ", "-")
    return f"{row['data']}_{row['arch']}_{tool}_{row['rate']}_{row['seed']}"


def seconds_to(row: Row, fvu: float) -> float | None:
    """CPU seconds until a run's held-out FVU is no larger, on lines between points; or None."""
    points = [tuple(map(float, part.split(":"))) for part in row["curve"].split(";")]
    before = (0.0, 1.0)
    for seconds, value in points:
        if value <= fvu:
            share = (before[1] - fvu) / max(before[1] - value, 1e-12)
            return before[0] + share * (seconds - before[0])
        before = (seconds, value)
    return None


def _table(data: str, arch: str, rows: Sequence[Row], work: Path) -> str:
    tools = of_tools(rows)
    first = rows[0]
    truth = any("mcc" in row for row in rows)
    heads = [
        "tool",
        "rate",
        "seeds",
        "FVU at equal L0",
        "at the tool's default rate",
        "ours against it",
        "L0",
        "L0, FVU as stored",
        "dead",
        "s of a core",
        "ours gets there",
    ]
    heads += ["F1", "MCC", "uniqueness"] if truth else []  # fmt: skip
    lines = [
        f"### {data}, {arch}",
        "",
        f"{first['d_sae']:,} latents, k {first['k']}, {first['steps']} steps of {first['batch']:,} "
        "activations.",
        "",
        "| " + " | ".join(heads) + " |",
        "| --- | --- |" + " ---: |" * (len(heads) - 2),
    ]
    ours = tools[OURS][chosen_rate(tools[OURS])] if OURS in tools else []
    for tool, by_rate in tools.items():
        rate = chosen_rate(by_rate)
        lines.append(_line(tool, rate, by_rate, ours, work, truth))
    return "\n".join(lines) + "\n"


def _line(
    tool: str, rate: str, by_rate: dict[str, list[Row]], ours: list[Row], work: Path, truth: bool
) -> str:
    runs = by_rate[rate]
    usual = by_rate.get("default", [])
    against = reached = "-"
    if ours and tool != OURS:
        value, low, high = paired_interval(ours, runs, work)
        against = f"{100 * value:+.1f} % ({100 * low:+.1f} to {100 * high:+.1f})"
        reached = _reached(ours, runs)
    cells = [
        f"{tool.replace('_', ' ')} {runs[0]['version']}",
        rate if rate != "default" else f"default ({runs[0]['given'].split(',')[0]})",
        str(len(runs)),
        _spread(runs, "fvu", 4),
        _spread(usual, "fvu", 4),
        against,
        _spread(runs, "l0", 1),
        f"{np.mean([r['l0_stored'] for r in runs]):.1f}, "
        f"{np.mean([r['fvu_stored'] for r in runs]):.4f}",
        f"{100 * np.mean([r['dead'] for r in runs]):.1f} %",
        f"{np.mean([r['cpu_seconds'] for r in runs]):.0f}",
        reached,
    ]
    if truth:
        cells += [_spread(runs, name, 3) for name in ("f1", "mcc", "uniqueness")]
    return "| " + " | ".join(cells) + " |"


def _reached(ours: Sequence[Row], theirs: Sequence[Row]) -> str:
    """After which CPU seconds, seed by seed, ours is where theirs ends; and the share of theirs."""
    shares, seconds = [], []
    for mine, other in zip(ours, theirs, strict=False):
        needed = seconds_to(mine, other["fvu"])
        if needed is None:
            return "not reached"
        seconds.append(needed)
        shares.append(needed / other["cpu_seconds"])
    return f"{np.mean(seconds):.1f} s, {100 * np.mean(shares):.0f} % of its time"


def _spread(rows: Sequence[Row], name: str, digits: int) -> str:
    values = [row[name] for row in rows if name in row]
    if not values:
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return mean + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")
