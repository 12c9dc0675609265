"""Synthetic features: their directions, when they fire together, and samples of activations.

Which features fire is decided in three steps. Correlated normal numbers are compared with the
threshold of each feature's rate (a Gaussian copula of low rank). Down each tree, a feature is
silenced where its parent is silent. Of siblings that fire at once, one drawn at random stays.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saesteer.checkpoints import files
from saesteer.checkpoints.errors import UserError
from saesteer.sae.synthetic.config import SyntheticConfig

TRUTH = "truth.safetensors"
_SETTINGS = "truth.json"
# Rounds after which superposed directions are a tight frame to three digits.
_ROUNDS = 10
# Numbers held at once for a sample.
_NUMBERS = 2**23

TRAINING, SCORING = 0, 1
"""Kinds of samples: rows to train on, and rows that scores are taken on."""


@dataclass(frozen=True)
class Sample:
    """Activations and the features that they are made of."""

    x: Float[Tensor, "rows d_model"]
    acts: Float[Tensor, "rows features"]
    """0 where a feature does not fire."""


@dataclass(frozen=True)
class SyntheticFeatures:
    """The truth behind synthetic activations: x = acts @ directions + bias."""

    config: SyntheticConfig
    directions: Float[Tensor, "features d_model"]
    """Rows of length 1."""
    bias: Float[Tensor, " d_model"]
    rates: Float[Tensor, " features"]
    """What a feature's rate would be if none of its siblings excluded it."""
    parents: Int[Tensor, " features"]
    """-1 for features that have none."""
    causes: Float[Tensor, "features rank"]
    """How a feature follows each hidden cause."""
    magnitude: Float[Tensor, " features"]
    """Mean magnitude of a firing feature."""
    spread: Float[Tensor, " features"]
    """Its standard deviation."""

    @staticmethod
    def draw(config: SyntheticConfig) -> "SyntheticFeatures":
        """Features that depend on `config` alone."""
        rng = torch.Generator().manual_seed(config.seed)
        count = config.features
        ranks = torch.arange(1, count + 1, dtype=torch.float64) ** -config.zipf
        falling = (ranks - ranks[-1]) / max(1e-12, float(ranks[0] - ranks[-1]))
        rates = config.lowest_rate + (config.highest_rate - config.lowest_rate) * falling
        bias = torch.randn(config.d_model, generator=rng)
        # Frequent features are a little stronger, by a quarter from first to last.
        magnitude = torch.linspace(1.25, 1.0, count)
        spread = config.magnitude_spread * (1 + torch.randn(count, generator=rng)).abs()
        causes = config.correlation * torch.randn(count, config.correlation_rank, generator=rng)
        shared = causes.square().sum(dim=1, keepdim=True)
        causes = torch.where(shared > 0.99, causes * (0.99 / shared).sqrt(), causes)
        return SyntheticFeatures(
            config=config,
            directions=_directions(count, config.d_model, rng),
            bias=bias * (config.bias_length / bias.norm()),
            rates=rates.float(),
            parents=_parents(config),
            causes=causes,
            magnitude=magnitude,
            spread=spread * magnitude,
        )

    @property
    def rows_at_once(self) -> int:
        """How many rows to ask `sample` for, by the memory that they take."""
        return max(1, _NUMBERS // len(self.rates))

    def sample(self, rows: int, kind: int, number: int) -> Sample:
        """Rows that depend on the features, `kind` and `number`: other numbers give other rows."""
        rng = torch.Generator().manual_seed(_mixed((self.config.seed, kind, number)))
        fires = self._fires(rows, rng)
        noise = torch.randn(rows, len(self.rates), generator=rng)
        acts = torch.where(fires, (self.magnitude + self.spread * noise).clamp(min=0), 0.0)
        return Sample(acts @ self.directions + self.bias, acts)

    def _fires(self, rows: int, rng: torch.Generator) -> Bool[Tensor, "rows features"]:
        own = (1 - self.causes.square().sum(dim=1)).sqrt()
        normal = torch.randn(rows, len(self.rates), generator=rng) * own
        if self.causes.shape[1]:
            normal += torch.randn(rows, self.causes.shape[1], generator=rng) @ self.causes.T
        # Under its parent a feature fires as often as its rate asks for, overall.
        has_parent = self.parents >= 0
        given = torch.where(has_parent, self.rates[self.parents.clamp(min=0)], 1.0)
        wanted = (self.rates / given).clamp(max=1 - 1e-6).double()
        fires: Tensor = normal > torch.special.ndtri(1 - wanted).float()
        for siblings in self._levels():
            parents = self.parents[siblings[:, 0]]
            below = fires[:, siblings] & fires[:, parents, None]
            if self.config.exclusive:
                below = _one_of(below, rng)
            fires[:, siblings] = below
        return fires

    def _levels(self) -> list[Int[Tensor, "groups siblings"]]:
        """The features of each level below the roots, one row for the children of a feature."""
        config = self.config
        first, groups, levels = config.roots, config.roots, []
        for _ in range(config.depth if config.roots else 0):
            count = groups * config.branching
            levels.append(torch.arange(first, first + count).view(groups, config.branching))
            first, groups = first + count, count
        return levels

    def tensors(self) -> dict[str, Tensor]:
        """All that `config` does not say, by name."""
        names = "directions bias rates parents causes magnitude spread".split()
        return {name: getattr(self, name) for name in names}

    def save(self, folder: Path) -> None:
        """Write `truth.safetensors` and `truth.json`."""
        files.write_tensors(folder / TRUTH, {n: t.contiguous() for n, t in self.tensors().items()})
        files.write_json(folder / _SETTINGS, asdict(self.config))

    @staticmethod
    def load(folder: str | Path) -> "SyntheticFeatures":
        """The features behind the shards in a folder. Raises UserError where there are none."""
        folder = Path(folder)
        if not (folder / TRUTH).is_file() or not (folder / _SETTINGS).is_file():
            raise UserError(f"`truth` {folder} holds no {TRUTH}: give a folder made by synthesise")
        settings: dict[str, Any] = files.read_json(folder / _SETTINGS)
        tensors = files.read_tensors(folder / TRUTH)
        return SyntheticFeatures(config=SyntheticConfig(**settings), **tensors)


def _directions(count: int, width: int, rng: torch.Generator) -> Float[Tensor, "count width"]:
    """Directions as far from each other as they get: orthogonal, or a tight frame of unit rows.

    A frame is tight when sum_ij <d_i, d_j>^2 is least for unit rows. Whitening and shortening to
    length 1 in turn leads there, with matrices of d_model x d_model only.
    """
    rows = torch.randn(count, width, generator=rng, dtype=torch.float64)
    if count <= width:
        orthogonal: Tensor = torch.linalg.qr(rows.T).Q
        return orthogonal.T.float().contiguous()
    for _ in range(_ROUNDS):
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        rows = torch.nn.functional.normalize(rows @ (vectors / values.sqrt()) @ vectors.T, dim=1)
    return rows.float()


def _parents(config: SyntheticConfig) -> Int[Tensor, " features"]:
    """Level by level, so that features near a root have the higher rates."""
    parents = torch.full((config.features,), -1)
    inner = config.in_trees - config.roots
    if inner:
        parents[config.roots : config.in_trees] = torch.arange(inner) // config.branching
    return parents


def _one_of(
    fires: Bool[Tensor, "rows groups siblings"], rng: torch.Generator
) -> Bool[Tensor, "rows groups siblings"]:
    """Where several siblings fire, one of them."""
    crowded = fires.sum(dim=2) > 1
    several = fires[crowded]
    keys = torch.rand(several.shape, generator=rng) * several
    alone = torch.zeros_like(several).scatter_(1, keys.argmax(dim=1, keepdim=True), True)
    fires = fires.clone()
    fires[crowded] = alone
    return fires


def _mixed(seeds: tuple[int, ...]) -> int:
    """One seed from several, such that no two tuples meet by adding up."""
    import numpy as np

    return int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> np.uint64(1))
