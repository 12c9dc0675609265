"""Key-value caches of rows that begin and end at different times.

Rows are padded on the left and end in the same column, so that one pass appends a token to each.
A cache holds keys that are already rotated by the position of their token; positions are counted in
real tokens of a row. Moving a row to other columns therefore changes none of its values: columns in
front of it are masked, and have weight 0 exactly.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saesteer.sae.model.language_model import LanguageModel, uncompiled


class CacheKind:
    """How a model is given its cache, and whether the caches of several rows can be joined."""

    def __init__(self, lm: LanguageModel) -> None:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        model = uncompiled(lm.model)
        names = inspect.signature(model.forward).parameters
        self._config = model.config
        self._name = "cache" if "cache" in names else "past_key_values"
        self._places = "position_ids" in names
        self._last_only = "logits_to_keep" in names
        layers = DynamicCache(config=model.config).layers
        self.joins = all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
        )
        """False for models that keep states beside keys and values (Mamba and hybrids): their rows
        run one by one."""

    def new(self) -> Any:
        """An empty cache.

        One that joins keeps every column in every layer: layers with a sliding window would cut
        rows at different tokens. The mask limits what such a layer sees.
        """
        from transformers import DynamicCache

        return DynamicCache() if self.joins else DynamicCache(config=self._config)

    def arguments(
        self,
        cache: Any,
        ids: Int[Tensor, "rows columns"],
        mask: Int[Tensor, "rows all_columns"],
    ) -> dict[str, Any]:
        """The arguments of the pass that appends `ids`; `mask` is of all columns so far."""
        given: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            "use_cache": True,
            self._name: cache,
        }
        if self._places:
            places = (mask.cumsum(dim=1) - 1).clamp(min=0)
            given["position_ids"] = places[:, -ids.shape[1] :]
        if self._last_only:
            given["logits_to_keep"] = 1
        return given


def join_caches(first: Any, second: Any) -> None:
    """Put the rows of `second` behind those of `first`, each padded on the left to the longer."""
    for ours, theirs in zip(first.layers, second.layers, strict=True):
        width = max(ours.keys.shape[-2], theirs.keys.shape[-2])
        ours.keys = torch.cat([_wide(ours.keys, width), _wide(theirs.keys, width)])
        ours.values = torch.cat([_wide(ours.values, width), _wide(theirs.values, width)])


def keep_rows(cache: Any, rows: Int[Tensor, " kept"], cut: int) -> None:
    """Keep some rows of a cache, without its first `cut` columns."""
    for layer in cache.layers:
        layer.keys = layer.keys[rows, :, cut:]
        layer.values = layer.values[rows, :, cut:]


def _wide(states: Tensor, width: int) -> Tensor:
    """`[rows, heads, columns, d_head]` with zeros in front, `width` columns in all."""
    missing = width - states.shape[-2]
    return torch.nn.functional.pad(states, (0, 0, missing, 0)) if missing else states
