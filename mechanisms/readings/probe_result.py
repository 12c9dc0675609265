"""What probes, clusters and moved centroids found."""

from dataclasses import asdict, dataclass
from typing import Any

from saesteer.mechanisms.reading_config import ProbeConfig


@dataclass(frozen=True, eq=False)
class ProbeReport:
    """Accuracy of telling labels apart, by position and layer."""

    model: dict[str, Any]
    config: ProbeConfig
    labels: tuple[str, ...]
    n_rows: int
    n_groups: int
    rows: tuple[dict[str, Any], ...]
    """at, layer, accuracy, low, high, permuted, selectivity."""
    bag_of_words: float
    mean_embedding: float
    seconds: float

    def __repr__(self) -> str:
        best = max(self.rows, key=lambda row: row["selectivity"])
        return (
            f"ProbeReport({len(self.labels)} labels, {self.n_groups} groups: accuracy "
            f"{best['accuracy']:.2f} at {best['at']} layer {best['layer']}, permuted "
            f"{best['permuted']:.2f}, bag of words {self.bag_of_words:.2f})"
        )

    def to_frame(self) -> Any:
        """A row for each position and layer, as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.rows)

    def document(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        return {"schema_version": 1, "kind": "probe", **_plain(self)}


@dataclass(frozen=True, eq=False)
class Clusters:
    """How states cluster, by model, position and layer."""

    models: tuple[dict[str, Any], ...]
    config: ProbeConfig
    at: tuple[str, ...]
    k: int
    n_rows: int
    rows: tuple[dict[str, Any], ...]
    """model, at, layer, and the figures of `cluster_states`."""
    accuracy: tuple[dict[str, Any], ...]
    """model, and the share of right answers by split."""
    unseen: tuple[dict[str, Any], ...]
    """at, layer, split, and the figures of `held_out_distances`, in the last model."""
    seconds: float

    def __repr__(self) -> str:
        last = [row for row in self.rows if row["model"] == self.rows[-1]["model"]]
        best = max(last, key=lambda row: max(row["ari_label"], row["within"]))
        return (
            f"Clusters({len(self.models)} models, {self.k} labels, {self.n_rows} rows; last at "
            f"{best['at']} layer {best['layer']}: ARI {best['ari_label']:.2f}, within inputs "
            f"{best['within']:.2f})"
        )

    def to_frame(self) -> Any:
        """A row for each model, position and layer, as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.rows)

    def document(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        return {"schema_version": 1, "kind": "clusters", **_plain(self)}


@dataclass(frozen=True, eq=False)
class Moves:
    """How often the answer followed a moved state."""

    model: dict[str, Any]
    config: ProbeConfig
    rows: tuple[dict[str, Any], ...]
    """at, layer, n, switched, low, high (Wilson), kept, random."""
    seconds: float

    def __repr__(self) -> str:
        best = max(self.rows, key=lambda row: row["switched"])
        return (
            f"Moves({best['at']} layer {best['layer']}: {best['switched']:.2f} switch, random "
            f"{best['random']:.2f})"
        )

    def to_frame(self) -> Any:
        """A row for each position and layer, as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.rows)

    def document(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        return {"schema_version": 1, "kind": "moves", **_plain(self)}


def _plain(result: Any) -> dict[str, Any]:
    values = {**vars(result)} if hasattr(result, "__dict__") else asdict(result)
    values["settings"] = asdict(values.pop("config"))
    return values
