"""Rows that run through the model together, each with its own beginning and end."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.sae.model.language_model import LanguageModel, uncompiled
from saesteer.sae.text.prompts import pad_left
from saesteer.steering.serving.caches import CacheKind, join_caches, keep_rows
from saesteer.steering.serving.generation import Row
from saesteer.steering.serving.row_edits import BatchHooks, RowInPass


class Batch:
    """Rows, their cache and the mask of their columns; all rows end in the last column."""

    def __init__(self, lm: LanguageModel, kind: CacheKind, hooks: BatchHooks) -> None:
        self._lm, self._kind, self._hooks = lm, kind, hooks
        self.rows: list[Row] = []
        self._cache: Any = kind.new()
        self._mask = torch.zeros((0, 0), dtype=torch.int64)

    def begin(self, rows: Sequence[Row]) -> Float[Tensor, "rows vocabulary"]:
        """Run the prompts of the first rows; returns the logits after each, in float32.

        The edits of the rows have begun their pass already.
        """
        self.rows = list(rows)
        ids, self._mask = pad_left(self._lm, [row.prompt.token_ids for row in rows])
        return self._run(ids, [len(row.prompt.token_ids) for row in rows])

    def step(self) -> Float[Tensor, "rows vocabulary"]:
        """Run the last token of each row; returns the logits after it, in float32."""
        ids = torch.tensor([[row.new[-1]] for row in self.rows], device=self._lm.device)
        self._mask = torch.cat([self._mask, self._mask.new_ones((len(self.rows), 1))], dim=1)
        for number, row in enumerate(self.rows):
            if row.edits is not None:
                row.edits.begin_pass(ids[number : number + 1], row.length - 1)
        return self._run(ids, [1] * len(self.rows))

    def join(self, other: "Batch") -> None:
        """Take the rows of another batch in."""
        join_caches(self._cache, other._cache)
        width = max(self._mask.shape[1], other._mask.shape[1])
        self._mask = torch.cat([_wide(self._mask, width), _wide(other._mask, width)])
        self.rows += other.rows

    def drop(self, gone: set[int]) -> None:
        """Let rows go, by their place, and with them the columns that only they needed."""
        kept = [number for number in range(len(self.rows)) if number not in gone]
        self.rows = [self.rows[number] for number in kept]
        if not kept:
            self._cache = None
            return
        rows = torch.tensor(kept, device=self._mask.device)
        columns = int(self._mask[rows].sum(dim=1).max())
        cut = self._mask.shape[1] - columns
        self._mask = self._mask[rows, cut:]
        if self._kind.joins:
            keep_rows(self._cache, rows, cut)

    def _run(
        self, ids: Int[Tensor, "rows columns"], counts: Sequence[int]
    ) -> Float[Tensor, "rows vocabulary"]:
        concerned = [
            RowInPass(number, count, row.edits, row.watch)
            for number, (row, count) in enumerate(zip(self.rows, counts, strict=True))
            if row.edits is not None or row.watch is not None
        ]
        model = uncompiled(self._lm.model)
        with self._hooks.a_pass(concerned, ids.shape[1]):
            output = model(**self._kind.arguments(self._cache, ids, self._mask))
        # As `generate` does: the same token where two logits are equal in float32.
        return output.logits[:, -1].float()  # type: ignore[no-any-return]


def _wide(mask: Int[Tensor, "rows columns"], width: int) -> Int[Tensor, "rows width"]:
    missing = width - mask.shape[1]
    return torch.nn.functional.pad(mask, (missing, 0)) if missing else mask
