"""Attention sinks: rows of activations so long that they would dominate every statistic."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saesteer.checkpoints.errors import NonFiniteError
from saesteer.checkpoints.places import Place
from saesteer.sae.config import TextConfig
from saesteer.sae.runs.processes import ALONE, Processes

MAX_NORM_RATIO = TextConfig().max_norm_ratio
"""What training leaves out by default, and what is left out wherever no ratio is asked for."""


class NotFinite(NonFiniteError):
    """Rows of one hook point hold NaN or infinity. Callers add what they know of model and text."""

    def __init__(self, place: Place) -> None:
        super().__init__(
            f"the activations of layer {place[0]} {place[1]} are NaN or infinite: try `dtype` "
            "float32"
        )
        self.place = place


class SinkFilter:
    """Leaves out attention sinks: rows far longer than rows usually are.

    In SmolLM2 two rows of 512 hold 98 % of the variance; scale, b_dec and FVU would describe them
    alone. One rule serves training, ranking, mean differences, metrics and damage:

    - Contexts come one after the other, and a prompt is a context. A row is a sink when it is
      longer than `max_norm_ratio` times the mean of the median norms of the contexts so far, its
      own included. What comes later changes nothing, and neither do the batch size and the number
      of processes.
    - The median is taken over the context's text that is not zero: where half of the rows are zeros
      (a layer that was switched off, padding that was stored), it would be 0 and all others sinks.
    - In a prompt special tokens
      and the first token are judged and not counted: the first is a sink in most models, and in a
      prompt of one or two tokens it would be the median.
    - A context in which nothing counts (a prompt of one token) is judged by those before it. Where
      there are none either, nothing is known and nothing is left out. Prompts are therefore read
      the longest first.
    - A row that is a sink at one hook point is left out at all of them.

    Rows of shards, whose contexts are not known any more, are judged in blocks (`keep`).
    """

    def __init__(self, max_norm_ratio: float = MAX_NORM_RATIO) -> None:
        self.max_norm_ratio = max_norm_ratio
        self.sums: dict[str, float] = {}
        self.blocks = 0

    def keep(
        self, activations: Mapping[Place, Float[Tensor, "tokens d_model"]]
    ) -> Bool[Tensor, " tokens"]:
        """True for rows that are no sink at any hook point, taking the rows as one context.

        Raises NotFinite.
        """
        device = next(iter(activations.values())).device
        norms = norms_of(activations)[:, None].cpu()
        everything = torch.ones(norms.shape[1:], dtype=torch.bool)
        return self.keep_contexts(norms, everything, list(activations))[0].to(device)

    def keep_contexts(
        self,
        norms: Float[Tensor, "places contexts seq"],
        text: Bool[Tensor, "contexts seq"],
        places: list[Place],
        *,
        usual: Bool[Tensor, "contexts seq"] | None = None,
        processes: Processes = ALONE,
        most: int = 0,
    ) -> Bool[Tensor, "contexts seq"]:
        """True for text that is no sink at any hook point. Updates the running medians.

        Args:
            usual: the text that medians are taken over; by default all of it.
            processes: those that share the contexts out; each calls this with its own.
            most: contexts that one of several processes may have.

        All tensors are on the CPU. Raises NotFinite when a norm of text is not finite.
        """
        medians = context_medians(norms, text, places, usual)
        everywhere = torch.stack([processes.interleave(row, most, torch.nan) for row in medians])
        limits = self.limits(everywhere, places)[:, processes.rank :: processes.world]
        return text & (norms <= limits[:, : len(text), None]).all(dim=0)

    def limits(
        self, medians: Float[Tensor, "places contexts"], places: list[Place]
    ) -> Float[Tensor, "places contexts"]:
        """The longest norm that passes in each context; infinite where nothing is known yet.

        A median of NaN stands for a context in which nothing counts. Sums run in order, so that the
        same contexts give the same limits to the bit, however they are cut into calls.
        """
        counted = ~torch.isnan(medians[0])
        totals = self.blocks + counted.cumsum(0)
        limits = torch.empty(medians.shape, dtype=torch.float64)
        for at, (layer, site) in enumerate(places):
            name = f"{layer}/{site}"
            added = np.where(counted, medians[at].double(), 0.0)
            sums = np.cumsum(np.concatenate([[self.sums.get(name, 0.0)], added]))[1:]
            limits[at] = self.max_norm_ratio * torch.from_numpy(sums) / totals
            # Nothing but zeros so far says nothing, either.
            limits[at, (totals == 0) | torch.from_numpy(sums == 0)] = torch.inf
            if len(sums):
                self.sums[name] = float(sums[-1])
        self.blocks += int(counted.sum())
        return limits

    def state_dict(self) -> dict[str, Any]:
        """The running sums of the medians, JSON-ready."""
        return {"sums": dict(self.sums), "blocks": self.blocks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.sums, self.blocks = dict(state["sums"]), state["blocks"]


def norms_of(activations: Mapping[Place, Float[Tensor, "..."]]) -> Float[Tensor, "places ..."]:
    """Length of every row in float32, for each hook point, on the device of the first.

    A batch waits for no other transfer: which rows are kept is decided from these numbers.
    """
    lengths = [
        torch.linalg.vector_norm(rows, dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32))
        for rows in activations.values()
    ]
    first = lengths[0].device
    return torch.stack([length.float().to(first) for length in lengths])


def context_medians(
    norms: Float[Tensor, "places contexts seq"],
    text: Bool[Tensor, "contexts seq"],
    places: list[Place],
    usual: Bool[Tensor, "contexts seq"] | None = None,
) -> Float[Tensor, "places contexts"]:
    """The median norm of each context's usual text that is not zero; NaN without any text, 0 where
    all of it is zero.

    Raises NotFinite when a norm of text is not finite.
    """
    lengths = norms.masked_fill(~text, 0.0)
    for at, place in enumerate(places):
        # A norm beyond float32 belongs to no sane activation, either.
        if not torch.isfinite(lengths[at]).all():
            raise NotFinite(place)
    if not norms.shape[1] or not norms.shape[2]:
        return torch.full(norms.shape[:2], torch.nan)
    counted = text if usual is None else usual
    medians = norms.masked_fill(~counted | (norms == 0), torch.nan).nanmedian(dim=2).values
    return torch.where(counted.any(dim=1) & medians.isnan(), 0.0, medians)
