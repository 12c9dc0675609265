"""Attention sinks: rows that are no text, and so long that they would drown it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saesteer.checkpoints.errors import NonFiniteError
from saesteer.checkpoints.places import Place


class NotFinite(NonFiniteError):
    """Rows of one hook point hold NaN or infinity; callers that know more say more."""

    def __init__(self, place: Place) -> None:
        super().__init__(
            f"the activations of layer {place[0]} {place[1]} are NaN or infinite: try `dtype` "
            "float32"
        )
        self.place = place


class SinkFilter:
    """Leaves out attention sinks: rows far longer than the median row.

    In SmolLM2 two rows of 512 hold 98 % of the variance; scale, b_dec and FVU would describe them
    alone. Medians are taken over blocks of rows and averaged over the blocks seen so far, for each
    hook point. A block is a context where contexts are known (`keep_contexts`), so that what is
    left out depends neither on the batch size nor on the number of processes.
    """

    def __init__(self, max_norm_ratio: float) -> None:
        self.max_norm_ratio = max_norm_ratio
        self.sums: dict[str, float] = {}
        self.blocks = 0

    def keep(
        self, activations: Mapping[Place, Float[Tensor, "tokens d_model"]]
    ) -> Bool[Tensor, " tokens"]:
        """True for rows that are no sink at any hook point, taking the rows as one block.

        Raises NotFinite.
        """
        device = next(iter(activations.values())).device
        norms = norms_of(activations)[:, None].cpu()
        return self.keep_contexts(
            norms, torch.ones(norms.shape[1:], dtype=torch.bool), list(activations)
        )[0].to(device)

    def keep_contexts(
        self,
        norms: Float[Tensor, "places contexts seq"],
        text: Bool[Tensor, "contexts seq"],
        places: list[Place],
    ) -> Bool[Tensor, "contexts seq"]:
        """True for text that is no sink at any hook point. Updates the running medians.

        All tensors are on the CPU. Raises NotFinite when a norm of text is not finite.
        """
        medians = block_medians(norms, text, places)
        limits = self.limits(medians, places)
        return text & (norms <= limits[:, :, None]).all(dim=0)

    def limits(
        self, medians: Float[Tensor, "places contexts"], places: list[Place]
    ) -> Float[Tensor, "places contexts"]:
        """The longest norm that passes in each context: up to and with it, none after it counts.

        A median of NaN stands for a context without text. Sums run in order, so that the same
        contexts give the same limits to the bit, however they are cut into calls.
        """
        counted = ~torch.isnan(medians[0])
        totals = self.blocks + counted.cumsum(0)
        limits = torch.empty(medians.shape, dtype=torch.float64)
        for at, (layer, site) in enumerate(places):
            name = f"{layer}/{site}"
            added = np.where(counted, medians[at].double(), 0.0)
            sums = np.cumsum(np.concatenate([[self.sums.get(name, 0.0)], added]))[1:]
            limits[at] = self.max_norm_ratio * torch.from_numpy(sums) / totals
            if len(sums):
                self.sums[name] = float(sums[-1])
        self.blocks += int(counted.sum())
        return limits

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "blocks": self.blocks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.blocks = dict(state["sums"]), state["blocks"]


def norms_of(activations: Mapping[Place, Float[Tensor, "..."]]) -> Float[Tensor, "places ..."]:
    """Length of every row in float32, one line a hook point, on the device of the first.

    The one transfer that a batch waits for: everything else is decided from these numbers.
    """
    lengths = [
        torch.linalg.vector_norm(rows, dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32))
        for rows in activations.values()
    ]
    first = lengths[0].device
    return torch.stack([length.float().to(first) for length in lengths])


def block_medians(
    norms: Float[Tensor, "places contexts seq"],
    text: Bool[Tensor, "contexts seq"],
    places: list[Place],
) -> Float[Tensor, "places contexts"]:
    """The median norm of each context's text; NaN without any. Raises NotFinite."""
    lengths = norms.masked_fill(~text, 0.0)
    for at, place in enumerate(places):
        # A norm beyond float32 belongs to no sane activation, either.
        if not torch.isfinite(lengths[at]).all():
            raise NotFinite(place)
    if not norms.shape[1] or not norms.shape[2]:
        return torch.full(norms.shape[:2], torch.nan)
    return norms.masked_fill(~text, torch.nan).nanmedian(dim=2).values
