"""How the fused TopK encoder knows that its answer is exact: candidates and a certificate.

The latents are dealt out to tiles. Of each tile only the ``kept`` best entries of a row are known
(the candidates); the k best candidates are the row's answer.

What a tile left out ranks behind its last candidate. If no tile's last candidate was selected,
everything left out ranks behind all k selected entries, and the answer is exact. A row in which one
was selected is flagged, and has to be redone.

A row is flagged with a probability of at most ``n_tiles * P[H >= kept]``, H hypergeometric (k of
d_sae latents chosen, TILE drawn), where the order of the latents says nothing about how often they
fire. Dictionaries sorted by frequency break that: ``strided`` deals neighbours out to different
tiles.
"""

from functools import lru_cache
from math import exp, lgamma

import torch
from torch import Tensor

TILE = 128
"""Latents per tile."""

MAX_FLAGGED = 1e-3
"""Most rows, as a fraction, that may be expected to be redone: at a batch of 8192 they fill one
tile of rows or none. More candidates would cost more in every tile than the rows they save."""

MAX_KEPT = 16
"""Most candidates per tile: each is a search through the tile. Beyond, `topk_encode` is quicker."""

MAX_CANDIDATES = 8192
"""Most candidates of a row that one Triton program searches without spilling registers."""


def tile_count(d_sae: int) -> int:
    return -(-d_sae // TILE)


def _log_comb(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def flag_bound(d_sae: int, k: int, kept: int) -> float:
    """Bound on the probability that a row is flagged: n_tiles * P[H >= kept].

    H hypergeometric: how many of k latents out of d_sae fall into a tile, where the order of the
    latents says nothing about their activations.
    """
    tile = min(TILE, d_sae)
    if kept >= tile:
        return 0.0
    total = _log_comb(d_sae, k)
    hits = 0.0
    for n in range(max(kept, k - d_sae + tile), min(k, tile) + 1):
        hits += exp(_log_comb(tile, n) + _log_comb(d_sae - tile, k - n) - total)
    return min(1.0, tile_count(d_sae) * hits)


@lru_cache
def kept_per_tile(d_sae: int, k: int) -> int | None:
    """Candidates to keep of each tile; None where `topk_encode` is the better choice."""
    n_tiles = tile_count(d_sae)
    for kept in range(1, min(MAX_KEPT, MAX_CANDIDATES // n_tiles) + 1):
        if _enough(d_sae, k, kept) and flag_bound(d_sae, k, kept) <= MAX_FLAGGED:
            return kept
    return None


def _enough(d_sae: int, k: int, kept: int) -> bool:
    """Whether every row has k candidates, in either way of dealing latents out to tiles."""
    n_tiles = tile_count(d_sae)
    last = d_sae - (n_tiles - 1) * TILE
    strided = min(kept, d_sae // n_tiles) * n_tiles  # the fuller tiles are not counted in full
    return min((n_tiles - 1) * min(kept, TILE) + min(kept, last), strided) >= k


def tile_latents(d_sae: int, strided: bool, device: torch.device) -> Tensor:
    """Latent of each column of each tile [n_tiles, TILE]; d_sae and above: none.

    Within a tile the latents ascend.
    """
    n_tiles = tile_count(d_sae)
    latents = torch.arange(n_tiles * TILE, device=device)
    return latents.view(TILE, n_tiles).t() if strided else latents.view(n_tiles, TILE)


def select_certified(
    pre_acts: Tensor, k: int, kept: int, strided: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Values and latents of the k best candidates, and which rows are flagged.

    As the kernels do it: candidates of each tile, the k best of them, the certificate. A row that
    is not flagged is exact. NaN counts as 0; values are not clipped at 0.
    """
    rows, d_sae = pre_acts.shape
    latents = tile_latents(d_sae, strided, pre_acts.device)
    missing = latents >= d_sae
    values = torch.where(pre_acts.isnan() | (pre_acts == 0), 0, pre_acts)
    tiled = values[:, latents.clamp(max=d_sae - 1)]
    # Ranks behind -inf, which is a value: a column without a latent must never be selected.
    behind = missing.expand_as(tiled).to(torch.int8)
    order = torch.sort(tiled, dim=2, descending=True, stable=True).indices
    order = order.gather(2, torch.sort(behind.gather(2, order), dim=2, stable=True).indices)
    order = order[:, :, :kept]
    candidates = tiled.gather(2, order).flatten(1)
    ids = latents.expand_as(tiled).gather(2, order).flatten(1)
    # By value, larger first, then by latent; what is missing has a latent of d_sae or above.
    by_id = ids.argsort(1)
    by_value = candidates.gather(1, by_id).argsort(dim=1, descending=True, stable=True)
    ranked = by_id.gather(1, by_value)
    absent = (ids.gather(1, ranked) >= d_sae).to(torch.int8)
    chosen = ranked.gather(1, absent.argsort(dim=1, stable=True)[:, :k])
    last = torch.zeros(missing.shape[0], kept, dtype=torch.bool, device=pre_acts.device)
    last[:, -1] = (~missing).sum(1) > kept
    flagged = last.flatten()[chosen].any(1)
    indices, place = ids.gather(1, chosen).sort(1)
    return candidates.gather(1, chosen.gather(1, place)), indices, flagged
