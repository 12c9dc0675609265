"""How many bytes a run will write, computed from its settings alone. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

_FLOAT_BYTES = 4


def stored_dtype(asked: str | None, model_dtype: str) -> str:
    """The dtype of a harvest's shards: the one asked for, else bfloat16, or float32 for a float32
    model."""
    return asked or ("float32" if model_dtype == "float32" else "bfloat16")


def harvest_row_bytes(d_model: int, element_bytes: int, keep_positions: bool) -> int:
    """Bytes of one token of one layer in a shard: its activation and an int32 id, and, when asked,
    an int32 position and an int64 context."""
    return d_model * element_bytes + 4 + 12 * keep_positions


@dataclass(frozen=True)
class TrainFootprint:
    """Bytes of a run's files."""

    state_bytes: int
    """One saved state, at most: parameters, both moments, counters, the full shuffle buffer."""
    sae_bytes: int
    """All finished SAEs."""
    keep: int
    """States kept; the best one and the one being written are extra."""

    @property
    def total_bytes(self) -> int:
        """The most that the folder holds at any time."""
        return self.state_bytes * (self.keep + 2) + self.sae_bytes


def train_footprint(
    parameters: Sequence[int],
    d_saes: Sequence[int],
    d_model: int,
    *,
    buffer_tokens: int,
    batch_tokens: int,
    width: int,
    element_bytes: int,
    keep: int = 1,
) -> TrainFootprint:
    """The footprint of a run that trains several SAEs.

    Args:
        parameters: numbers that the optimiser moves, of each SAE.
        d_saes: latents of each.
        buffer_tokens: rows in the shuffle buffer.
        width: elements of a row: `d_model` times the number of hook points.
        element_bytes: bytes of an element in the buffer.
    """
    # Besides Adam's two moments: a counter per latent, the input's mean, and a few scalars.
    small = sum(8 * d_sae + _FLOAT_BYTES * d_model + 64 for d_sae in d_saes)
    # The buffer, the rows about to enter it, and a chunk of batches that have left it and wait.
    rows = buffer_tokens + batch_tokens + max(8192, 2 * batch_tokens)
    state = 3 * _FLOAT_BYTES * sum(parameters) + small + rows * width * element_bytes
    # Headers and JSON: names, shapes, settings, the position in the text.
    overhead = 65_536 + 4096 * len(d_saes)
    return TrainFootprint(state + overhead, _FLOAT_BYTES * sum(parameters) + overhead, keep)
