"""Rows of activations for the benchmarks of quality: one scaling and one order for everyone.

Training rows and held-out rows come from shards (`saesteer harvest`, or `saesteer.sae.synthesise`).
They are centred on nothing and scaled once, so that the mean of |x|^2 is 1; every tool's own
normaliser is then off, or finds nothing left to do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from saesteer.checkpoints.shards import ShardReader
from saesteer.sae.activations.sinks import SinkFilter

_BLOCK = 8192


@dataclass(frozen=True)
class Rows:
    """Rows of one hook point, sinks left out, in the stored dtype, in the order of the shards."""

    values: Tensor
    """`[rows, d_model]`, not scaled."""
    units: Tensor
    """`[rows]`: the context that a row is of, or the row itself: what a bootstrap resamples."""

    def __len__(self) -> int:
        return len(self.values)

    @property
    def factor(self) -> float:
        """What the rows are multiplied by so that the mean of |x|^2 is 1."""
        squares = sum(float(part.double().square().sum()) for part in self.values.split(_BLOCK))
        return float((len(self) / squares) ** 0.5)

    def batches(self, steps: int, batch: int, seed: int) -> Iterator[Tensor]:
        """`steps` batches `[batch, d_model]` in float32, not scaled: every epoch in a new order."""
        rng = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            while len(order) < batch:
                order = torch.cat([order, torch.randperm(len(self), generator=rng)])
            yield self.values[order[:batch]].float()
            order = order[batch:]


def load_rows(folder: Path, layer: int | None = None, most: int | None = None) -> Rows:
    """The rows of one layer of a folder of shards."""
    reader = ShardReader(folder)
    place = reader.place(layer)
    sinks = SinkFilter()
    values, units, count = [], [], 0
    for index in range(len(reader)):
        stored = reader.shard(index, *place)[0]
        contexts = reader.columns(index).get("contexts")
        if contexts is None:
            contexts = count + torch.arange(len(stored))
        for rows, owners in zip(stored.split(_BLOCK), contexts.split(_BLOCK), strict=True):
            keep = sinks.keep({place: rows})
            values.append(rows[keep])
            units.append(owners[keep])
        count += len(stored)
        if most is not None and count >= most:
            break
    return Rows(torch.cat(values)[:most], torch.cat(units)[:most])
