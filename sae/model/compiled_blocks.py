"""Runs blocks of a model through `torch.compile` inside a `with` block."""

from collections.abc import Sequence
from typing import Any

import torch

from saesteer.sae.model.hooks import HookPoint, last_block
from saesteer.sae.model.language_model import LanguageModel


class CompiledBlocks:
    """A context in which the blocks up to the last of `points` run compiled; outside they do not.

    All blocks of one shape share one compilation. A block with a hook point inside it stays as it
    is: compiled code does not see hooks that come and go.
    """

    def __init__(self, lm: LanguageModel, points: Sequence[HookPoint]) -> None:
        last = last_block(lm, points)
        blocks = list(lm.blocks) if last is None else list(lm.blocks[: last + 1])
        inside = {
            id(block)
            for block in blocks
            for point in points
            if any(point.module is part for part in block.modules() if part is not block)
        }
        self._blocks = [block for block in blocks if id(block) not in inside]
        self._compiled = [torch.compile(block.forward, dynamic=False) for block in self._blocks]
        self._before: list[Any] = []

    def __enter__(self) -> None:
        # accelerate sets `forward` on modules itself; `__exit__` restores that.
        self._before = [vars(block).get("forward") for block in self._blocks]
        for block, forward in zip(self._blocks, self._compiled, strict=True):
            block.forward = forward

    def __exit__(self, *_: object) -> None:
        for block, before in zip(self._blocks, self._before, strict=True):
            if before is None:
                del block.forward
            else:
                block.forward = before
