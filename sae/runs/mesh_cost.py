"""What training together costs each process: memory, and bytes sent in a step, by formula.

Legend: N processes, S of them share the latents out (`latent_parts`) and D = N / S the rows of a
batch (`row_parts`); F latents, I and O widths read and written, B rows of a batch of all. A ring of
n processes that adds up x bytes sends 2 (n - 1) / n x from each; one that adds up and leaves each
its part, or gathers parts, half of that.
"""

import math
from dataclasses import dataclass

from saesteer.sae.config import TrainConfig
from saesteer.sae.training.architecture import Architecture

H100_FLOPS = 0.9 * 790e12
"""bfloat16 products of a second: nine tenths of what large products reach."""
H100_BYTES = 0.85 * 4.3e12
"""Bytes of its memory that streams move in a second."""
NVLINK_BYTES = 0.8 * 450e9
"""Bytes a second that a GPU sends within a node."""
NETWORK_BYTES = 0.8 * 50e9
"""The same over a link of 400 Gb/s."""

_FLOAT, _COUNT = 4, 8


@dataclass(frozen=True, kw_only=True)
class MeshCost:
    """Of one SAE, for each process; bytes."""

    weights: int
    """Rows of its latents as products take them, and float32 rows of its own where those differ."""
    moments: int
    """Both, of its own rows."""
    gradients: int
    """Of all rows of its latents, and of its own rows added up."""
    sent_gradients: int
    """A step, to the processes that move the rows."""
    sent_weights: int
    """A step, of the rows that it has moved."""
    sent_reconstructions: int
    """A step, partial reconstructions, to the processes with other latents."""
    sent_choices: int
    """A step, offers for the largest pre-activations."""
    sent_counts: int
    """A step, how often latents fired, and sums of a few numbers."""
    sent_rows: int
    """A step, rows of activations: from who reads to who holds, and to who trains."""
    flops: int
    """Of the encoder's product, the one that is not sparse."""

    @property
    def memory(self) -> int:
        """What it holds besides activations."""
        return self.weights + self.moments + self.gradients

    @property
    def sent(self) -> int:
        """A step, all together."""
        return self.sent_step + self.sent_rows

    @property
    def sent_step(self) -> int:
        """A step, by the trainer."""
        parameters = self.sent_gradients + self.sent_weights
        return parameters + self.sent_reconstructions + self.sent_choices + self.sent_counts


def mesh_cost(
    architecture: Architecture,
    d_in: int,
    d_out: int,
    d_sae: int,
    config: TrainConfig,
    *,
    world: int,
    product_bytes: int,
    row_bytes: int,
) -> MeshCost:
    """The cost for one of `world` processes.

    Args:
        product_bytes: of an element of a matrix in products, 4 or 2.
        row_bytes: of a row of the shuffle buffer.
    """
    latent_parts = config.latent_shards
    row_parts = world // latent_parts
    own, rows = d_sae // latent_parts, config.batch_tokens // row_parts
    shapes = architecture.shapes(d_in, d_out, d_sae)
    by_latent = {n: s for n, s in shapes.items() if n not in architecture.of_no_latent}
    others = sum(math.prod(s) for n, s in shapes.items() if n in architecture.of_no_latent)
    in_rows = own * sum(shape[1] for shape in by_latent.values() if len(shape) == 2)
    in_vectors = own * sum(len(shape) == 1 for shape in by_latent.values())
    alone = world == 1
    rounded = product_bytes != _FLOAT
    moment = 2 if config.moments == "bfloat16" else _FLOAT

    part, latents = (row_parts - 1) / row_parts, (latent_parts - 1) / latent_parts
    everyone = (world - 1) / world
    held = in_rows + in_vectors
    moved = held // row_parts
    passes = math.ceil(config.batch_tokens / (config.micro_batch_tokens or config.batch_tokens))
    levels = max(1, len(getattr(architecture, "prefixes", ())))
    k = int(getattr(architecture, "k", 0))
    chooses_rows = hasattr(architecture, "k") and not architecture.calibrates
    slots = min(k, own)
    choices = float((latent_parts - 1) * rows * slots * _FLOAT if chooses_rows else 0)
    if architecture.calibrates and not alone:
        # Counts by digit of three digits of eleven bits (the last has ten), and a few numbers.
        digits = (2048 + 2048 + 1024) * _COUNT
        choices = passes * (2 * everyone * digits)
    return MeshCost(
        weights=in_rows * product_bytes
        + in_vectors * _FLOAT
        + (moved * _FLOAT if rounded else 0)
        + others * _FLOAT,
        moments=2 * (in_rows // row_parts * moment + in_vectors // row_parts * _FLOAT)
        + 2 * others * _FLOAT,
        gradients=0 if alone and not rounded else (held + others + moved) * _FLOAT,
        sent_gradients=round(part * held * _FLOAT + 2 * part * others * _FLOAT),
        sent_weights=round(part * (in_rows * product_bytes + in_vectors * _FLOAT)),
        sent_reconstructions=round(2 * latents * rows * levels * d_out * _FLOAT),
        sent_choices=round(choices),
        sent_counts=round(
            2 * part * (own * _COUNT + passes * (d_out + 1) * _FLOAT) + 2 * everyone * 3 * _COUNT
        ),
        sent_rows=sent_rows(config, world, row_bytes),
        flops=2 * rows * own * d_in,
    )


def sent_rows(config: TrainConfig, world: int, row_bytes: int) -> int:
    """Bytes of activations that a process sends in a step, on average: each row goes to the process
    that holds its slot, and from there to those that train on it."""
    moves = 1 + config.latent_shards
    return round((world - 1) / world * moves * config.batch_tokens * row_bytes / world)


def h100_step_seconds(cost: MeshCost, link_bytes: float) -> float:
    """A prediction, not a measurement: the encoder's product, three passes over weights and
    gradients, Adam over its own rows, and what is sent over links of `link_bytes` a second, one
    after the other."""
    adam = cost.moments * 2 + cost.gradients * 3 + cost.weights * 2
    return cost.flops / H100_FLOPS + adam / H100_BYTES + cost.sent_step / link_bytes
