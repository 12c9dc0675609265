"""What `metrics` returns: its figures by name, and as a table or a chart."""

from typing import Any

from saesteer.checkpoints.shown import Shown, rounded
from saesteer.sae.reports.chart import Chart

SHARES = ("fvu", "cosine", "ce_recovered", "ce_recovered_zero")
"""Figures that lie between 0 and 1, unless an SAE is worse than nothing."""


class Metrics(Shown, dict[str, Any]):
    """The figures of an SAE on held-out text, by the names of `metrics.json`."""

    def _facts(self) -> dict[str, Any]:
        figures = {name: rounded(self[name]["value"]) for name in ("fvu", "l0", "ce_recovered")}
        return {
            "sae": self["sae"]["source"],
            "layer": self["layer"],
            "tokens": self["tokens"],
            **figures,
            "dead": rounded(self["dead_fraction"]),
        }

    def intervals(self) -> dict[str, dict[str, float]]:
        """The figures that carry an interval: `value`, `low` and `high` of each."""
        return {
            name: {key: value[key] for key in ("value", "low", "high")}
            for name, value in self.items()
            if isinstance(value, dict) and {"value", "low", "high"} <= set(value)
        }

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each figure, its value and its interval.

        Figures without an interval have None there. Needs pandas.
        """
        import pandas

        single = {
            name: {"value": value, "low": None, "high": None}
            for name, value in self.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "layer"
        }
        return pandas.DataFrame.from_dict({**self.intervals(), **single}, orient="index")

    def plot(self) -> Chart:
        """The figures between 0 and 1 with their intervals, as bars."""
        from saesteer.sae.reports.svg import Bar, bars

        rows = []
        for name, figure in self.intervals().items():
            if name in SHARES:
                value, low, high = (min(max(one, 0.0), 1.0) for one in figure.values())
                rows.append(Bar(name, value, low, high))
        title = f"Metrics on {self['tokens']:,} tokens"
        return Chart(bars(rows, title), title)
