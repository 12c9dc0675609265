"""The nearest latents of a latent: by the direction it writes, and by where it fires."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_NUMBERS_AT_ONCE = 2**24


@dataclass(frozen=True, eq=False)
class Near:
    """The nearest latents of n latents, best first, on the CPU; -1 where there are fewer."""

    latent: Int[Tensor, "n k"]
    value: Float[Tensor, "n k"]
    together: Int[Tensor, "n k"] | None = None
    """By co-firing: rows on which both fire."""


def nearest_by_decoder(
    W_dec: Float[Tensor, "d_sae d_model"], ids: Int[Tensor, " n"], k: int
) -> Near:
    """The `k` latents whose decoder rows have the largest cosine with those of `ids`."""
    rows = W_dec.float()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    k = min(k, len(rows) - 1)
    latents, values = [], []
    at_once = max(1, _NUMBERS_AT_ONCE // len(rows))
    for own in ids.to(rows.device).split(at_once):
        cosine = rows[own] @ rows.T
        cosine[torch.arange(len(own)), own] = -torch.inf
        best = cosine.topk(k)
        latents.append(best.indices.cpu())
        values.append(best.values.cpu())
    return Near(torch.cat(latents), torch.cat(values))


def nearest_by_cofiring(fires: "csr_array", ids: Int[Tensor, " n"], k: int) -> Near:
    """The `k` latents that fire most often where those of `ids` do, by the Jaccard index: rows on
    which both fire over rows on which either does. Latents that never fire together are left out.

    Args:
        fires: `[rows, d_sae]`, 1 where a latent fires.
    """
    count = np.asarray(fires.sum(axis=0)).ravel()
    columns = fires.tocsc()
    k = min(k, fires.shape[1] - 1)
    found = [np.full((0, k), -1), np.zeros((0, k)), np.zeros((0, k), dtype=np.int64)]
    at_once = max(1, _NUMBERS_AT_ONCE // fires.shape[1])
    for own in ids.split(at_once):
        picked = own.numpy()
        both = (columns[:, picked].T @ fires).toarray()
        either = count[picked][:, None] + count[None, :] - both
        index = both / np.maximum(either, 1)
        index[np.arange(len(picked)), picked] = 0
        # Stable: among equals the lower number comes first.
        order = np.argsort(-index, axis=1, kind="stable")[:, :k]
        value = np.take_along_axis(index, order, axis=1)
        together = np.take_along_axis(both, order, axis=1)
        parts = (np.where(value > 0, order, -1), value, together)
        found = [np.concatenate([old, new]) for old, new in zip(found, parts, strict=True)]
    return Near(*(torch.from_numpy(part) for part in found))
