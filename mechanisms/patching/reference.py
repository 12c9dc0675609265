"""The slow twin of the engine: one set of patches a pass, over the whole row, with plain hooks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from saesteer.mechanisms.patching.sites import (
    Edit,
    Node,
    Patch,
    at_sites,
    run_model,
    tap_if_needed,
)
from saesteer.sae.model.language_model import LanguageModel


def patched_logits(lm: LanguageModel, ids: Sequence[int], patches: Sequence[Patch]) -> Tensor:
    """Logits `[vocabulary]` at the last token of a run with all of `patches` put in."""
    by_place: dict[tuple[int, str], list[Patch]] = {}
    for patch in patches:
        by_place.setdefault((patch.node.layer, patch.node.site), []).append(patch)

    def writer(own: list[Patch]) -> Edit:
        def write(values: Tensor) -> Tensor:
            values = values.clone()
            for patch in own:
                node, t = patch.node, patch.position
                if node.head is None:
                    values[0, t] = patch.value + (values[0, t] if patch.adds else 0)
                elif node.site == "z":
                    values[0, t, node.head] = patch.value
                elif node.site == "pattern":
                    values[0, node.head, t] = 0
                    values[0, node.head, t, : t + 1] = patch.value
                else:
                    values[0, node.head, t] = patch.value
            return values

        return write

    rows = torch.tensor([list(ids)], device=lm.device)
    nodes: list[Node] = [patch.node for patch in patches]
    with torch.no_grad(), tap_if_needed(lm, nodes) as tap:
        with at_sites(lm, tap, {place: writer(own) for place, own in by_place.items()}):
            logits: Tensor = run_model(lm, rows, use_cache=False).logits[0, -1]
    return logits
