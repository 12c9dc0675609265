"""Several folders of shards that hold the activations of the same tokens, read as one.

Of one model at several sites, for transcoders; of two models, for crosscoders. Row by row they have
the same `token_ids`, which is proved when they are opened.
"""

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.places import Place, of_model
from saesteer.checkpoints.shards import ShardReader


class JointShards:
    """Shards of several folders with one numbering of rows; see `ShardReader` for the names.

    The places of the first folder keep their names. So do those of others of the same model;
    another model's have its number: `(12, "resid_post@2")`.
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        """Open two or more folders.

        Raises:
            UserError: one cannot be read, they hold different tokens, or the same place twice.
        """
        self.readers = [ShardReader(folder) for folder in folders]
        first = self.readers[0]
        self.folder = first.folder
        self.tokens, self.shard_tokens = first.tokens, first.shard_tokens
        self.dtype: torch.dtype = reduce(torch.promote_types, (r.dtype for r in self.readers))
        self.models = [model_of(reader) for reader in self.readers]
        self.two_models = any(model != self.models[0] for model in self.models[1:])
        self._at: dict[Place, tuple[ShardReader, Place]] = {}
        self.of_reader: list[list[Place]] = []
        """The places of each folder."""
        for number, (reader, model) in enumerate(zip(self.readers, self.models, strict=True)):
            other = model != self.models[0]
            named = {of_model(at, number) if other else at: at for at in reader.places}
            twice = sorted(named.keys() & self._at.keys())
            if twice:
                raise UserError(
                    f"`activations` {reader.folder} and {self._at[twice[0]][0].folder} both hold "
                    f"layer {twice[0][0]} {twice[0][1]} of one model: give folders of different "
                    "layers, sites or models"
                )
            self._at |= {at: (reader, own) for at, own in named.items()}
            self.of_reader.append(list(named))
        self._check_tokens()

    @property
    def places(self) -> list[Place]:
        """Every place of every folder."""
        return list(self._at)

    def __len__(self) -> int:
        return len(self.shard_tokens)

    def width(self, place: Place) -> int:
        """d_model of a place's model."""
        return self._at[place][0].d_model

    def manifest_of(self, place: Place) -> dict[str, Any]:
        """The manifest of the folder that holds a place."""
        return self._at[place][0].manifest

    def shard(
        self, index: int, layer: int, site: str
    ) -> tuple[Float[Tensor, "tokens d_model"], Int[Tensor, " tokens"]]:
        """Activations and token ids of a shard at one place."""
        reader, own = self._at[layer, site]
        activations, token_ids = reader.shard(index, *own)
        return activations.to(self.dtype), token_ids

    def read_ahead(self, index: int, places: Sequence[Place]) -> None:
        """Ask the operating system to bring a shard into memory, without waiting for it."""
        for place in places:
            reader, own = self._at[place]
            reader.read_ahead(index, [own])

    def _check_tokens(self) -> None:
        first = self.readers[0]
        for other in self.readers[1:]:
            both = f"`activations` {first.folder} and {other.folder}"
            if other.shard_tokens != first.shard_tokens:
                raise UserError(
                    f"{both} hold {first.tokens} and {other.tokens} rows in shards of "
                    f"{first.shard_tokens[:3]} and {other.shard_tokens[:3]}, and must hold the "
                    "same tokens: harvest both from the same text with the same settings"
                )
            for index in range(len(first)):
                ours, theirs = (r.columns(index)["token_ids"] for r in (first, other))
                differing = (ours != theirs).nonzero()
                if len(differing):
                    row = int(differing[0])
                    raise UserError(
                        f"{both} differ in their token_ids, first in row {row} of shard {index} "
                        f"({int(ours[row])} and {int(theirs[row])}): harvest both from the same "
                        "text with the same tokenizer and settings"
                    )


def model_of(reader: ShardReader) -> str:
    """What identifies the model of some shards: the hash of its weights, else its name."""
    model = reader.manifest["model"]
    if isinstance(model, dict):
        return str(model.get("hash") or model.get("name"))
    return str(model)
