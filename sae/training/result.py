"""What `train` returns for each SAE: its record, its log, and the SAE itself."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saesteer.checkpoints.shown import Shown, rounded
from saesteer.sae.reports.chart import Chart

if TYPE_CHECKING:
    from saesteer.checkpoints.sparse_autoencoder import SAE


class Trained(Shown, dict[str, Any]):
    """One trained SAE. As a mapping it is the content of its `run.json`, with its `folder`."""

    def _facts(self) -> dict[str, Any]:
        sae, final = self["sae"], self["final"]
        return {
            "folder": str(self.folder),
            "layer": sae["layer"],
            "d_sae": sae["d_sae"],
            "k": sae.get("k"),
            "fvu": rounded(final.get("fvu")),
            "l0": rounded(final.get("l0")),
            "fvu_heldout": rounded(sae.get("fvu_heldout")),
            "dead": rounded(final.get("dead_fraction")),
        }

    @property
    def folder(self) -> Path:
        """Where the SAE lies."""
        return Path(self["folder"])

    @cached_property
    def sae(self) -> "SAE":
        """The trained SAE, on the CPU; opened at its first use."""
        from saesteer.checkpoints.sae_file import load_sae

        return load_sae(self.folder)

    @property
    def log(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        from saesteer.checkpoints.files import read_jsonl

        return read_jsonl(self.folder / "metrics.jsonl")

    def to_frame(self) -> Any:
        """The log as a pandas DataFrame, a row for each line, by `step`. Needs pandas."""
        import pandas

        return pandas.DataFrame(self.log).set_index("step")

    def plot(self, quantity: str = "fvu") -> Chart:
        """A quantity of the log by tokens: fvu, l0, dead_fraction, lr or tokens_per_second.

        Raises UsageError for a quantity that the log does not have.
        """
        from saesteer.checkpoints.errors import none_of
        from saesteer.sae.reports.svg import Point, curves

        rows = self.log
        known = sorted({name for row in rows for name in row} - {"step", "tokens"})
        if quantity not in known:
            raise none_of("`quantity`", known, quantity)
        points = [
            Point(float(row["tokens"]), float(row[quantity]), quantity, f"{row[quantity]:.4g}")
            for row in rows
            if row.get(quantity) is not None
        ]
        title = f"{quantity} by tokens"
        return Chart(curves(points, title, x_label="tokens"), title)
