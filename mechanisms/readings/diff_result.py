"""What fine-tuning changed in the weights."""

from dataclasses import asdict, dataclass
from typing import Any

from saesteer.mechanisms.reading_config import DiffConfig


@dataclass(frozen=True, eq=False)
class WeightDiff:
    """Base against tuned, each beside the base plus noise of the same norm."""

    base: dict[str, Any]
    tuned: dict[str, Any]
    config: DiffConfig
    n_words: int
    verbs: tuple[str, ...]
    others: tuple[str, ...]
    pairs: tuple[tuple[dict[str, int], ...], ...]
    """By block and head: word pairs (each counted at both its words) of base, tuned, noise."""
    heads: tuple[dict[str, Any], ...]
    """By group of blocks: see `compare_words`."""
    concepts: tuple[dict[str, Any], ...]
    """By block: overlap of what the MLPs write, and words."""
    seconds: float

    def __repr__(self) -> str:
        told = []
        if self.heads:
            told.append(f"{len(self.heads)} groups of blocks by {self.n_words} words")
        if self.concepts:
            least = min(self.concepts, key=lambda row: row["overlap"] - row["noise"])
            told.append(
                f"MLPs turned most in block {least['layer']}: overlap {least['overlap']:.3f}, "
                f"noise {least['noise']:.3f}"
            )
        return f"WeightDiff({'; '.join(told)})"

    def to_frame(self) -> Any:
        """A row for each block, as a pandas DataFrame."""
        import pandas

        rows: list[dict[str, Any]] = [{"layer": i} for i in range(self.base["n_layers"])]
        for layer, heads in enumerate(self.pairs):
            for key in ("base", "tuned", "noise"):
                rows[layer][f"pairs_{key}"] = sum(head[key] for head in heads)
        for one in self.concepts:
            rows[one["layer"]] |= {
                key: one[key] for key in ("overlap", "noise", "between_blocks", "largest_angle")
            }
        return pandas.DataFrame(rows)

    def document(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        values = {**vars(self)}
        values["settings"] = asdict(values.pop("config"))
        return {"schema_version": 1, **values}
