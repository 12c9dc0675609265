"""What a trace found: masses of tokens, heads and routes."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from saesteer.mechanisms.reading_config import TraceConfig
from saesteer.mechanisms.statistics import (
    FEWEST_GROUPS,
    bootstrap_ratio,
    grouped,
    sign_p_values,
)

Array = np.ndarray
CAUTION = (
    "Masses are of this pass, with attention patterns, norms and gates taken as they were: they "
    "say how the logit came about, not what would happen if something changed."
)


@dataclass(frozen=True)
class Route:
    """A way from the answer back to an embedding."""

    hops: tuple[tuple[int, int, int, int], ...]
    """(block, head, token that reads, token that is read), from the answer backwards."""
    token: int
    """Where it ends."""
    mass: float


@dataclass(frozen=True, eq=False)
class Trace:
    """An exact account of one logit; see `routes.tracing`."""

    model: dict[str, Any]
    config: TraceConfig
    prompt: str
    tokens: tuple[str, ...]
    answer: str
    wrong: str | None
    logit: float
    """m: the answer's logit minus the wrong one's, or minus the vocabulary's mean."""
    biases: float
    token_mass: Array
    stream_mass: Array
    mlp_mass: Array
    head_mass: Array
    read_mass: Array
    routes: tuple[Route, ...]
    lost: float
    """Mass of dropped routes, added up by size."""
    seconds: float

    def __repr__(self) -> str:
        best = int(np.abs(self.token_mass).argmax())
        return (
            f"Trace({self.answer!r} {self.logit:+.3f}, largest token {self.tokens[best]!r} "
            f"{self.token_mass[best]:+.3f}, {len(self.routes)} routes explain {self.explained:.2f})"
        )

    @property
    def gap(self) -> float:
        """m minus what tokens and biases add up to: rounding."""
        return float(self.logit - self.biases - self.token_mass.sum())

    @property
    def explained(self) -> float:
        """Share of the mass of the first block's input (embeddings, positions with them) that the
        routes found add up to."""
        total = float(self.stream_mass[0].sum())
        return sum(route.mass for route in self.routes) / total if total else float("nan")

    def to_frame(self) -> Any:
        """Routes as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "route": self.name(route),
                "mass": route.mass,
                "share": route.mass / self.logit if self.logit else None,
                "token": route.token,
                "hops": [list(hop) for hop in route.hops],
            }
            for route in self.routes
        ]

    def name(self, route: Route) -> str:
        """A route in words, from the embedding to the answer."""
        steps = [f"{self.tokens[route.token]}@{route.token}"]
        for layer, head, reader, _ in reversed(route.hops):
            steps.append(f"({layer}.{head}) {self.tokens[reader]}@{reader}")
        return " > ".join(steps)

    def document(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        return {
            "schema_version": 1,
            "model": self.model,
            "settings": asdict(self.config),
            "prompt": self.prompt,
            "tokens": list(self.tokens),
            "answer": self.answer,
            "wrong": self.wrong,
            "logit": self.logit,
            "biases": self.biases,
            "gap": self.gap,
            "explained": self.explained,
            "lost": self.lost,
            "token_mass": self.token_mass.tolist(),
            "stream_mass": self.stream_mass.tolist(),
            "mlp_mass": self.mlp_mass.tolist(),
            "head_mass": self.head_mass.tolist(),
            "read_mass": self.read_mass.tolist(),
            "routes": self._rows(),
            "caution": CAUTION,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, eq=False)
class TraceComparison:
    """Masses that heads read at one position, in two tasks on the same queries."""

    model: dict[str, Any]
    config: TraceConfig
    at: str
    clean: Array
    corrupt: Array
    """`[pairs, L, H]`, in logits."""
    logits: tuple[float, float]
    """Mean of m in the clean and the corrupt prompts."""
    groups: tuple[str, ...]
    dropped: tuple[str, ...]
    seconds: float

    def __repr__(self) -> str:
        best = max(self.summary, key=lambda row: abs(row["difference"]))
        return (
            f"TraceComparison({len(self.clean)} pairs, from {self.at}: head "
            f"{best['layer']}.{best['head']} {best['difference']:+.3f})"
        )

    @cached_property
    def summary(self) -> list[dict[str, Any]]:
        """A row for each head; intervals and p are None with fewer than eight groups."""
        from scipy.stats import false_discovery_control

        n, layers, heads = self.clean.shape
        gaps = (self.clean - self.corrupt).reshape(n, -1)
        sums, counts = grouped(gaps, self.groups)
        low, high = bootstrap_ratio(sums, counts, seed=self.config.seed)
        p = false_discovery_control(sign_p_values(sums))
        enough = len(set(self.groups)) >= FEWEST_GROUPS
        return [
            {
                "layer": i // heads,
                "head": i % heads,
                "clean": float(self.clean[:, i // heads, i % heads].mean()),
                "corrupt": float(self.corrupt[:, i // heads, i % heads].mean()),
                "difference": float(gaps[:, i].mean()),
                "low": float(low[i]) if enough else None,
                "high": float(high[i]) if enough else None,
                "p_adjusted": float(p[i]) if enough else None,
            }
            for i in range(layers * heads)
        ]

    def to_frame(self) -> Any:
        """The summary as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.summary)

    def document(self) -> dict[str, Any]:
        """Everything but single pairs, JSON-ready."""
        return {
            "schema_version": 1,
            "model": self.model,
            "settings": asdict(self.config),
            "at": self.at,
            "n_pairs": len(self.clean),
            "n_groups": len(set(self.groups)),
            "dropped": list(self.dropped),
            "heads": self.summary,
            "clean_logit": self.logits[0],
            "corrupt_logit": self.logits[1],
            "caution": CAUTION,
            "seconds": self.seconds,
        }
